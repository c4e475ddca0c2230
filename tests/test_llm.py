import argparse
import copy
import shutil
import socket

import numpy as np
import pytest
import torch

from conftest import NAME_TEXTS, TASK_TEXT, save_llm
from llm_cases import infer_run
from userip.artifacts import sha256_of
from userip.llm import MixedLinear, choose_llm, fuse, load_llm, mix, pretrain_tiny


@pytest.mark.parametrize("num_steps", [1, 2, 10])
def test_the_tiny_llm_takes_any_number_of_steps(tmp_path, num_steps):
    histories = [[" red racer 1.", " iron skillet 2."], [" café racer 3."]]
    curve = pretrain_tiny(tmp_path, histories, [*NAME_TEXTS, TASK_TEXT], num_steps, 0)
    assert len(curve) == num_steps and np.isfinite(curve).all()
    assert load_llm(argparse.Namespace(run_dir=""), str(tmp_path))[0].config.n_layer == 4


def test_auto_says_which_llm_and_why_within_seconds(monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, name: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert choose_llm()[0] == "gpt2"  # a hub answers: GPT-2 can be fetched
    assert choose_llm()[0] == "tiny"  # nobody listens any more
    only_gpt2 = lambda repository, name: "/cache/x" if repository == "gpt2" else None
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", only_gpt2)
    assert choose_llm() == ("gpt2", "its weights are on this machine")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, name: "/cache/x")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_llm()[0] == "meta-llama/Llama-2-7b-hf"


def test_a_folder_without_weights_or_tokenizer(small_run, tmp_path):
    llm = save_llm(tmp_path / "llm", "gpt2")
    bare = shutil.copytree(llm, tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer" in infer_run(small_run, tmp_path, "--llm", bare, ok=False)
    (llm / "model.safetensors").unlink()
    line = infer_run(small_run, tmp_path, "--llm", llm, ok=False)
    assert "no weights" in line and "--llm" in line


@pytest.mark.parametrize("architecture, slow", [("gpt2", "NewGELUActivation"), ("llama", "LlamaRMSNorm")])
def test_fused_calls_change_nothing(tmp_path, architecture, slow):
    """Nothing is left in small calls, the weights are the same ones, and so are NLL and gradient."""
    from transformers import AutoModelForCausalLM

    folder = save_llm(tmp_path / "llm", architecture)
    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    for value in model.parameters():  # norms are saved as ones
        value += 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    fused = fuse(copy.deepcopy(model, {id(value): value for value in model.parameters()}))
    kinds = lambda model: [type(module).__name__ for module in model.modules()]
    assert slow in kinds(model) and slow not in kinds(fused)
    assert all(one is two for one, two in zip(model.parameters(), fused.parameters(), strict=True))
    found = []
    for each in (model, fused):
        embeddings = torch.randn(3, 7, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
        logits = each(inputs_embeds=embeddings.requires_grad_(), use_cache=False).logits
        loss = logits.logsumexp(2).sum()
        found.append((loss, *torch.autograd.grad(loss, embeddings)))
    for one, two in zip(*found):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-5)


def test_mixed_layers_multiply_in_bfloat16_and_can_be_put_back(llm_folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llm_folder).eval().requires_grad_(False)
    embeddings = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def logits_and_gradient():
        logits = model(inputs_embeds=embeddings, use_cache=False).logits
        return logits, *torch.autograd.grad(logits.square().sum(), embeddings)

    exact, restore = logits_and_gradient(), mix(model)
    mixed = logits_and_gradient()
    layers = [module for module in model.modules() if isinstance(module, MixedLinear)]
    assert len(layers) >= 9 and all(layer.weight.dtype == torch.bfloat16 for layer in layers)
    assert model.get_input_embeddings().weight.dtype == torch.float32
    for one, two in zip(exact, mixed):
        assert two.dtype == torch.float32 and not torch.equal(one, two)
        assert torch.allclose(one, two, rtol=0.05, atol=0.02 * one.detach().abs().max())
    inputs = torch.randn(3, layers[0].weight.shape[1])
    product = inputs.bfloat16() @ layers[0].weight.T
    bias = 0 if layers[0].bias is None else layers[0].bias
    assert torch.equal(layers[0](inputs), product.float() + bias)
    restore()
    for one, two in zip(exact, logits_and_gradient()):
        assert torch.equal(one, two)


def test_a_gguf_file_names_the_packages_that_it_needs(small_run, tmp_path, monkeypatch):
    file = tmp_path / "model.gguf"
    assert "there is no such file" in infer_run(small_run, tmp_path, "--llm", file, ok=False)
    file.write_bytes(b"GGUF is not in here")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "`pip install gguf accelerate`" in infer_run(small_run, tmp_path, "--llm", file, ok=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert "no tokenizer could be loaded" in infer_run(small_run, tmp_path, "--llm", file, ok=False)


def test_a_file_or_a_folder_that_is_no_llm_is_told_for_what_it_is(small_run, tmp_path):
    (tmp_path / "text.txt").write_text("not an LLM")
    (tmp_path / "empty").mkdir()
    for name, told in (("text.txt", "this file is no GGUF file"), ("empty", "no config.json in it")):
        assert told in infer_run(small_run, tmp_path, "--llm", tmp_path / name, ok=False)


def test_a_saved_llm_of_either_architecture_runs(small_run, tmp_path, llm_folder):
    """GPT-2 and Llama, each saved to a folder with its tokenizer, as users have them."""
    before = {path.name: sha256_of(path) for path in llm_folder.iterdir()}
    printed, stored, _ = infer_run(small_run, tmp_path, "--llm", llm_folder)
    assert stored["profiles"].shape == (60, 2, 32) and stored["llm"] == str(llm_folder)
    assert before == {path.name: sha256_of(path) for path in llm_folder.iterdir()}
    assert "own - shuffled" in printed
