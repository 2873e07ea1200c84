"""The operation as docs/contract.md, section 1 writes it, one query row at a time, in f64."""

import numpy as np


def visible(case, batch, head, row):
    """Keys, values and biases that a query row sees: sinks, past, prior, current."""
    group = case["q"].shape[2] // case["k"].shape[2]
    g = head // group

    def rows(name, tensor, default):
        values = case.get(name)
        if values is None:
            return default if tensor is None else tensor.shape[1]
        values = np.asarray(values)
        return int(values[batch, g] if values.ndim == 2 else values[batch])

    keys, values, biases = [], [], []

    def add(k, v, chosen, bias):
        keys.append(case[k][batch, chosen, g].astype(np.float64))
        values.append(case[v][batch, chosen, g].astype(np.float64))
        biases.append(np.full(len(keys[-1]), bias))

    past = case.get("past_k")
    if past is not None:
        end = rows("past_len", past, 0)
        sinks = 0 if case.get("sink_len") is None else rows("sink_len", past, 0)
        add("past_k", "past_v", slice(0, sinks), 0.0)
        gate = 1.0 if case.get("past_gate") is None else float(case["past_gate"][head])
        reads = case.get("past_heads") is None or case["past_heads"][head]
        if gate > 0 and reads:
            add("past_k", "past_v", slice(sinks, end), np.log(gate))
    prior = case.get("prior_k")
    if prior is not None and (case.get("prior_heads") is None or case["prior_heads"][head]):
        add("prior_k", "prior_v", slice(0, rows("prior_len", prior, 0)), 0.0)
    start = 0 if case.get("query_start") is None else int(case["query_start"][batch])
    add("k", "v", slice(0, start + row + 1), 0.0)
    return np.concatenate(keys), np.concatenate(values), np.concatenate(biases), start


def forward(case):
    """`out` and `lse` of a dict of arguments."""
    q = case["q"].astype(np.float64)
    batches, rows, heads, dim = q.shape
    scale = case.get("softmax_scale")
    scale = 1 / np.sqrt(dim) if scale is None else float(np.float32(scale))
    out, lse = np.zeros(q.shape), np.full((batches, heads, rows), -np.inf)
    for b, h, i in np.ndindex(batches, heads, rows):
        k, v, bias, start = visible(case, b, h, i)
        end = case["k"].shape[1] if case.get("segment_len") is None else int(case["segment_len"][b])
        if start + i >= end:
            continue
        scores = scale * (k @ q[b, i, h]) + bias
        most = scores.max()
        lse[b, h, i] = most + np.log(np.exp(scores - most).sum())
        out[b, i, h] = np.exp(scores - lse[b, h, i]) @ v
    return out, lse


def cases():
    """Named arguments of several calls, in f64."""
    rng = np.random.default_rng(7)

    def tensor(*shape):
        return rng.standard_normal(shape)

    def call(batch=2, rows=9, heads=4, kv=2, dim=8, prior=0, past=0, **more):
        case = {"q": tensor(batch, rows, heads, dim)}
        for name in ("k", "v"):
            case[name] = tensor(batch, rows, kv, dim)
            if prior:
                case[f"prior_{name}"] = tensor(batch, prior, kv, dim)
            if past:
                case[f"past_{name}"] = tensor(batch, past, kv, dim)
        return {**case, **more}

    gate = np.array([0.5, 0.0, 2.0, 1.0], np.float32)
    return {
        "causal": call(),
        "prior": call(prior=5, prior_heads=[True, False, True, True]),
        "past": call(past=7, past_gate=gate, sink_len=np.array([[2, 0], [1, 7]])),
        "one row": call(batch=1, rows=1, heads=1, kv=1, prior=1),
        "past heads": call(prior=3, past=4, past_gate=gate, past_heads=[True, True, False, True]),
        "lengths": call(
            prior=5,
            past=6,
            segment_len=np.array([4, 9], np.int32),
            prior_len=[0, 3],
            past_len=[[6, 1], [0, 2]],
            softmax_scale=0.3,
        ),
    }
