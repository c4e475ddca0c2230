import argparse
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import NAME_TEXTS, TASK_TEXT, bpe_tokenizer, dies, save_llm
from llm_cases import prompt_of, texts_of, routes_for, soft_for
from userip.evidence import FIELDS, Texts, tokenize
from userip.llm import load_llm
from userip.prompt import HeadNLL, Prompt
from userip.setup import load_prompt


def hidden_of_block(llm, prompt, soft, block, texts, sees):
    """All layers' hidden states at the name and soft tokens of one profile: [layers, B, L_k, D]"""
    embeddings, mask, position = prompt.inputs(soft, texts.ids, sees.expand(len(texts.ids), -1))
    output = llm[0](inputs_embeds=embeddings, attention_mask=mask, position_ids=position,
                    output_hidden_states=True)
    return torch.stack(output.hidden_states)[:, :, (prompt.segment == block).nonzero()[:, 0]]


@pytest.mark.parametrize("block", [0, 1])
def test_a_profile_is_blind_to_the_other_name_the_other_soft_token_and_the_task(llm, block):
    texts = texts_of(llm)
    sees = torch.ones(2, dtype=torch.bool)
    prompt = prompt_of(llm)
    soft = soft_for(prompt, 5)
    before = hidden_of_block(llm, prompt, soft, block, texts, sees)
    other_soft = soft.clone()
    other_soft[:, 1 - block] += 1.0
    assert torch.equal(before, hidden_of_block(llm, prompt, other_soft, block, texts, sees))
    other_name = ["her job is" if k != block else NAME_TEXTS[k] for k in range(2)]
    longer_task = "a much longer task text: a job or a sport and a job or a sport"
    for names, task in ((other_name, TASK_TEXT), (NAME_TEXTS, "a job or a sport"), (NAME_TEXTS, longer_task)):
        after = hidden_of_block(llm, prompt_of(llm, names, task), soft, block, texts, sees)
        # the same numbers, computed in a sequence of another length: kernels may add in another order
        assert torch.allclose(before, after, atol=1e-6, rtol=0)
    own_soft = soft.clone()
    own_soft[:, block] += 1.0
    assert not torch.allclose(before, hidden_of_block(llm, prompt, own_soft, block, texts, sees), atol=1e-3)


def test_a_name_or_task_of_equal_length_changes_no_bit_of_the_other_profile(llm):
    texts = texts_of(llm)
    sees, prompt = torch.ones(2, dtype=torch.bool), prompt_of(llm)
    soft = soft_for(prompt, 5)
    before = hidden_of_block(llm, prompt, soft, 0, texts, sees)
    for place in (int((prompt.segment == 1).nonzero()[0]) + 1, int((prompt.segment == 2).nonzero()[-1])):
        changed = prompt_of(llm)
        changed.embedding[place] += 1.0  # another token of the other name, of the task text
        assert torch.equal(before, hidden_of_block(llm, changed, soft, 0, texts, sees))


def test_routed_evidence_is_blind_to_the_other_profile(llm):
    prompt, (first, _) = prompt_of(llm), routes_for(llm)
    soft = soft_for(prompt, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(prompt.nll(soft, first.texts, first.may_read).sum(), soft)
    assert gradient[:, 1].abs().max() == 0 and gradient[:, 0].abs().max() > 0


def test_the_first_evidence_token_depends_on_the_profile(llm):
    """The last task token predicts it: blind, the category could not depend on θ."""
    prompt, (first, _) = prompt_of(llm), routes_for(llm)
    nll = [prompt.nll(soft_for(prompt, 5, seed), first.texts, first.may_read)[:, 0] for seed in (0, 1)]
    assert (nll[0] - nll[1]).abs().min() > 1e-6


def test_the_causal_mask_lets_profiles_see_what_stands_before_them(llm):
    """The ablation: the second profile sees the first, never the other way round; positions in a row."""
    texts, sees = texts_of(llm), torch.ones(2, dtype=torch.bool)
    prompt = prompt_of(llm, mask="causal")
    assert prompt.position.tolist() == list(range(len(prompt.segment)))
    soft = soft_for(prompt, 5)
    for block in range(2):
        other = soft.clone()
        other[:, 1 - block] += 1.0
        hidden = [hidden_of_block(llm, prompt, part, block, texts, sees) for part in (soft, other)]
        assert torch.equal(*hidden) == (block == 0)


@pytest.mark.parametrize("num_soft", [2, 3])
def test_each_of_several_soft_tokens_counts_and_none_sees_the_other_profile(llm, num_soft):
    prompt, routes = prompt_of(llm, num_soft=num_soft), routes_for(llm)
    dim = prompt.embedding.shape[1]
    soft = soft_for(prompt, 5).requires_grad_()
    assert soft.shape[2] == num_soft * dim and len(prompt.soft_positions) == 2 * num_soft
    (gradient,) = torch.autograd.grad(prompt.nll(soft, routes[0].texts, routes[0].may_read).sum(), soft)
    assert (gradient[:, 0].unflatten(1, (num_soft, dim)).abs().amax((0, 2)) > 0).all()
    assert gradient[:, 1].abs().max() == 0


def test_soft_tokens_start_at_the_scale_of_the_embeddings(llm):
    prompt = prompt_of(llm, num_soft=2)
    soft = prompt.random_soft(50, torch.Generator().manual_seed(0))
    assert soft.shape == (50, 2, 2 * prompt.embedding.shape[1])
    assert float(soft.std()) == pytest.approx(prompt.scale, rel=0.1)


def test_padding_changes_nothing(llm):
    prompt, (first, _) = prompt_of(llm), routes_for(llm)
    soft = soft_for(prompt, 5)
    together = prompt.nll(soft, first.texts, first.may_read)
    for row in range(5):
        alone = first.texts.select(torch.tensor([row]))
        nll = prompt.nll(soft[row:row + 1], alone, first.may_read)[0]
        assert torch.allclose(together[row, :len(nll)], nll, atol=1e-5)
        assert together[row, len(nll):].abs().sum() == 0
    junk = first.texts._replace(ids=torch.where(first.texts.field < 0, 7, first.texts.ids))
    assert torch.equal(prompt.nll(soft, junk, first.may_read), together)


def test_the_loss_is_the_llms_own(llm):
    model, prompt, texts = llm[0], prompt_of(llm), texts_of(llm)
    sees = torch.ones(5, 2, dtype=torch.bool)
    soft = soft_for(prompt, 5)
    embeddings, mask, position = prompt.inputs(soft, texts.ids, sees)
    labels = torch.where(texts.field < 0, -100, texts.ids)
    labels = torch.nn.functional.pad(labels, (len(prompt.segment), 0), value=-100)
    own = model(inputs_embeds=embeddings, attention_mask=mask, position_ids=position, labels=labels).loss
    ours = prompt.nll(soft, texts, sees[0])
    assert float(ours.sum() / (texts.field >= 0).sum()) == pytest.approx(float(own), rel=1e-5)


def test_bos_opens_each_block_where_the_llm_has_one(llm):
    prompt, tokenizer = prompt_of(llm), llm[1]
    starts = [int((prompt.segment == k).nonzero()[0]) for k in range(3)]
    with torch.no_grad():
        bos = prompt.embed(torch.tensor(tokenizer.bos_token_id))
    has_bos = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    assert all(torch.equal(prompt.embedding[start], bos) == has_bos for start in starts)


@pytest.mark.parametrize("num_soft", [1, 2])
@pytest.mark.parametrize("may_read", [[True, True], [True, False], [False, True], [False, False]])
def test_keys_made_once_give_the_hidden_states_of_the_whole_prompt(llm, may_read, num_soft):
    prompt, texts = prompt_of(llm, num_soft=num_soft), texts_of(llm)
    owner, may_read = torch.tensor([0, 1, 1, 0, 2]), torch.tensor(may_read)
    results = []
    for is_cached in (False, True):
        soft = soft_for(prompt, 3).requires_grad_()
        if is_cached:
            hidden = prompt.hidden_cached(texts.ids, owner, prompt.soft_keys(soft, may_read))
        else:
            hidden = prompt.hidden_full(soft, texts.ids, may_read, owner)
        is_text = torch.arange(texts.ids.shape[1]) < texts.length[:, None]
        loss = hidden[is_text].square().sum() + 0 * soft.sum()  # reads no θ: no gradient, but no error
        results.append((hidden[is_text], torch.autograd.grad(loss, soft)[0]))
    for long, short in zip(*results):
        assert torch.allclose(long, short, atol=1e-5)
    assert bool(results[1][1].abs().sum() > 0) == bool(may_read.any())


def test_the_loss_in_chunks_is_cross_entropy_and_so_is_its_gradient(llm, monkeypatch):
    prompt = prompt_of(llm)
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(prompt.head.out_features, (50,), generator=generator)
    weight = torch.rand(50, generator=generator)
    for chunk, scale in ((1, 1), (7 * prompt.head.out_features, 1), (2**25, 1), (2**25, 1e4)):
        monkeypatch.setattr("userip.prompt.MAX_LOGITS", chunk)
        hidden = (scale * torch.randn(50, prompt.head.in_features, generator=generator)).requires_grad_()
        ours = HeadNLL.apply(hidden, prompt.head, target)
        plain = torch.nn.functional.cross_entropy(prompt.head(hidden), target, reduction="none")
        assert torch.allclose(ours, plain, atol=1e-5)
        (mine,), (theirs,) = (torch.autograd.grad((nll * weight).sum(), hidden) for nll in (ours, plain))
        assert torch.allclose(mine, theirs, atol=1e-6)


@pytest.mark.parametrize("mask", ["causal", "fig4"])
@pytest.mark.parametrize("max_tokens", [30, 4096])
def test_the_gradient_of_a_step_is_that_of_the_naive_loop(llm, mask, max_tokens):
    """Text by text, the whole prompt, all logits, plain cross-entropy; fields weighted."""
    prompt, (route, _) = prompt_of(llm, mask=mask), routes_for(llm)
    weights = torch.arange(1.0, 1 + len(FIELDS))
    rows, owner = torch.tensor([0, 3, 2, 3, 4, 0]), torch.tensor([0, 0, 1, 2, 2, 2])
    soft = soft_for(prompt, 4).requires_grad_()  # the fourth user has no text
    soft.grad = torch.ones_like(soft)
    prompt.add_gradient(soft, route, rows, owner, weights, max_tokens)
    loss = 0.0
    for row, user in zip(rows, owner):
        length = int(route.texts.length[row])
        ids, field = route.texts.ids[row, :length], route.texts.field[row, :length]
        embeddings, allowed, position = prompt.inputs(soft[user][None], ids[None], route.may_read[None])
        logits = llm[0](inputs_embeds=embeddings, attention_mask=allowed, position_ids=position).logits
        nll = torch.nn.functional.cross_entropy(logits[0, -length - 1:-1], ids, reduction="none")
        loss = loss + (weights[field] * nll).sum()
    (expected,) = torch.autograd.grad(loss, soft)
    assert torch.allclose(soft.grad - 1, expected, atol=1e-5) and expected[3].abs().max() == 0


def test_batches_hold_texts_of_about_equal_length_and_no_more_tokens_than_allowed(llm):
    prompt, draw = prompt_of(llm), torch.Generator().manual_seed(0)
    length = torch.randint(3, 41, (600,), generator=draw)
    texts = Texts(torch.zeros(600, 40), None, length)
    rows = torch.randperm(600, generator=draw)
    found = list(prompt.batches(texts, rows, 2000))
    assert sorted(torch.cat(found).tolist()) == list(range(600))
    tokens = [len(index) * (len(prompt.segment) + int(length[rows[index]].max())) for index in found]
    padded = sum(len(index) * int(length[rows[index]].max()) for index in found)
    assert max(tokens) <= 2000 and padded < 1.15 * int(length.sum()) and len(found) < 60
    assert [len(index) for index in prompt.batches(texts, rows[:5], 1)] == [1] * 5


def test_no_logits_of_all_rows_are_ever_held(llm, monkeypatch):
    prompt, sizes = prompt_of(llm), []
    monkeypatch.setattr("userip.prompt.MAX_LOGITS", 4 * prompt.head.out_features)
    prompt.head.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    HeadNLL.apply(torch.randn(50, prompt.head.in_features), prompt.head, torch.zeros(50).long())
    prompt.head._forward_hooks.clear()
    assert max(sizes) <= 5 and sum(sizes) == 50


def test_a_llm_that_changes_its_logits_behind_the_head_is_refused(llm, capsys, monkeypatch):
    model, tokenizer = llm
    plain = type(model).forward

    def scaled(self, *arguments, **options):
        output = plain(self, *arguments, **options)
        return type(output)(**dict(output) | {"logits": 0.5 * output.logits})

    monkeypatch.setattr(type(model), "forward", scaled)
    line = dies(capsys, Prompt, (model, tokenizer), dict(zip("ab", NAME_TEXTS)), TASK_TEXT)
    assert "behind the head" in line


def test_a_text_longer_than_the_context(llm, capsys):
    prompt = prompt_of(llm)
    long = tokenize(llm[1], [[("title", " racer")], [("title", " red racer" * 200)]])
    line = dies(capsys, prompt.check_context, long.length, "item {}".format, "shorten it")
    assert "item 1 needs" in line and "256" in line and "shorten it" in line


LLAMA_LIKE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=8, pad_token_id=0)
PASS = ("qwen2", "gpt_neox", "qwen3", "mistral", "phi", "phi3", "gemma", "olmo2", "smollm3", "granite")
OTHERS = {"gpt_neo": dict(hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global"], 2]]),
          "gptj": dict(n_embd=32, n_layer=2, n_head=2, rotary_dim=4), "bloom": dict(hidden_size=32, n_layer=2, n_head=2),
          "qwen2": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2),
          "mamba": dict(hidden_size=32, num_hidden_layers=2), "gpt_neox": dict(
              hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2),
          "gemma2": LLAMA_LIKE, **dict.fromkeys(PASS[2:], LLAMA_LIKE)}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_llm_honours_the_mask_or_is_refused_by_name(tmp_path, capsys, kind):
    """As far as the check accepts it, no token sees the future and no text its neighbours."""
    tokenizer = bpe_tokenizer("gpt2")
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), max_position_embeddings=128, **OTHERS[kind])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    args = argparse.Namespace(run_dir="unused", llm=str(tmp_path), task_text=TASK_TEXT, soft_tokens=1, mask="fig4",
                              method="score", rank=1, evidence="items",
                              dtype="float32")
    try:
        _, _, prompt = load_prompt(args, dict(enumerate(NAME_TEXTS)), [], None, 0)
    except SystemExit:
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and "--llm" in lines[0] and "GPT-2 or Llama kind" in lines[0]
        assert kind in ("gpt_neo", "gptj", "bloom", "mamba", "gemma2"), lines
        return
    assert kind in PASS
    texts, sees, soft = texts_of((None, tokenizer)), torch.ones(2, dtype=torch.bool), soft_for(prompt, 5)
    changed = texts._replace(ids=texts.ids.clone())
    changed.ids[:, 4:] += 1
    before, after = prompt.nll(soft, texts, sees), prompt.nll(soft, changed, sees)
    assert torch.allclose(before[:, :4], after[:, :4], atol=1e-5) and not torch.allclose(before, after)


def test_a_folder_that_asks_for_eager_attention_gets_the_mask_all_the_same(tmp_path):
    save_llm(tmp_path, "gpt2")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attn_implementation": "eager"}))
    model, _ = load_llm(argparse.Namespace(run_dir="unused"), str(tmp_path))
    assert model.config._attn_implementation == "sdpa"
