"""The contract, second edition, read out loud: one sequence, segment by segment, in f64. Slow; for checks only."""

import numpy as np

from segments import starts


def rms(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def rope(x, positions, theta):
    """x [rows, heads, head_dim]."""
    half = x.shape[-1] // 2
    angle = np.asarray(positions)[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def retrieve(probes, keys, low, high, config):
    """Tokens chosen from [low, high); probes [n, head_dim], keys [tokens, head_dim]; in order of position."""
    if high <= low:
        return []
    score = softmax(probes @ keys[low:high].T * keys.shape[-1] ** -0.5).max(0)
    taken = np.zeros(high - low, bool)
    room = min(config.past_len, high - low)
    while room > taken.sum():
        best = int(np.where(taken, -1, score).argmax())
        width = min(config.window_len, room - int(taken.sum()))
        begin = min(max(best - width // 2, 0), high - low - width)
        end = begin + width
        while taken[begin:best].any():
            begin += 1
        while taken[best:end].any():
            end -= 1
        taken[begin:end] = True
    return [low + int(t) for t in np.flatnonzero(taken)]


def forward(shape, state, ids, config, breaks=()):
    """Logits [tokens, vocabulary] of one sequence."""
    w = {k: v.double().numpy() for k, v in state.items()}
    heads, kv_heads, eps, theta = shape["q_heads"], shape["kv_heads"], shape["eps"], shape["theta"]
    dim, group, length = shape["width"] // heads, heads // kv_heads, len(ids)
    begins = starts(length, breaks, config.segment_len or length)
    layers = [{"k": np.zeros((0, kv_heads, dim)), "v": np.zeros((0, kv_heads, dim)), "q": None}
              for _ in range(shape["layers"])]
    hidden = []
    for begin, end in zip(begins, begins[1:] + [length]):
        n = end - begin
        x = w["embed"][ids[begin:end]]
        for i, pool in enumerate(layers):
            y = rms(x, w[f"{i}.norm1"], eps) @ w[f"{i}.qkv"].T
            q, k, v = np.split(y.reshape(n, -1, dim), [heads, heads + kv_heads], 1)
            prior = min(config.prior_len, begin)
            sinks = min(config.sinks, begin - prior)
            out = np.zeros((n, heads, dim))
            for g in range(kv_heads):
                past = []
                if config.reads(i, kv_heads)[g] and pool["q"] is not None:
                    probes = pool["q"][-config.queries :, g * group : (g + 1) * group].reshape(-1, dim)
                    past = retrieve(probes, pool["k"][:, g], sinks, begin - prior, config)
                rows = list(range(sinks)) + past + list(range(begin - prior, begin))
                position = np.arange(-len(rows), n)
                keys = np.concatenate([pool["k"][rows, g], k[:, g]])
                values = np.concatenate([pool["v"][rows, g], v[:, g]])
                keys = rope(keys[:, None], position, theta)[:, 0]
                for h in range(g * group, (g + 1) * group):
                    scores = rope(q[:, h : h + 1], np.arange(n), theta)[:, 0] @ keys.T * dim**-0.5
                    hide = np.arange(len(rows) + n)[None] > len(rows) + np.arange(n)[:, None]
                    out[:, h] = softmax(np.where(hide, -np.inf, scores)) @ values
            pool["k"], pool["v"], pool["q"] = np.concatenate([pool["k"], k]), np.concatenate([pool["v"], v]), q
            x = x + out.reshape(n, -1) @ w[f"{i}.out"].T
            gate, up = np.split(rms(x, w[f"{i}.norm2"], eps) @ w[f"{i}.gate_up"].T, 2, -1)
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{i}.down"].T
        hidden.append(x)
    return rms(np.concatenate(hidden), w["norm"], eps) @ w["embed"].T
