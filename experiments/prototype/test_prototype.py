"""Checks on a CPU: pytest test_prototype.py. With GGUF=FILE in the environment also SmolLM2 against Transformers."""

import os

import numpy as np
import pytest
import torch

import model
import run
import reference
import segments
import tasks
import weights
from segments import Config, Plan

DENSE = model.Functions(fast=False)
SEGMENTS = [
    Config(64, 32, 32, 4, 8, 8),
    Config(64, 32, 0, 4),
    Config(64, 32, 32, 0, 8, 8),
    Config(128, 32, 64, 4, 16, 32, frozenset({(0, 1), (1, 0), (1, 2)})),
    Config(0),
]
BREAKS = [[100, 101, 190], [], [3, 40, 250]]


def ids_of(length, vocabulary=97, seed=0, rows=3):
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("config", SEGMENTS)
def test_the_model_computes_what_the_contract_says(config):
    shape, state = weights.random()
    ids = ids_of(256)
    llama = model.Llama(shape, state, DENSE, torch.float32)
    logits = llama(ids, config, BREAKS) @ state["embed"].T
    for b in range(3):
        expected = reference.forward(shape, state, ids[b].numpy(), config, BREAKS[b])
        error = np.abs(logits[b].detach().numpy() - expected).max() / np.abs(expected).max()
        assert error < 1e-5, (config, b, error)


def test_the_past_changes_the_result():
    shape, state = weights.random()
    llama = model.Llama(shape, state, DENSE, torch.float32)
    a, b = (llama(ids_of(256), c, BREAKS) for c in SEGMENTS[:2])
    assert (a - b).abs().max() > 1e-2


def test_no_gradient_leaves_through_the_past_or_the_sinks():
    shape, state = weights.random(layers=1)
    llama = model.Llama(shape, state, DENSE, torch.float32)
    table = torch.nn.functional.embedding
    ids, config = ids_of(256, rows=1), SEGMENTS[0]
    llama.w["embed"].requires_grad_(False)
    seen = {}

    def embedding(i, w):
        seen["x"] = table(i, w).detach().requires_grad_()
        return seen["x"]

    model.F.embedding = embedding
    try:
        llama(ids, config)[0, 192:].square().sum().backward()
    finally:
        model.F.embedding = table
    changed = seen["x"].grad.abs().sum(-1) > 0
    assert changed[160:].all() and not changed[:160].any()


@pytest.mark.parametrize("config", SEGMENTS[:4])
def test_the_block_mask_holds_exactly_what_is_visible(config):
    plan = Plan(config, 3, 256, BREAKS, "cpu")
    for reads in ([True, False, True], [False] * 3):
        reads = [r and config.past_len > 0 for r in reads]
        extra = plan.extra(any(reads))
        mask = segments.visible(plan, reads, extra, 2)
        blocks = segments.block_mask(plan, reads, extra, mask)
        tokens, keys = 3 * 256, 3 * 256 + 3 * plan.count * extra
        h, q, k = torch.arange(6)[:, None, None], torch.arange(tokens)[:, None], torch.arange(keys)
        dense = mask(0, h, q, k).expand(6, tokens, keys)
        tiles = dense.any(0).view(tokens // 128, 128, keys // 128, 128)
        everywhere = dense.all(0).view(tokens // 128, 128, keys // 128, 128).all(3).all(1)
        part, full = structure(blocks.kv_num_blocks, blocks.kv_indices), structure(blocks.full_kv_num_blocks,
                                                                                 blocks.full_kv_indices)
        assert not (part & full).any()
        assert not (full & ~everywhere).any()
        assert (((part | full) == tiles.any(3).any(1)) | part).all()


def structure(count, index):
    count, index = count[0, 0], index[0, 0]
    result = torch.zeros(index.shape, dtype=torch.bool)
    for row in range(len(count)):
        result[row, index[row, : count[row]].long()] = True
    return result


@torch.no_grad()
def test_flex_attention_agrees_with_the_dense_mask():
    shape, state = weights.random()
    from torch.nn.attention.flex_attention import flex_attention

    flex = model.Functions(fast=False)
    flex.flex = flex_attention
    for config in SEGMENTS[:4]:
        a = model.Llama(shape, state, DENSE, torch.float32)(ids_of(256), config, BREAKS)
        b = model.Llama(shape, state, flex, torch.float32)(ids_of(256), config, BREAKS)
        assert (a - b).abs().max() < 1e-4


def test_a_spare_segment_changes_nothing():
    shape, state = weights.random()
    llama = model.Llama(shape, state, DENSE, torch.float32)
    for mode in (True, False):
        llama.train(mode)
        a, b = (llama(ids_of(256), SEGMENTS[0], BREAKS, n) for n in (None, 12))
        assert (a - b).abs().max() < 1e-5


def test_a_training_sequence_has_its_length_and_its_breaks_precede_answers():
    rng = np.random.default_rng(0)
    encode = lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.uint16)
    text = encode("some line of text\n" * 200)
    ends = np.arange(256) == 10
    for _ in range(20):
        ids, loss_weights, breaks = tasks.training_sequence(rng, text, 3000, encode, ends, questions=3)
        assert len(ids) == len(loss_weights) == 3000
        for b in breaks:
            assert loss_weights[b] == tasks.ANSWER_WEIGHT and loss_weights[b - 1] == 0


def test_a_prompt_holds_its_needle_and_its_answer():
    rng = np.random.default_rng(0)
    encode = lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.uint16)
    text = encode("some line of text\n" * 300)
    ids, at, digits, needle = tasks.test_prompt(rng, text, 3000, encode, np.arange(256) == 10, 4)
    answer = bytes(ids[digits].astype(np.uint8)).decode()
    assert len(answer) == 7 and answer in bytes(ids[slice(*needle)].astype(np.uint8)).decode()
    assert at == digits[0] - 1


def test_a_small_model_trains_and_is_evaluated(monkeypatch):
    for name, value in {"TOKENS": 1024, "SEGMENTS": 24, "BATCH": 2, "RATE": 1e-2}.items():
        monkeypatch.setattr(run, name, value)
    rng = np.random.default_rng(0)
    ids = np.tile(rng.integers(0, 97, 64), 256).reshape(-1, 256).astype(np.uint16)
    data = {"mixed": ids, "weights": np.ones(ids.shape, np.float16), "breaks": [[100, 130]] * len(ids),
            "held_out": ids.reshape(-1, 1024)[:2]}
    shape, state = weights.random()
    config, said = SEGMENTS[0], []
    llama = model.Llama(shape, state, DENSE, torch.float32)
    run.train(llama, config, data, True, 8, "cpu", lambda **row: said.append(row))
    assert said[-1]["text"] < said[0]["text"] - 0.5
    with torch.no_grad():
        nats, tokens = run.loss(llama.eval(), config, data, 1024, "cpu")
        assert tokens == 2048 and 0 < nats.mean() < said[0]["text"]
        prompts = {"ids": ids[:4], "break": np.full(4, 240), "needle": np.array([[20, 40]] * 4),
                   "digits": np.tile(np.arange(241, 248), (4, 1))}
        found, recall = run.needles(llama, config, prompts, 4, "cpu")
    assert len(found) == 4 and set(recall) == {0, 1} and 0 <= recall[0].min() <= recall[0].max() <= 1


@pytest.mark.skipif("GGUF" not in os.environ, reason="needs the model")
def test_full_attention_has_the_logits_of_transformers():
    from transformers import AutoModelForCausalLM

    path = os.environ["GGUF"]
    shape, state = weights.load(path)
    theirs = AutoModelForCausalLM.from_pretrained(os.path.dirname(path), gguf_file=os.path.basename(path),
                                                  dtype=torch.float32)
    ids = ids_of(200, 49152, rows=2)
    ours = model.Llama(shape, state, DENSE, torch.float32)
    with torch.no_grad():
        a, b = ours(ids, Config(0)) @ state["embed"].T, theirs(ids).logits
    assert (a - b).abs().max() < 1e-3, (a - b).abs().max()
