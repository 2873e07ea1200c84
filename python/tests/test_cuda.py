"""The operation on a GPU, against the f64 reference on the same rounded numbers. Left out where there is no GPU."""

import pytest
from conftest import optional

import segattn

torch = optional("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# Relative to the norm of the expected numbers: results are rounded to 8 bits (bf16) or 11 bits (f16), and so are
# probabilities and their gradients on the way.
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
GIVEN = ("q", "k", "v", "prior_k", "prior_v", "past_k", "past_v")


def case(dtype, rows=200, dim=64):
    """Arguments on the GPU: lengths on the host, all sources, two query heads a KV head."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"q": (rows, 4), "k": (rows, 2), "v": (rows, 2)}
    for name in "kv":
        shapes[f"prior_{name}"], shapes[f"past_{name}"] = (70, 2), (130, 2)
    made = {name: torch.randn(2, n, heads, dim, generator=generator) for name, (n, heads) in shapes.items()}
    made = {name: x.to("cuda", dtype) for name, x in made.items()}
    lengths = {"segment_len": [rows, rows - 33], "prior_len": [70, 5], "past_len": [[130, 60], [0, 129]]}
    lengths = {name: torch.tensor(x, dtype=torch.int32) for name, x in lengths.items()}
    roles = {"past_gate": torch.tensor([1.0, 0.0, 0.25, 2.0]), "prior_heads": [True, False, True, True]}
    return {**made, **lengths, **roles}


def run(given):
    """out, lse and the gradients of a loss of both."""
    given = dict(given)
    leaves = [name for name in (*GIVEN[:5], "past_gate") if name in given]
    for name in leaves:
        given[name] = given[name].detach().requires_grad_()
    out, lse = segattn.segment_attention(**given, return_lse=True)
    weights = torch.sin(torch.arange(out.numel())).view(out.shape).to(out)
    loss = (out * weights).double().sum() + torch.where(lse.isinf(), 0.0, lse).double().sum()
    grads = torch.autograd.grad(loss, [given[name] for name in leaves])
    return dict(zip(["out", "lse", *leaves], [out.detach(), lse.detach(), *grads]))


def on_cpu(given):
    """The same arguments in f64 on the CPU."""
    wide = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    return {name: x.double() if name in GIVEN else x for name, x in wide.items()}


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_results_and_gradients_are_near_the_reference(dtype, dim):
    given = case(dtype, dim=dim)
    got, expected = run(given), run(on_cpu(given))
    for name, wanted in expected.items():
        there = ~wanted.isinf()
        difference = (got[name].cpu().double() - wanted.double())[there].norm()
        assert difference <= BOUNDS[dtype] * wanted.double()[there].norm(), name


def test_repeated_calls_and_other_streams_have_equal_bits():
    given = case(torch.bfloat16)
    first = run(given)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = run(given)
    torch.cuda.current_stream().wait_stream(stream)
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


def test_lengths_and_gates_on_the_gpu_change_no_bit():
    given = case(torch.bfloat16)
    moved = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    # The host does not read gates on the GPU, so it must be told which heads read the past.
    moved["past_heads"] = [True, False, True, True]
    a, b = (segattn.segment_attention(**arguments, return_lse=True) for arguments in (given, moved))
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_unaligned_tensors_are_copied():
    given = case(torch.bfloat16)
    expected = segattn.segment_attention(**given)
    wide = torch.zeros(2, 200, 4, 65, dtype=torch.bfloat16, device="cuda")
    wide[..., 1:] = given["q"]
    assert torch.equal(segattn.segment_attention(**{**given, "q": wide[..., 1:]}), expected)


def test_compile_has_no_graph_breaks():
    given = case(torch.bfloat16)
    compiled = torch.compile(lambda q: segattn.segment_attention(**{**given, "q": 2 * q}), fullgraph=True)
    assert torch.equal(compiled(given["q"]), segattn.segment_attention(**{**given, "q": 2 * given["q"]}))


def test_types_of_the_gpu():
    q = torch.zeros(1, 2, 1, 64, device="cuda")
    with pytest.raises(segattn.ArgumentError, match="q: expected bfloat16 or float16 on cuda, got float32"):
        segattn.segment_attention(q, q, q)


def test_devices_do_not_mix():
    given = case(torch.bfloat16)
    with pytest.raises(segattn.ArgumentError, match="k: expected a tensor on cuda:0 like q, got cpu"):
        segattn.segment_attention(**{**given, "k": given["k"].cpu()})


def test_generation_scoring_and_training_have_the_same_bits():
    shape = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 128}
    sizes = {"segment_len": 16, "prior_len": 8, "past_len": 8}
    keys = {f"model.shape.{key}": value for key, value in shape.items()}
    trainer = segattn.Trainer(None, {**keys, **{f"model.segment.{k}": n for k, n in sizes.items()}}, device="cuda")
    generator = segattn.Generator(trainer)
    samples = generator.generate([[1, 2, 3], [4] * 20], max_new=40)
    step = trainer.policy_step(samples, [1.0, -1.0])
    assert all((ratios == 1).all() for ratios in step.ratios(samples))
    scored = generator.score([sample.prompt + sample.tokens for sample in samples])
    assert scored[0].tolist() != step.logprobs[0].tolist()
