"""The training step of cpu.rs in JAX: same weights, tokens, loss, gradient and update.

    python step_jax.py FOLDER

FOLDER: config.json and model.safetensors as the crate saves them, and bench.json (tokens [batch, length + 1],
tbptt: K or null for no cut, and AdamW's numbers). Prints one JSON line when compiled, then one for each line it
reads from standard input, after one more step: the loss before the update and the seconds it took.

All segments of all sequences run side by side. TBPTT(K) takes K + 1 copies of the forward: copy r reads the prior
tails of copy r - 1, copy 0 reads them as constants, and the loss is that of the last. Their values are equal, so
the compiler merges them into one forward; what remains is one backward each, which is the least that is possible.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np


def load(path):
    """Tensors of an f32 safetensors file by name."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, end = (start + at for at in entry["data_offsets"])
        tensors[name] = jnp.asarray(np.frombuffer(data[first:end], "<f4").reshape(entry["shape"]))
    return tensors


def norm(x, weight, eps):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * weight


def rotate(x, first, theta):
    """RoPE of x [batch, segment, row, head, dim], row r at position first + r."""
    half = x.shape[-1] // 2
    positions = first + np.arange(x.shape[2])
    angles = positions[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = (jnp.asarray(f(angles), jnp.float32)[:, None, :] for f in (np.cos, np.sin))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def tails(x, rows):
    """The last rows of the segment before; nothing before the first."""
    moved = x[:, :-1, -rows:]
    return jnp.pad(moved, ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))


def visible(segments, length, prior):
    """[segment, row, prior | current]"""
    causal = np.tril(np.ones((length, length), bool))
    before = np.ones((segments, length, prior), bool)
    before[0] = False
    return np.concatenate([before, np.broadcast_to(causal, (segments, length, length))], -1)


def attend(q, kv, prior_kv, config):
    """q [batch, segment, row, q head, dim] and keys and values of both sources, before RoPE."""
    theta = config["rope_theta"]
    (k, v), (prior_k, prior_v) = kv, prior_kv
    batch, segments, length, heads, dim = q.shape
    kv_heads, prior = k.shape[3], prior_k.shape[2]
    q = rotate(q, 0, theta).reshape(batch, segments, length, kv_heads, heads // kv_heads, dim)
    k = jnp.concatenate([rotate(prior_k, -prior, theta), rotate(k, 0, theta)], 2)
    v = jnp.concatenate([prior_v, v], 2)
    scores = jnp.einsum("bsigrd,bsjgd->bsgrij", q, k) * dim**-0.5
    mask = visible(segments, length, prior)[:, None, None]
    p = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), -1)
    out = jnp.einsum("bsgrij,bsjgd->bsigrd", p, v)
    return out.reshape(batch, segments, length, heads * dim)


def loss(weights, tokens, config, tbptt):
    segment = config["segment"]
    length, prior = segment["segment_len"], segment["prior_len"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim, eps = config["head_dim"], config["rms_norm_eps"]
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    batch, segments = inputs.shape[0], inputs.shape[1] // length
    table = weights["model.embed_tokens.weight"]
    x = table[inputs].reshape(batch, segments, length, -1)
    copies = [x] * (1 if tbptt is None else tbptt + 1)
    for layer in range(config["num_hidden_layers"]):
        w = {n.split(f"layers.{layer}.")[1]: t for n, t in weights.items() if f"layers.{layer}." in n}
        project = lambda x, name: x @ w[name + ".weight"].T
        split = lambda x, heads: x.reshape(*x.shape[:-1], heads, dim)
        following, kept = [], None
        for r, x in enumerate(copies):
            normed = norm(x, w["input_layernorm.weight"], eps)
            q = split(project(normed, "self_attn.q_proj"), heads)
            kv = [split(project(normed, f"self_attn.{n}_proj"), kv_heads) for n in "kv"]
            source = kv if tbptt is None else kept if r > 0 else jax.lax.stop_gradient(kv)
            kept = kv
            attended = attend(q, kv, [tails(t, prior) for t in source], config)
            mid = x + project(attended, "self_attn.o_proj")
            normed = norm(mid, w["post_attention_layernorm.weight"], eps)
            act = jax.nn.silu(project(normed, "mlp.gate_proj")) * project(normed, "mlp.up_proj")
            following.append(mid + project(act, "mlp.down_proj"))
        copies = following
    head = table if config["tie_word_embeddings"] else weights["lm_head.weight"]
    logits = norm(copies[-1], weights["model.norm.weight"], eps) @ head.T
    scores = jax.nn.log_softmax(logits, -1).reshape(batch, segments * length, -1)
    return -jnp.mean(jnp.take_along_axis(scores, targets[..., None], -1))


@partial(jax.jit, static_argnames=("config", "settings"), donate_argnums=(0, 1, 2))
def step(weights, m, v, count, tokens, config, settings):
    model, s = json.loads(config), json.loads(settings)
    value, grads = jax.value_and_grad(loss)(weights, tokens, model, s["tbptt"])
    size = jnp.sqrt(sum(jnp.sum(g * g) for g in grads.values()))
    clip = jnp.minimum(1.0, s["clip_norm"] / size)
    b1, b2 = s["betas"]
    for name, g in grads.items():
        g = g * clip
        m[name] = b1 * m[name] + (1 - b1) * g
        v[name] = b2 * v[name] + (1 - b2) * g * g
        first, second = m[name] / (1 - b1**count), v[name] / (1 - b2**count)
        decay = s["weight_decay"] if g.ndim > 1 and "embed_tokens" not in name else 0.0
        weights[name] -= s["lr"] * (first / (jnp.sqrt(second) + s["eps"]) + decay * weights[name])
    return value, weights, m, v


def main():
    folder = Path(sys.argv[1])
    config, settings = ((folder / name).read_text() for name in ("config.json", "bench.json"))
    settings = json.loads(settings)
    tokens = jnp.asarray(settings.pop("tokens"), jnp.int32)
    settings = json.dumps(settings)
    weights = load(folder / "model.safetensors")
    zeros = lambda: {name: jnp.zeros_like(w) for name, w in weights.items()}
    m, v = zeros(), zeros()
    # Compiled and run once on copies: the weights are still the first ones then.
    copied = [jax.tree.map(jnp.copy, state) for state in (weights, m, v)]
    jax.block_until_ready(step(*copied, jnp.float32(1), tokens, config, settings))
    print(json.dumps({"version": jax.__version__}), flush=True)
    for count, _ in enumerate(sys.stdin, 1):
        start = time.perf_counter()
        value, weights, m, v = step(weights, m, v, jnp.float32(count), tokens, config, settings)
        jax.block_until_ready(weights)
        print(json.dumps({"loss": float(value), "seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    main()
