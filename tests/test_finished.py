"""finished.jsonl: what is no row is left out, what cannot be read or written is refused."""

from conftest import dies
from userip.finished import FinishedRows


def test_what_is_no_row_in_finished_jsonl_is_left_out_and_what_cannot_be_written_is_said(tmp_path, capsys):
    path = tmp_path / "finished.jsonl"
    path.write_bytes(b'123\n[1]\n{"no": "key"}\n\xff\xfe\n{"key": "a", "auc": 1}\n{"key": "b"')
    assert FinishedRows(path) == {"a": {"auc": 1}}
    assert capsys.readouterr().out.count("left out") == 5
    path.unlink()
    path.mkdir()
    assert "cannot read" in dies(capsys, FinishedRows, path)
    assert "cannot write" in dies(capsys, FinishedRows, tmp_path / "no folder/finished.jsonl")


def test_a_line_cut_short_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "finished.jsonl"
    FinishedRows(path).append({"a": {"auc": 1}, "b": {"auc": 2}})
    path.write_text(path.read_text()[:-5])
    FinishedRows(path).append({"c": {"auc": 3}})
    assert FinishedRows(path) == {"a": {"auc": 1}, "c": {"auc": 3}}
