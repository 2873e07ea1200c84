"""How fast the operation is on a GPU through PyTorch, against PyTorch's own ways to the same result.

    python examples/speed.py [--plot FILE] [--seconds SECONDS]

16,384 rows of 32 query heads and 8 KV heads of 128 elements in bfloat16, cut into segments. Each query reads its
segment up to itself and all rows of a prior as long as the segment. Peers get both as one tensor of keys: PyTorch's
scaled_dot_product_attention with a mask, and its FlexAttention, compiled, with a block mask. Times are of calls in
turns, the median, by CUDA events; a backward pass is the time of both passes less that of the forward pass. Before that
the time that the host takes for a call. The plot needs matplotlib.
"""

import argparse
import statistics
import time

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import segattn

ROWS, Q_HEADS, KV_HEADS, DIM = 16384, 32, 8, 128
SEGMENTS = (512, 1024, 2048, 4096, 8192)


def inputs(segment):
    """q; k and v of the segment; k and v of the prior: [batch, rows, heads, head_dim]."""
    batch = ROWS // segment
    options = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    return [torch.randn(batch, segment, heads, DIM, **options) for heads in (Q_HEADS, *4 * [KV_HEADS])]


def ours(q, k, v, prior_k, prior_v):
    return segattn.segment_attention(q, k, v, prior_k=prior_k, prior_v=prior_v)


def joined(q, k, v, prior_k, prior_v):
    """[batch, heads, rows, head_dim], the prior's rows in front."""
    k, v = torch.cat([prior_k, k], 1), torch.cat([prior_v, v], 1)
    return [x.transpose(1, 2) for x in (q, k, v)]


def peers(segment):
    """Other functions of the same tensors, by name."""
    rows = torch.arange(segment, device="cuda")
    mask = torch.arange(2 * segment, device="cuda") <= segment + rows[:, None]

    def masked(*given):
        q, k, v = joined(*given)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    def visible(b, h, row, column):
        return column <= segment + row

    # Else it stops to compile after some shapes.
    torch._dynamo.reset()
    blocks = create_block_mask(visible, None, None, segment, 2 * segment, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)

    def flex(*given):
        q, k, v = joined(*given)
        return compiled(q, k, v, block_mask=blocks, enable_gqa=True).transpose(1, 2)

    return {"FlexAttention, compiled": flex, "scaled_dot_product_attention, mask": masked}


def both(function, given):
    out = function(*given)
    return torch.autograd.grad(out, given, torch.ones_like(out))


def milliseconds(calls, budget):
    """The median time of each call, all in turns for `budget` seconds."""
    for call in calls:
        call()
        call()
    torch.cuda.synchronize()
    times, until = [[] for _ in calls], time.monotonic() + budget
    while time.monotonic() < until or len(times[0]) < 3:
        for call, each in zip(calls, times):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            call()
            events[1].record()
            torch.cuda.synchronize()
            each.append(events[0].elapsed_time(events[1]))
    return [statistics.median(each) for each in times]


def measured(segment, budget):
    """By name: TFLOP/s of the forward pass and of the backward pass."""
    given, functions = inputs(segment), {"segattn": ours, **peers(segment)}
    expected = ours(*given).float()
    for name, function in functions.items():
        difference = (function(*given).float() - expected).norm() / expected.norm()
        assert difference < 1e-2, f"{name} computes something else: {difference}"
    with torch.no_grad():
        forward = milliseconds([lambda f=f: f(*given) for f in functions.values()], budget)
    whole = milliseconds([lambda f=f: both(f, given) for f in functions.values()], budget)
    pairs = ROWS // segment * Q_HEADS * (segment * segment + segment * (segment + 1) / 2)
    operations = 4 * DIM * pairs
    return {
        name: (operations / a / 1e9, 2.5 * operations / (b - a) / 1e9)
        for name, a, b in zip(functions, forward, whole)
    }


def host_microseconds(calls=300):
    """What a call costs the host, for a problem that the GPU has done before the next call comes."""
    q = torch.randn(1, 64, Q_HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, 64, KV_HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    mine = [lambda: segattn.segment_attention(q, k, k)]
    theirs = [x.transpose(1, 2) for x in (q, k, k)]
    mine.append(lambda: scaled_dot_product_attention(*theirs, is_causal=True, enable_gqa=True))
    taken = []
    for call in mine:
        call()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        taken.append(1e6 * (time.perf_counter() - started) / calls)
        torch.cuda.synchronize()
    return taken


def plot(results, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # The same bytes for the same numbers.
    pyplot.rcParams.update({"svg.hashsalt": "segattn", "svg.fonttype": "none", "font.size": 9})
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
    for axis, which, title in zip(axes, range(2), ("forward", "backward")):
        for name in next(iter(results.values())):
            axis.plot(list(results), [row[name][which] for row in results.values()], marker="o", label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(results), [f"{segment:,}" for segment in results], minor=False)
        axis.set_title(title)
        axis.set_xlabel("rows of a segment, and of its prior")
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("TFLOP/s of visible pairs")
    axes[1].legend(fontsize=8, loc="lower right")
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", metavar="FILE", help="writes an SVG")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each measurement")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}; TFLOP/s of visible pairs")
    mine, theirs = host_microseconds()
    print(f"host time of a call: segment_attention {mine:.1f} us, scaled_dot_product_attention {theirs:.1f} us")
    results = {}
    for segment in SEGMENTS:
        results[segment] = measured(segment, options.seconds)
        for name, (forward, backward) in results[segment].items():
            print(f"segment {segment:5}  {name:35} forward {forward:6.1f}  backward {backward:6.1f}", flush=True)
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
