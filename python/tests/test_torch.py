"""The operation as an op of PyTorch: its registration, its gradients, and against attention in plain PyTorch."""

from pathlib import Path

import numpy as np
import pytest
from conftest import optional
from plain import cases

import segattn

torch = optional("torch")
CASES = cases()
FLOATS = ("q", "k", "v", "prior_k", "prior_v", "past_k", "past_v")


def tensors(case, dtype=torch.float64, grad=False):
    """The case with tensors instead of arrays; those with a gradient require one."""
    made = {}
    for name, value in case.items():
        if name in FLOATS:
            made[name] = torch.tensor(value, dtype=dtype, requires_grad=grad and not name.startswith("past"))
        elif name == "past_gate":
            made[name] = torch.tensor(value, requires_grad=grad)
        elif isinstance(value, np.ndarray):
            made[name] = torch.tensor(value)
        else:
            made[name] = value
    return made


def op_arguments(case):
    """The arguments of the op itself, in its order."""
    heads = case["q"].shape[2]
    names = (*FLOATS, "past_gate", "segment_len", "prior_len", "past_len", "sink_len", "query_start")
    values = [case.get(name) for name in names]
    values = [torch.tensor(value) if isinstance(value, list) else value for value in values]
    flags = [case.get(name) or [True] * heads for name in ("past_heads", "prior_heads")]
    return *values, *flags, case.get("softmax_scale")


def plain(q, k, v, prior_k=None, prior_v=None, past_k=None, past_v=None, past_gate=None, past_heads=None,
          prior_heads=None, segment_len=None, prior_len=None, past_len=None, sink_len=None, softmax_scale=None):
    """The operation by a mask over all keys and PyTorch's softmax."""
    batch, rows, heads, dim = q.shape
    group = heads // k.shape[2]
    ones = [True] * heads

    def at(count):
        return torch.arange(count)

    def lengths(given, default):
        given = torch.full((batch,), default) if given is None else torch.as_tensor(given)
        given = given[:, None].expand(-1, k.shape[2]) if given.ndim == 1 else given
        return given.repeat_interleave(group, 1)[:, :, None, None]

    valid = at(rows)[None, None, :, None] < lengths(segment_len, rows)
    keys, values, biases = [k], [v], [torch.where(at(rows)[None, :] <= at(rows)[:, None], 0.0, -torch.inf)]
    biases[0] = biases[0].expand(batch, heads, rows, rows)
    if prior_k is not None:
        count = prior_k.shape[1]
        seen = (at(count) < lengths(prior_len, count)) & torch.tensor(prior_heads or ones)[None, :, None, None]
        keys.append(prior_k)
        values.append(prior_v)
        biases.append(torch.where(seen, 0.0, -torch.inf).expand(batch, heads, rows, count))
    if past_k is not None:
        count = past_k.shape[1]
        gate = torch.ones(heads) if past_gate is None else past_gate
        gate = torch.where(torch.tensor(past_heads or ones), gate, 0.0)
        is_sink = at(count) < lengths(sink_len, 0)
        weight = torch.where(is_sink, 1.0, gate[None, :, None, None])
        weight = torch.where(at(count) < lengths(past_len, count), weight, 0.0).to(q.dtype)
        bias = torch.where(weight > 0, torch.where(weight > 0, weight, 1.0).log(), -torch.inf)
        keys.append(past_k)
        values.append(past_v)
        biases.append(bias.expand(batch, heads, rows, count))

    def join(parts):
        return torch.cat([part.transpose(1, 2) for part in parts], 2).repeat_interleave(group, 1)

    keys, values = join(keys), join(values)
    scale = dim**-0.5 if softmax_scale is None else float(np.float32(softmax_scale))
    scores = scale * q.transpose(1, 2) @ keys.transpose(2, 3) + torch.cat(biases, 3).to(q.dtype)
    out = torch.where(valid, scores.softmax(3) @ values, 0.0)
    lse = torch.where(valid[..., 0], scores.logsumexp(3), -torch.inf)
    return out.transpose(1, 2), lse


def loss_of(out, lse):
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (out, lse)]
    return (out * weights[0]).sum() + (torch.where(lse.isinf(), 0.0, lse) * weights[1]).sum()


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_those_of_plain_pytorch(name):
    ours, theirs = tensors(CASES[name], grad=True), tensors(CASES[name], grad=True)
    got = segattn.segment_attention(**ours, return_lse=True)
    expected = plain(**theirs)
    for x, y in zip(got, expected):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
    loss_of(*got).backward()
    loss_of(*expected).backward()
    for argument, tensor in ours.items():
        if getattr(tensor, "requires_grad", False):
            # The gate is f32, and so is its gradient.
            bound = 1e-5 if argument == "past_gate" else 1e-11
            assert (tensor.grad - theirs[argument].grad).abs().max() < bound, argument


@pytest.mark.parametrize("name", CASES)
def test_f32_has_the_bits_of_numpy(name):
    case = tensors(CASES[name], torch.float32)
    arrays = {n: x.numpy() if isinstance(x, torch.Tensor) else x for n, x in case.items()}
    both = [segattn.segment_attention(**given, return_lse=True) for given in (case, arrays)]
    for x, y in zip(*both):
        assert x.numpy().tobytes() == y.tobytes()


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name):
    case = tensors(CASES[name])
    given = [n for n in ("q", "k", "v", "prior_k", "prior_v") if n in case]

    def run(*values):
        out, lse = segattn.segment_attention(**{**case, **dict(zip(given, values))}, return_lse=True)
        return out, torch.where(lse.isinf(), 0.0, lse)

    values = [case[n].clone().requires_grad_() for n in given]
    assert torch.autograd.gradcheck(run, values, fast_mode=True)


@pytest.mark.parametrize("name, dtype", [("past heads", torch.float32), ("lengths", torch.float64)])
def test_opcheck(name, dtype):
    forward, backward = torch.ops.segattn.forward.default, torch.ops.segattn.backward.default
    torch.library.opcheck(forward, op_arguments(tensors(CASES[name], dtype, grad=True)))
    arguments = op_arguments(tensors(CASES[name], dtype))
    out, lse = forward(*arguments)
    torch.library.opcheck(backward, (out, lse, torch.ones_like(out), None, True, *arguments))


def test_compile_has_no_graph_breaks():
    case = tensors(CASES["past heads"], torch.float32, grad=True)

    def run(q, k, v, prior_k, prior_v, past_k, past_v, past_gate):
        flags = {"past_heads": case["past_heads"]}
        more = dict(prior_k=prior_k, prior_v=prior_v, past_k=past_k, past_v=past_v, past_gate=past_gate, **flags)
        out, lse = segattn.segment_attention(2 * q, k, v, return_lse=True, **more)
        return out.square().sum() + lse.sum()

    values = [case[name] for name in (*FLOATS, "past_gate")]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    leaves = [x for x in values if x.requires_grad]
    results = [(loss, *torch.autograd.grad(loss, leaves)) for loss in (run(*values), compiled(*values))]
    for x, y in zip(*results):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_only_what_needs_a_gradient_gets_one():
    case = tensors(CASES["past"], grad=True)
    for name in ("k", "v", "past_gate"):
        case[name] = case[name].detach()
    segattn.segment_attention(**case).sum().backward()
    assert case["q"].grad is not None and case["k"].grad is None


def test_a_loss_of_the_lse_alone():
    case, other = tensors(CASES["prior"], grad=True), tensors(CASES["prior"], grad=True)
    segattn.segment_attention(**case, return_lse=True)[1].sum().backward()
    plain(**other)[1].sum().backward()
    torch.testing.assert_close(case["q"].grad, other["q"].grad, rtol=0, atol=1e-12)
    assert not case["v"].grad.any()


def test_strides_are_read_in_place_and_change_no_bit():
    case = tensors(CASES["prior"], torch.float32)
    expected = segattn.segment_attention(**case)
    kv = torch.stack([case["k"], case["v"]], 2)
    moved = {**case, "k": kv[:, :, 0], "v": kv[:, :, 1], "q": case["q"].transpose(1, 2).contiguous().transpose(1, 2)}
    assert torch.equal(segattn.segment_attention(**moved), expected)
    # Its last dimension is not contiguous: it is copied.
    moved["q"] = case["q"].transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(segattn.segment_attention(**moved), expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(2, 9, 4, 8, dtype=torch.bfloat16)}, "k: expected torch.bfloat16 like q"),
        ({"k": torch.zeros(2, 9, 3, 8, dtype=torch.float64)}, "q_heads: expected a positive multiple"),
        ({"q": torch.zeros(2, 9, 8, dtype=torch.float64)}, "expected 4 dimensions"),
        ({"v": None}, "v: expected"),
        ({"k": np.zeros((2, 9, 2, 8))}, "k: expected a tensor like q, got ndarray"),
        ({"prior_heads": [True]}, "prior_heads: expected 4 flags"),
        ({"past_len": [9, 0]}, "past_len.0.: expected 0 to 6 rows, got 9"),
        ({"prior_len": torch.ones(2)}, "prior_len: expected integers, got torch.float32"),
    ],
)
def test_a_wrong_argument_is_named(change, message):
    with pytest.raises(segattn.ArgumentError, match=message):
        segattn.segment_attention(**{**tensors(CASES["lengths"]), **change})


def test_types_of_the_cpu():
    q = torch.zeros(1, 2, 1, 8, dtype=torch.bfloat16)
    with pytest.raises(segattn.ArgumentError, match="q: expected float32 or float64 on cpu, got bfloat16"):
        segattn.segment_attention(q, q, q)


def test_a_backward_pass_of_decoding_is_refused():
    case = tensors(CASES["causal"], grad=True)
    out = segattn.segment_attention(case["q"][:, -1:], case["k"], case["v"], query_start=[8, 8])
    with pytest.raises(segattn.ArgumentError, match="query_start.0.: expected 0 in a backward pass, got 8"):
        out.sum().backward()


def test_the_readme_s_packed_rows_have_the_results_of_each_sequence_alone():
    text = (Path(__file__).parent.parent / "README.md").read_text()
    [block] = [block for block in text.split("```") if "cu_seqlens.diff()" in block]
    ends = [0, 5, 6, 18, 27]
    q, k, v = (torch.randn(ends[-1], heads, 8, requires_grad=True) for heads in (4, 2, 2))
    names = {"torch": torch, "segattn": segattn, "q": q, "k": k, "v": v, "cu_seqlens": torch.tensor(ends)}
    exec(block.removeprefix("python"), names)
    out = names["out"]
    assert out.shape == q.shape
    for begin, end in zip(ends, ends[1:]):
        alone = segattn.segment_attention(*(x[None, begin:end] for x in (q, k, v)))
        assert torch.equal(out[begin:end], alone[0])
    for grad, x in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v)):
        assert grad.shape == x.shape and grad.abs().sum() > 0
