import argparse
from types import SimpleNamespace

import torch

from userip.artifacts import read_artifacts, write_artifact


def test_a_routeed_tensor_is_that_of_torch_save(tmp_path):
    parts = [torch.randn(3, 2, 5) for _ in range(4)]
    value = {"names": ["a"], "other": torch.arange(7),
             "big": SimpleNamespace(shape=(12, 2, 5), blocks=lambda: parts)}
    args = argparse.Namespace(run_dir=tmp_path, seed=0)
    write_artifact(args, "profiles.pt", value)
    (stored,) = read_artifacts(args, "profiles.pt")
    assert torch.equal(stored["big"], torch.cat(parts)) and torch.equal(stored["other"], torch.arange(7))
    assert stored["names"] == ["a"] and stored["big"].dtype == torch.float32
