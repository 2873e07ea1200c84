"""A Llama of Transformers in segments, against the crate's own model."""

import json

import numpy as np
import pytest
from conftest import optional

import segattn

torch = optional("torch")
optional("transformers")
import segattn.transformers as ours  # noqa: E402

SHAPE = {
    "model.shape.hidden_size": 48,
    "model.shape.intermediate_size": 64,
    "model.shape.num_hidden_layers": 3,
    "model.shape.num_attention_heads": 6,
    "model.shape.num_key_value_heads": 3,
    "model.shape.head_dim": 8,
    "model.shape.vocab_size": 101,
}
READS = [
    [["prior"], ["past"], ["prior", "past"]],
    [["prior", "past"], [], ["past"]],
    [["prior"], ["prior"], ["prior"]],
]
TOKENS = np.random.default_rng(5).integers(0, 101, (2, 90)).tolist()
SIZES = {"segment_len": 16, "prior_len": 8, "head_reads": READS}
WINDOWS = {"past_len": 12, "retrieval": {"queries": 5, "window_len": 6}}
BLOCKS = {"past_len": 8, "retrieval": {"block_len": 4, "probe_len": 8, "probe_window": 4, "probe_stride": 2}}
SEGMENTS = {
    "blocks": {**SIZES, **BLOCKS},
    "windows and sinks": {**SIZES, **WINDOWS, "sink_len": 3},
    "a pool of 8 bits": {**SIZES, **WINDOWS, "pool_bits": 8},
    "a bounded pool": {**SIZES, **WINDOWS, "sink_len": 3, "pool_len": 26},
    "a bounded pool of blocks": {**SIZES, **BLOCKS, "pool_len": 24},
    "a break id": {**SIZES, **WINDOWS, "sink_len": 4, "break_ids": [TOKENS[0][20], TOKENS[1][33]]},
}


@pytest.fixture(params=SEGMENTS)
def folder(request, tmp_path):
    """A model folder with segments, gates other than 1, and weights large enough that attention is not flat."""
    saved = segattn.Trainer(None, SHAPE).save(tmp_path / "run")
    path = tmp_path / "model"
    path.mkdir()
    config = json.loads((tmp_path / "run" / saved / "config.json").read_text())
    config["segment"] = SEGMENTS[request.param]
    (path / "config.json").write_text(json.dumps(config))
    from safetensors.torch import load_file, save_file

    tensors = load_file(f"{saved}/model.safetensors")
    generator = torch.Generator().manual_seed(2)
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            tensors[name] = torch.randn(tensor.shape, generator=generator) * 1.5 / tensor.shape[1] ** 0.5
    for layer in range(2):
        gate = torch.rand(6, generator=generator) * 2
        tensors[f"model.layers.{layer}.self_attn.past_gate"] = gate
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def logprobs(model, tokens, **more):
    ids = torch.tensor(tokens)
    logits = model(ids, **more).logits[:, :-1].log_softmax(-1)
    return logits.gather(2, ids[:, 1:, None])[..., 0]


def test_log_probabilities_are_those_of_the_crate(folder):
    # Not in f32: which rows are retrieved may hang on the last bit, and sums in another order have other bits.
    model = ours.from_pretrained(folder, dtype=torch.float64)
    assert model.config._attn_implementation == "segattn"
    # Sequences with break ids end segments at different places: one at a time.
    for tokens in TOKENS:
        expected = segattn.Generator(folder).score([tokens])[0]
        with torch.no_grad():
            got = logprobs(model, [tokens])[0].numpy()
        # The crate computes in f32, and so do the norms of Transformers.
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-4)
        breaks = [5, 21, 22, 70]
        expected = segattn.Generator(folder).score([tokens], breaks=[breaks])[0]
        with torch.no_grad():
            got = logprobs(model, [tokens], breaks=breaks)[0].numpy()
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-4)


def test_every_source_counts(folder):
    """Without one of them the log-probabilities are far from those of the crate: the test above sees all."""
    expected = segattn.Generator(folder).score([TOKENS[0]])[0]
    segment = json.loads((folder / "config.json").read_text())["segment"]
    for change in [{"prior_len": 0}, {"past_len": 0}, {"sink_len": 0}]:
        if not segment.get(next(iter(change))):
            continue
        model = ours.from_pretrained(folder)
        model.model.forward = model.model.forward.whole
        ours.run_in_segments(model, {**segment, **change})
        with torch.no_grad():
            got = logprobs(model, [TOKENS[0]])[0].numpy()
        assert np.abs(got - expected).max() > 0.02, change


def test_sequences_of_a_batch_do_not_see_each_other(folder):
    model = ours.from_pretrained(folder)
    if "break_ids" in model.config.segment:
        with pytest.raises(segattn.ArgumentError, match="segments end at the same places"):
            model(torch.tensor(TOKENS))
        return
    with torch.no_grad():
        both, alone = logprobs(model, TOKENS), logprobs(model, TOKENS[1:])
    torch.testing.assert_close(both[1], alone[0], rtol=0, atol=1e-5)


def in_f64(norm):
    """Transformers computes norms in f32 whatever the model's type, too coarsely for small differences."""
    norm.forward = lambda x: norm.weight * x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()


def test_gradients_are_those_of_finite_differences(folder):
    # Without retrieved rows, through which no gradient flows.
    model = ours.from_pretrained(folder, dtype=torch.float64)
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            in_f64(module)
    segment = {**model.config.segment, "past_len": 0, "sink_len": 0}
    model.model.forward = model.model.forward.whole
    ours.run_in_segments(model, segment)
    tokens = [TOKENS[0][:50]]
    model.zero_grad()
    logprobs(model, tokens).sum().backward()
    weight = model.model.layers[0].self_attn.k_proj.weight
    along = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slope, step = (weight.grad * along).sum(), 1e-6
    with torch.no_grad():
        ends = []
        for sign in (1, -2):
            weight += sign * step * along
            ends.append(logprobs(model, tokens).sum())
    difference = (ends[0] - ends[1]) / (2 * step)
    assert abs(slope - difference) < 1e-6 * (1 + abs(difference)), (slope, difference)


def test_gates_learn_and_the_state_can_be_detached(folder):
    model = ours.from_pretrained(folder)
    whole = logprobs(model, [TOKENS[0]])
    whole.sum().backward()
    attention = model.model.layers[0].self_attn
    assert attention.past_gate.grad.abs().max() > 0
    gradient = attention.k_proj.weight.grad.clone()
    model.zero_grad()
    segment = model.config.segment
    model.model.forward = model.model.forward.whole
    ours.run_in_segments(model, segment, detach_state=True)
    detached = logprobs(model, [TOKENS[0]])
    assert torch.equal(whole, detached)
    detached.sum().backward()
    assert (attention.k_proj.weight.grad - gradient).abs().max() > 1e-3


def test_what_segments_have_not_is_refused(folder):
    model, ids = ours.from_pretrained(folder), torch.tensor(TOKENS[:1])
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    with pytest.raises(segattn.ArgumentError, match="attention_mask: expected ones"):
        model(ids, attention_mask=mask)
    with pytest.raises(segattn.ArgumentError, match="position_ids: expected None"):
        model(ids, position_ids=torch.arange(90)[None])
    with pytest.raises(segattn.ArgumentError, match="breaks"):
        model(ids, breaks=[9, 3])
