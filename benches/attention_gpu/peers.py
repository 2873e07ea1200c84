"""Attention of other libraries on the shapes that the bench sends, one JSON line in, one out.

In: {"name", "batch", "heads", "head_dim", "rows", "current", "prior", "past", "past_heads", "backward", "flex"}.
Queries are the last `rows` of `current` tokens. Out: {"name", "flash", "cudnn", "cudnn1", "fa3", "flex"}: seconds or a
reason in words. `cudnn` is PyTorch's call, whose causal mask is aligned to the first key, so that a case is two calls;
`cudnn1` is cuDNN's own interface (package nvidia-cudnn-frontend), aligned to the last key as `flash` and `fa3` are.
Every peer computes the visible pairs of the case, no more: heads that read the past run as a call of their own.
"""

import json
import os
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


def causal_problems(case):
    """The calls of a peer whose causal mask is aligned to the last key: tensors [batch, rows, heads, head_dim]."""
    for heads, front in groups(case):
        q, k, v = tensors(case["batch"], heads, case["head_dim"], case["rows"], front + case["current"])
        yield tuple(x.detach().transpose(1, 2) for x in (q, k, v))


def run_fa3(case):
    import fa3

    library = os.environ.get("SEGATTN_BENCH_FA3")
    if not library:
        return "SEGATTN_BENCH_FA3 is not set"
    total = 0.0
    for q, k, v in causal_problems(case):
        forward, backward = fa3.calls(library, q, k, v)
        forward()
        torch.cuda.synchronize()
        total += seconds(backward if case["backward"] else forward)
    return total


def cudnn_graph(cudnn):
    types = cudnn.data_type
    return cudnn.pygraph(
        io_data_type=types.BFLOAT16, intermediate_data_type=types.FLOAT, compute_data_type=types.FLOAT
    )


def cudnn_run(cudnn, graph, tensors):
    """Builds a graph; the call that executes it on the tensors, which are by their names in the graph."""
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device="cuda")
    return lambda: graph.execute(tensors, workspace)


def run_cudnn_one_call(case):
    import cudnn

    total = 0.0
    for problem in causal_problems(case):
        q, k, v = (x.transpose(1, 2) for x in problem)
        out, d_out = torch.empty_like(q), torch.randn_like(q)
        stats = torch.empty(*q.shape[:3], 1, dtype=torch.float32, device="cuda")
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        mask = {
            "attn_scale": q.shape[3] ** -0.5,
            "diagonal_alignment": cudnn.diagonal_alignment.BOTTOM_RIGHT,
            "diagonal_band_right_bound": 0,
        }

        def written(name, memory, kind):
            name.set_output(True).set_dim(memory.shape).set_stride(memory.stride()).set_data_type(kind)
            return name

        types = cudnn.data_type
        graph = cudnn_graph(cudnn)
        names = [graph.tensor_like(x) for x in (q, k, v)]
        o, s = graph.sdpa(q=names[0], k=names[1], v=names[2], generate_stats=True, **mask)
        written(o, out, types.BFLOAT16)
        written(s, stats, types.FLOAT)
        run = cudnn_run(cudnn, graph, dict(zip(names + [o, s], (q, k, v, out, stats))))
        if case["backward"]:
            run()
            graph = cudnn_graph(cudnn)
            read = (q, k, v, out, d_out, stats)
            names = [graph.tensor_like(x) for x in read]
            results = graph.sdpa_backward(
                q=names[0], k=names[1], v=names[2], o=names[3], dO=names[4], stats=names[5], **mask
            )
            for name, memory in zip(results, gradients):
                written(name, memory, types.BFLOAT16)
            run = cudnn_run(cudnn, graph, dict(zip(names + list(results), read + tuple(gradients))))
        total += seconds(run)
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
        "cudnn1": attempt(run_cudnn_one_call, case),
        "fa3": attempt(run_fa3, case),
        "flex": attempt(run_flex, case) if case["flex"] else "not asked",
    })
