"""Downloads from a server that drops connections."""

import hashlib
import http.server
import re
import shutil
import threading
import zipfile

import pytest

from conftest import read_raw, run_stage, write_amazon, write_ml_100k
from userip.download import ARCHIVES


class Unreliable(http.server.BaseHTTPRequestHandler):
    """Serves `files`; drops the connection after `drop` bytes of an answer, as often as `drops` says."""

    files, drop, drops, requests, ranges = {}, 200, 0, [], True

    def do_GET(self):
        content = self.files.get(self.path)
        if content is None:
            return self.send_error(404)
        asked = self.headers.get("Range")
        type(self).requests.append(asked)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.ranges else 0
        if start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.drops:
            type(self).drops -= 1
            self.wfile.write(content[start:start + self.drop])
            self.wfile.flush()
            self.connection.close()
        else:
            self.wfile.write(content[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    handler = type("Handler", (Unreliable,), {"requests": [], "files": {}})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        handler.url = f"http://127.0.0.1:{running.server_port}"
        yield handler
        running.shutdown()


def offer_amazon(server, folder):
    write_amazon(folder / "there", 2014)
    server.files = {f"/{path.name}": path.read_bytes() for path in (folder / "there").iterdir()}


def test_a_download_goes_on_where_the_connection_was_dropped(tmp_path, server):
    offer_amazon(server, tmp_path)
    server.drops = 2
    part = tmp_path / "raw/reviews_Video_Games_5.json.gz.part"
    for size in (200, 400):
        line = read_raw(tmp_path, "games", "--download", server.url, ok=False)
        assert f"{size} of" in line and str(part) in line and part.stat().st_size == size
    read_raw(tmp_path, "games", "--download", server.url)
    assert server.requests[:3] == [None, "bytes=200-", "bytes=400-"]
    for name, content in server.files.items():
        assert (tmp_path / f"raw{name}").read_bytes() == content
    assert not list((tmp_path / "raw").glob("*.part"))
    before = len(server.requests)
    assert "is there already" in read_raw(tmp_path, "games", "--download", server.url)[-1]
    assert len(server.requests) == before


def test_a_server_that_cannot_resume_sends_all_again(tmp_path, server):
    offer_amazon(server, tmp_path)
    server.drops, server.ranges = 1, False
    read_raw(tmp_path, "games", "--download", server.url, ok=False)
    read_raw(tmp_path, "games", "--download", server.url)
    assert server.requests[:2] == [None, "bytes=200-"]
    assert ((tmp_path / "raw/reviews_Video_Games_5.json.gz").read_bytes()
            == server.files["/reviews_Video_Games_5.json.gz"])


def test_a_part_that_is_larger_than_the_file_is_named(tmp_path, server):
    offer_amazon(server, tmp_path)
    (tmp_path / "raw").mkdir()
    part = tmp_path / "raw/reviews_Video_Games_5.json.gz.part"
    part.write_bytes(b"x" * 100_000)
    assert f"delete {part}" in read_raw(tmp_path, "games", "--download", server.url, ok=False)
    part.unlink()
    read_raw(tmp_path, "games", "--download", server.url)


def test_what_the_server_lacks_and_where_there_is_no_server(tmp_path, server):
    assert "404" in read_raw(tmp_path, "amazon", "--category", "Nothing", "--download", server.url, ok=False)
    for url in ("http://127.0.0.1:9", "not-a-url"):
        assert "cannot be fetched" in read_raw(tmp_path, "games", "--download", url, ok=False)
    (tmp_path / "file").write_text("")
    options = "--raw", tmp_path / "file", "--run-dir", tmp_path / "refused", "--download", server.url
    assert "File exists" in run_stage("01_prepare.py", "--dataset", "games", *options, ok=False)


def test_an_archive_is_checked_by_its_digest_and_unpacked(tmp_path, server, monkeypatch):
    write_ml_100k(tmp_path / "there/ml-100k")
    with zipfile.ZipFile(tmp_path / "ml-100k.zip", "w") as archive:
        for path in (tmp_path / "there/ml-100k").iterdir():
            archive.write(path, f"ml-100k/{path.name}")
    content = (tmp_path / "ml-100k.zip").read_bytes()
    server.files = {"/ml-100k.zip": content}
    line = read_raw(tmp_path, "ml-100k", "--download", server.url, ok=False)
    assert "digest" in line and not list((tmp_path / "raw").iterdir())
    monkeypatch.setitem(ARCHIVES, "ml-100k", (hashlib.md5(content).hexdigest(), "u.data"))
    table, *_ = read_raw(tmp_path, "ml-100k", "--download", server.url)
    assert len(table) == 360 and (tmp_path / "raw/ml-100k/u.item").exists()
    # a kill while it is unpacked leaves nothing that could be taken for the whole
    shutil.rmtree(tmp_path / "raw/ml-100k")

    def killed(archive, folder):
        archive.extract("ml-100k/u.data", folder)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extractall", killed)
        with pytest.raises(KeyboardInterrupt):
            read_raw(tmp_path, "ml-100k", "--download", server.url)
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["ml-100k.zip"]
    assert len(read_raw(tmp_path, "ml-100k", "--download", server.url)[0]) == 360
    (tmp_path / "raw/ml-100k.zip").unlink()
    before = len(server.requests)
    read_raw(tmp_path, "ml-100k", "--download", server.url)  # what is unpacked there is not fetched again
    assert len(server.requests) == before
