"""Attention of PyTorch on the shapes that the bench sends, one JSON line in, one out.

In: {"name", "batch", "heads", "head_dim", "rows", "current", "prior", "past", "past_heads", "backward", "flex"}.
Queries are the last `rows` of `current` tokens. Out: {"name", "flash", "cudnn", "flex"}: seconds or a reason in words.
Every peer computes the visible pairs of the case, no more: heads that read the past run as a call of their own.
"""

import json
import sys


def reply(value):
    print(json.dumps(value), flush=True)


try:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError as error:
    reply({"missing": f"PyTorch: {error}"})
    sys.exit(0)
if not torch.cuda.is_available():
    reply({"missing": "PyTorch has no CUDA device"})
    sys.exit(0)

ATEN = torch.ops.aten


def seconds(run, repeats=5):
    """The shortest of several runs, each at least 10 ms long, by device events."""
    for _ in range(2):
        run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def measure(count):
        begin.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / count

    count = max(1, min(200, int(0.01 / measure(1))))
    return min(measure(count) for _ in range(repeats))


def tensors(batch, heads, head_dim, rows, keys):
    def make(length):
        shape = (batch, length, heads, head_dim)
        x = torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        return x.requires_grad_()

    return make(rows), make(keys), make(keys)


def timed(attend, q, k, v, backward):
    if not backward:
        with torch.no_grad():
            return seconds(lambda: attend(q, k, v))
    out = attend(q, k, v)
    d_out = torch.randn_like(out)
    return seconds(lambda: torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True))


def flash(q, k, v):
    # FlashAttention-2; causal is aligned at the lower right, so keys in front are seen by every query.
    return ATEN._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]


def cudnn(causal):
    def attend(q, k, v):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return attend


def groups(case):
    """(heads, keys in front of the current ones) of each call."""
    past_heads = case["past_heads"] if case["past"] else 0
    both = [(past_heads, case["past"] + case["prior"]), (case["heads"] - past_heads, case["prior"])]
    return [(heads, front) for heads, front in both if heads]


def run_flash(case):
    shape = case["batch"], case["head_dim"], case["rows"]
    total = 0.0
    for heads, front in groups(case):
        q, k, v = tensors(shape[0], heads, shape[1], shape[2], front + case["current"])
        total += timed(flash, q, k, v, case["backward"])
    return total


def run_cudnn(case):
    # Its causal mask is aligned at the upper left: the square of current keys and the keys in front are two calls,
    # whose results are not even put together.
    total = 0.0
    for heads, front in groups(case):
        whole = case["rows"] == case["current"]
        parts = [(case["current"], True), (front, False)] if whole else [(front + case["current"], False)]
        for keys, causal in parts:
            if keys:
                q, k, v = tensors(case["batch"], heads, case["head_dim"], case["rows"], keys)
                total += timed(cudnn(causal), q, k, v, case["backward"])
    return total


def run_flex(case):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    rows, keys = case["rows"], case["past"] + case["prior"] + case["current"]
    past, past_heads = case["past"], case["past_heads"]
    shift = keys - rows

    def visible(b, h, i, j):
        return (i + shift >= j) & ((j >= past) | (h < past_heads))

    by_head = case["heads"] if past and past_heads < case["heads"] else None
    mask = create_block_mask(visible, None, by_head, rows, keys, device="cuda")
    q, k, v = tensors(case["batch"], case["heads"], case["head_dim"], rows, keys)
    return timed(lambda q, k, v: compiled(q, k, v, block_mask=mask), q, k, v, case["backward"])


def peak():
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / seconds(lambda: a @ b)


def attempt(run, case):
    try:
        return run(case)
    except Exception as error:  # A peer that cannot do a shape must not end the bench.
        return f"{type(error).__name__}: {error}".splitlines()[0][:120]
    finally:
        torch.cuda.empty_cache()


reply({"torch": torch.__version__, "cudnn": torch.backends.cudnn.version(), "peak": peak()})
for line in sys.stdin:
    case = json.loads(line)
    torch._dynamo.reset()
    reply({
        "name": case["name"],
        "flash": attempt(run_flash, case),
        "cudnn": attempt(run_cudnn, case),
        "flex": attempt(run_flex, case) if case["flex"] else "not asked",
    })
