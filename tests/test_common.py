import argparse
import ast
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import log_loss

import common
from conftest import ROOT, dies


def naive_mask(segment, is_soft, sees):
    """Fig. 4, one pair of places at a time."""
    batch, num_profiles = sees.shape
    length = len(segment)
    last_task = max(t for t in range(length) if segment[t] == num_profiles)
    mask = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    for b in range(batch):
        for query in range(length):
            for key in range(query + 1):
                reads_all = segment[query] > num_profiles or query == last_task
                allowed = reads_all or segment[query] == segment[key]
                if reads_all and is_soft[key] and not sees[b, segment[key]]:
                    allowed = False
                mask[b, 0, query, key] = allowed
    return mask


@pytest.mark.parametrize("num_profiles", [1, 2, 3])
def test_mask_equals_a_naive_double_loop(num_profiles):
    blocks = [3, 2, 4][:num_profiles] + [3, 5]
    segment = torch.tensor([k for k, size in enumerate(blocks) for _ in range(size)])
    is_soft = torch.zeros(len(segment), dtype=torch.bool)
    is_soft[np.cumsum(blocks[:num_profiles]) - 1] = True
    sees = torch.rand(6, num_profiles, generator=torch.Generator().manual_seed(0)) > 0.5
    assert torch.equal(common.fig4_mask(segment, is_soft, sees), naive_mask(segment, is_soft, sees))


def test_quantizer_equals_a_naive_loop_and_passes_gradients_straight_through():
    torch.manual_seed(0)
    codebook, z = torch.randn(4, 3), torch.randn(10, 3, requires_grad=True)
    quantizer = common.VectorQuantizer(codebook, beta=0.3)
    quantized, codes, loss = quantizer(z)
    expected_loss = 0.0
    for b in range(10):
        distances = [float((z[b] - codebook[j]).detach().square().sum()) for j in range(4)]
        assert int(codes[b]) == int(np.argmin(distances))
        assert torch.allclose(quantized[b], codebook[codes[b]], atol=1e-6)
        expected_loss += 1.3 * min(distances) / 10
    assert float(loss) == pytest.approx(expected_loss, rel=1e-5)
    weight = torch.randn(10, 3)
    (gradient,) = torch.autograd.grad((quantized * weight).sum(), z, retain_graph=True)
    assert torch.equal(gradient, weight)


def test_each_vq_term_moves_its_own_side_and_beta_reaches_the_loss():
    z = torch.randn(6, 2, requires_grad=True)
    for beta in (0.0, 0.5, 2.0):
        codebook = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
        quantizer = common.VectorQuantizer(codebook, beta)
        _, codes, loss = quantizer(z)
        to_z, to_codebook = torch.autograd.grad(loss, [z, quantizer.codebook])
        chosen = quantizer.codebook.detach()[codes]
        assert torch.allclose(to_z, beta * 2 * (z.detach() - chosen) / 6, atol=1e-6)
        expected = torch.zeros(3, 2).index_add(0, codes, 2 * (chosen - z.detach()) / 6)
        assert torch.allclose(to_codebook, expected, atol=1e-6)


def test_dcn_equals_a_naive_loop():
    torch.manual_seed(0)
    net = common.DCN(6, num_layers=3, hidden=(5, 4)).double().eval()
    torch.nn.init.normal_(net.biases)
    x = torch.randn(7, 6, dtype=torch.double)
    for b in range(7):
        state = x[b]
        for weight, bias in zip(net.weights, net.biases):
            product = sum(weight[j] * state[j] for j in range(6))
            state = torch.stack([x[b, d] * product + bias[d] + state[d] for d in range(6)])
        assert torch.allclose(net.cross(x)[b], state, atol=1e-10)
        hidden = x[b]
        for layer in net.mlp.layers:
            hidden = (layer.weight @ hidden + layer.bias).clamp(min=0)
        logit = net.head.weight[0] @ torch.cat([state, hidden]) + net.head.bias[0]
        assert float(net(x)[b]) == pytest.approx(float(logit), abs=1e-10)


def test_dcn_without_weights_and_biases_is_the_identity():
    net = common.DCN(5)
    torch.nn.init.zeros_(net.weights)
    torch.nn.init.zeros_(net.biases)
    x = torch.randn(4, 5)
    assert torch.equal(net.cross(x), x)


def test_logloss_equals_sklearn():
    rng = np.random.default_rng(0)
    labels, probabilities = rng.integers(2, size=200), rng.random(200)
    assert common.logloss(labels, probabilities) == pytest.approx(log_loss(labels, probabilities), rel=1e-9)
    assert np.isfinite(common.logloss(labels, labels.astype(float)))


def test_perplexity_counts_codes_that_are_used_alike():
    counts, perplexity = common.usage_of(np.array([0, 1, 1, 0, 3, 3, 4, 4]), 4)  # 4 = unknown
    assert counts.tolist() == [2, 2, 0, 2] and perplexity == pytest.approx(3.0)
    assert common.usage_of(np.zeros(9, dtype=int), 4)[1] == pytest.approx(1.0)


# --- artifacts ------------------------------------------------------------------------------------------


def options(run_dir, seed=0):
    return argparse.Namespace(run_dir=str(run_dir), seed=seed)


def write_pair(run_dir, seed=0):
    frame, profiles = pd.DataFrame({"user": [0, 1], "item": [1, 0]}), {"profiles": torch.eye(2) + seed}
    args = options(run_dir, seed)
    common.write_artifact(args, "interactions.parquet", frame.assign(seed=seed), dataset="x")
    common.write_artifact(args, "profiles.pt", profiles, inputs=["interactions.parquet"])


def test_artifacts_come_back_as_written_and_say_where_they_come_from(tmp_path):
    write_pair(tmp_path)
    frame, stored = common.read_artifacts(options(tmp_path), "interactions.parquet", "profiles.pt")
    assert frame["item"].tolist() == [1, 0] and torch.equal(stored["profiles"], torch.eye(2))
    sidecar = common.read_sidecar(options(tmp_path), "profiles.pt")
    assert sidecar["inputs"]["interactions.parquet"] == common.sha256_of(tmp_path / "interactions.parquet")
    assert sidecar["stage"] == "02_infer_profiles.py" and sidecar["torch"] == torch.__version__
    assert not list(tmp_path.glob(".*tmp"))


def test_a_missing_artifact_names_the_command_that_makes_it(tmp_path, capsys):
    line = dies(capsys, common.read_artifacts, options(tmp_path), "feature_bank.parquet")
    assert "feature_bank.parquet" in line and f"python 03_quantize.py --run-dir {tmp_path}" in line


def test_artifacts_of_two_runs_never_mix(tmp_path, capsys):
    for seed, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        write_pair(tmp_path / name, seed)
    for name in ("profiles.pt", "profiles.pt.json"):
        os.replace(tmp_path / "b" / name, tmp_path / "a" / name)
    line = dies(capsys, common.read_artifacts, options(tmp_path / "a"), "interactions.parquet", "profiles.pt")
    assert "profiles.pt" in line and "interactions.parquet" in line


def test_a_file_cut_short_is_found_out(tmp_path, capsys):
    write_pair(tmp_path)
    path = tmp_path / "profiles.pt"
    path.write_bytes(path.read_bytes()[:-10])
    assert "profiles.pt" in dies(capsys, common.read_artifacts, options(tmp_path), "profiles.pt")


def test_a_full_disk_leaves_the_old_artifact_whole(tmp_path, capsys, monkeypatch):
    write_pair(tmp_path)
    before = (tmp_path / "interactions.parquet").read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    arguments = options(tmp_path), "interactions.parquet", pd.DataFrame({"user": [9]})
    assert "No space left" in dies(capsys, common.write_artifact, *arguments)
    monkeypatch.undo()
    assert (tmp_path / "interactions.parquet").read_bytes() == before and not list(tmp_path.glob(".*"))
    assert len(common.read_artifacts(options(tmp_path), "interactions.parquet")[0]) == 2


def test_the_same_value_is_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_pair(tmp_path / name)
    assert (tmp_path / "a/profiles.pt").read_bytes() == (tmp_path / "b/profiles.pt").read_bytes()


def test_every_name_in_common_serves_two_stages():
    inside = (ROOT / "common.py").read_text()
    defined = {node.name for node in ast.parse(inside).body
               if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    public = {name for name in defined if not name.startswith("_")}
    users = {name: 0 for name in public}
    for script in [*sorted(Path(ROOT).glob("0*.py")), *sorted(Path(ROOT).glob("userip/*.py"))]:
        for node in ast.walk(ast.parse(script.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "common":
                for alias in node.names:
                    users[alias.name] = users.get(alias.name, 0) + 1
    # a helper of two others is shared, too
    uses = {name: users[name] + inside.count(f"{name}(") - 1 for name in public}
    alone = [name for name in public if uses[name] < 2]
    assert not alone, f"used by one stage only: {alone}"


def test_no_stage_imports_another_and_none_works_at_import_time():
    for script in Path(ROOT).glob("0*.py"):
        tree = ast.parse(script.read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names]
                if isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                forbidden = {"01", "02", "03", "04", "05"}
                assert not any(name[:2] in forbidden or name == "importlib" for name in names), script
        assert ast.unparse(tree.body[-1]) == "if __name__ == '__main__':\n    main(parse_args())"
