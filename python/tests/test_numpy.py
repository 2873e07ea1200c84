"""The operation on numpy arrays, against the formulas written out, and by finite differences."""

import pickle
import threading

import numpy as np
import pytest
from plain import cases, forward

import segattn

CASES = cases()


def narrow(case):
    """The case in f32, as both sides read it."""
    is_f64 = {name: getattr(x, "dtype", None) == np.float64 for name, x in case.items()}
    return {name: x.astype(np.float32) if is_f64[name] else x for name, x in case.items()}


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_formulas(name):
    out, lse = segattn.segment_attention(**CASES[name], return_lse=True)
    expected, expected_lse = forward(CASES[name])
    assert out.dtype == lse.dtype == np.float64
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_cpu_is_near_the_formulas(name):
    case = narrow(CASES[name])
    out, lse = segattn.segment_attention(**case, return_lse=True)
    expected, expected_lse = forward(case)
    assert out.dtype == lse.dtype == np.float32
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=1e-5)


def gradients(case, d_out, d_lse):
    out, lse = segattn.segment_attention(**case, return_lse=True)
    q, k, v = (case[name] for name in "qkv")
    others = {name: x for name, x in case.items() if name not in ("q", "k", "v")}
    return segattn.segment_attention_backward(d_out, q, k, v, out, lse, d_lse=d_lse, **others)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_finite_differences(name):
    case, rng = CASES[name], np.random.default_rng(1)
    out, lse = segattn.segment_attention(**case, return_lse=True)
    d_out, d_lse = rng.standard_normal(out.shape), rng.standard_normal(lse.shape)
    d_lse[np.isinf(lse)] = 0

    def loss(**changed):
        out, lse = segattn.segment_attention(**{**case, **changed}, return_lse=True)
        return (out * d_out).sum() + (np.where(np.isinf(lse), 0, lse) * d_lse).sum()

    given = gradients(case, d_out, d_lse)
    step = 1e-5
    for argument in ("q", "k", "v", "prior_k", "prior_v"):
        gradient = getattr(given, argument)
        if argument not in case:
            assert gradient is None
            continue
        assert gradient.shape == case[argument].shape
        for _ in range(3):
            along = rng.standard_normal(gradient.shape)
            ends = [loss(**{argument: case[argument] + sign * step * along}) for sign in (1, -1)]
            assert abs((gradient * along).sum() - (ends[0] - ends[1]) / (2 * step)) < 1e-7
    assert (given.past_gate is None) == ("past_k" not in case)


def test_the_gradient_of_a_gate_is_a_finite_difference():
    # A gate is f32: steps of a power of two are exact, and large.
    case, rng = CASES["past"], np.random.default_rng(2)
    d_out = rng.standard_normal(case["q"].shape)
    given = gradients(case, d_out, None).past_gate
    step = np.float32(2.0**-10)
    for head, gate in enumerate(case["past_gate"]):
        if gate == 0:
            assert given[head] == 0
            continue
        ends = []
        for sign in (1, -1):
            moved = case["past_gate"].copy()
            moved[head] += sign * step
            ends.append((segattn.segment_attention(**{**case, "past_gate": moved}) * d_out).sum())
        assert abs(given[head] - (ends[0] - ends[1]) / (2 * step)) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_cpu_gradients_are_near_those_of_the_reference(name):
    case, rng = narrow(CASES[name]), np.random.default_rng(3)
    d_out = rng.standard_normal(case["q"].shape).astype(np.float32)
    wide = {name: x.astype(np.float64) if getattr(x, "dtype", 0) == np.float32 else x for name, x in case.items()}
    if "past_gate" in case:
        wide["past_gate"] = case["past_gate"]
    expected = gradients(wide, d_out.astype(np.float64), None)
    for got, wanted in zip(gradients(case, d_out, None), expected):
        assert (got is None) == (wanted is None)
        if got is not None:
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5)


def test_strides_change_no_bit():
    case = narrow(CASES["lengths"])
    expected = segattn.segment_attention(**case)
    heads_first = dict(case)
    for name in ("q", "k", "v", "prior_k", "prior_v"):
        heads_first[name] = np.ascontiguousarray(case[name].transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
        assert not heads_first[name].flags.c_contiguous
    kv = np.stack([case["past_k"], case["past_v"]], axis=2)
    heads_first["past_k"], heads_first["past_v"] = kv[:, :, 0], kv[:, :, 1]
    assert np.array_equal(segattn.segment_attention(**heads_first).view(np.int32), expected.view(np.int32))
    copied = {**case, "q": np.asfortranarray(case["q"]), "k": case["k"][:, ::-1][:, ::-1]}
    assert np.array_equal(segattn.segment_attention(**copied).view(np.int32), expected.view(np.int32))


def test_padding_is_never_read():
    case = narrow(CASES["lengths"])
    expected = segattn.segment_attention(**case)
    case["k"][0, 4:], case["v"][0, 4:], case["prior_k"][0], case["q"][0, 4:] = 4 * [np.nan]
    got = segattn.segment_attention(**case)
    assert np.array_equal(got.view(np.int32), expected.view(np.int32))
    assert not got[0, 4:].any()


def test_decoding_is_the_last_row_of_the_segment():
    case = narrow(CASES["prior"])
    whole = segattn.segment_attention(**case)
    last = {**case, "q": case["q"][:, -1:], "query_start": [8, 8]}
    assert np.array_equal(segattn.segment_attention(**last).view(np.int32), whole[:, -1:].view(np.int32))


def test_prior_gradients_can_be_left_out():
    case = CASES["prior"]
    out, lse = segattn.segment_attention(**case, return_lse=True)
    q, k, v = (case[name] for name in "qkv")
    prior = {name: case[name] for name in ("prior_k", "prior_v", "prior_heads")}
    given = segattn.segment_attention_backward(out, q, k, v, out, lse, prior_grad=False, **prior)
    assert given.prior_k is None and given.prior_v is None and given.q.any()


@pytest.mark.parametrize(
    "change, argument, expected, got",
    [
        ({"q": np.zeros((2, 9, 4))}, "q", "4 dimensions [batch, rows, heads, head_dim]", "shape (2, 9, 4)"),
        ({"q": np.zeros((2, 9, 4, 8), np.float16)}, "q", "float32 or float64", "float16"),
        ({"k": np.zeros((2, 9, 2, 8), np.float32)}, "k", "float64 like q", "float32"),
        ({"k": np.zeros((2, 9, 3, 8))}, "q_heads", "a positive multiple of kv_heads = 3", "4"),
        ({"v": np.zeros((2, 8, 2, 8))}, "segment_len", "0 to 8 rows", "9"),
        ({"v": np.zeros((2, 8, 2, 8)), "segment_len": None}, "v", "the 9 rows of k", "8"),
        ({"prior_v": None}, "prior_v", "a tensor, as prior_k is there", "None"),
        ({"prior_heads": [True]}, "prior_heads", "4 flags, one for each query head", "1"),
        ({"past_gate": [1.0, 1.0]}, "past_gate", "q_heads = 4 elements", "2"),
        ({"past_gate": [1.0, -1.0, 1.0, 1.0]}, "past_gate", "a finite number >= 0", "-1"),
        ({"past_len": [7, 1]}, "past_len", "0 to 6 rows", "7"),
        ({"prior_len": [1.0, 1.0]}, "prior_len", "integers", "float64"),
        ({"sink_len": [2**40, 0]}, "sink_len", "numbers of 32 bits", str(2**40)),
        ({"segment_len": [1]}, "segment_len", "batch = 2 elements", "1"),
        ({"softmax_scale": float("inf")}, "scale", "a finite number", "inf"),
    ],
)
def test_a_wrong_argument_is_named(change, argument, expected, got):
    with pytest.raises(segattn.ArgumentError) as caught:
        segattn.segment_attention(**{**CASES["lengths"], **change})
    error = caught.value
    assert (error.argument, error.expected, error.got) == (argument, expected, got)
    assert isinstance(error, ValueError) and isinstance(error, segattn.Error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_head_sizes_of_the_cpu_path():
    q = np.zeros((1, 2, 1, 12), np.float32)
    with pytest.raises(segattn.ArgumentError, match="head_dim: expected multiples of 8 up to 256, got 12"):
        segattn.segment_attention(q, q, q)
    assert segattn.segment_attention(*3 * [q.astype(np.float64)]).shape == q.shape


def test_a_backward_pass_with_wrong_shapes_writes_nothing():
    case = CASES["causal"]
    out, lse = segattn.segment_attention(**case, return_lse=True)
    q, k, v = (case[name] for name in "qkv")
    with pytest.raises(segattn.ArgumentError, match="lse: expected float64 of shape"):
        segattn.segment_attention_backward(out, q, k, v, out, lse[:1])
    with pytest.raises(segattn.ArgumentError, match="d_out: expected float64 of shape"):
        segattn.segment_attention_backward(out[:, 1:], q, k, v, out, lse)


def test_empty_tensors():
    q = np.zeros((0, 5, 2, 8), np.float32)
    out, lse = segattn.segment_attention(q, q, q, return_lse=True)
    assert out.shape == q.shape and lse.shape == (0, 2, 5)


def test_other_threads_run_meanwhile():
    # With the interpreter lock held, the other thread could not count while the call runs.
    q = np.random.default_rng(0).standard_normal((1, 512, 4, 16))
    counted, stop = [0], threading.Event()

    def count():
        while not stop.is_set():
            counted[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    try:
        before = counted[0]
        segattn.segment_attention(q, q, q)
        during = counted[0] - before
    finally:
        stop.set()
        thread.join()
    assert during > 1000, during
