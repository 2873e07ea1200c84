"""SmolLM2 from its GGUF: f32 tensors by name, the rows of q and k in the order of "rotate half"."""

import numpy as np
import torch


def load(path):
    import gguf

    reader = gguf.GGUFReader(path)

    def number(key):
        return reader.fields[key].contents()

    shape = {"layers": number("llama.block_count"), "width": number("llama.embedding_length"),
             "q_heads": number("llama.attention.head_count"), "kv_heads": number("llama.attention.head_count_kv"),
             "theta": float(number("llama.rope.freq_base")),
             "eps": float(number("llama.attention.layer_norm_rms_epsilon"))}
    raw = {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}

    def tensor(name):
        return torch.from_numpy(np.ascontiguousarray(raw[name]))

    def unpermuted(name, heads):  # GGUF keeps the two halves of a head interleaved
        w = tensor(name)
        return w.view(heads, -1, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)

    state = {"embed": tensor("token_embd.weight"), "norm": tensor("output_norm.weight")}
    for i in range(shape["layers"]):
        b = f"blk.{i}."
        q, k = unpermuted(b + "attn_q.weight", shape["q_heads"]), unpermuted(b + "attn_k.weight", shape["kv_heads"])
        state[f"{i}.norm1"] = tensor(b + "attn_norm.weight")
        state[f"{i}.qkv"] = torch.cat([q, k, tensor(b + "attn_v.weight")])
        state[f"{i}.out"] = tensor(b + "attn_output.weight")
        state[f"{i}.norm2"] = tensor(b + "ffn_norm.weight")
        state[f"{i}.gate_up"] = torch.cat([tensor(b + "ffn_gate.weight"), tensor(b + "ffn_up.weight")])
        state[f"{i}.down"] = tensor(b + "ffn_down.weight")
    return shape, state


def random(layers=2, width=48, q_heads=6, kv_heads=3, inner=64, vocabulary=97, seed=0):
    """A small random model of the same form, for checks."""
    generator = torch.Generator().manual_seed(seed)
    head = width // q_heads
    shape = {"layers": layers, "width": width, "q_heads": q_heads, "kv_heads": kv_heads, "theta": 1e4, "eps": 1e-5}

    def normal(*size):
        return torch.randn(size, generator=generator) * 1.5 / size[-1] ** 0.5

    state = {"embed": normal(vocabulary, width) * 4, "norm": torch.ones(width)}
    for i in range(layers):
        state |= {f"{i}.norm1": torch.ones(width), f"{i}.qkv": normal(width + 2 * kv_heads * head, width) * 2,
                  f"{i}.out": normal(width, width), f"{i}.norm2": torch.ones(width),
                  f"{i}.gate_up": normal(2 * inner, width), f"{i}.down": normal(width, inner)}
    return shape, state
