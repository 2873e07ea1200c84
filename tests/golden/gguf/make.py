"""Makes the golden files of tests/cli/convert_gguf.rs: random blocks of every quantisation with their values by the
package gguf, and a tiny Llama as GGUF with the log-probabilities of Transformers.

    pip install gguf torch transformers safetensors && python make.py
"""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent


def blocks():
    """Two random blocks a type; scales and minimums are small finite numbers."""
    random = np.random.default_rng(7)
    halves = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2],
              "Q6_K": [208]}
    rows = {}
    for name, places in halves.items():
        kind = gguf.GGMLQuantizationType[name]
        numbers, size = gguf.GGML_QUANT_SIZES[kind]
        data = random.integers(0, 256, (2, size), dtype=np.uint8)
        for place in places:
            scale = (random.uniform(0.01, 0.1, 2) * [1, -1]).astype(np.float16)
            data[:, place : place + 2] = scale.view(np.uint8).reshape(2, 2)
        values = gguf.quants.dequantize(data.reshape(-1), kind).reshape(-1)
        assert values.shape == (2 * numbers,)
        rows[name] = {"bytes": data.reshape(-1).tolist(), "values": [float(x) for x in values]}
    (HERE / "blocks.json").write_text(json.dumps(rows) + "\n")


def permuted(weight, heads):
    """GGUF's order of the rows of q and k: the two dimensions that RoPE rotates side by side."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def tiny():
    torch.manual_seed(3)
    config = LlamaConfig(vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2,
                         max_position_embeddings=128, rope_theta=50000.0, rms_norm_eps=1e-5,
                         tie_word_embeddings=False, bos_token_id=256, eos_token_id=257)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4).add_(torch.randn_like(parameter) * 0.02)
            parameter.copy_(parameter.half().float())
    writer = gguf.GGUFWriter(HERE / "tiny.gguf", "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(50000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(264)
    # Bytes in the letters of byte-level BPE, then a merge, control and user tokens.
    letters = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    of_byte = {b: chr(b) for b in letters}
    for n, b in enumerate(b for b in range(256) if b not in letters):
        of_byte[b] = chr(256 + n)
    tokens = [of_byte[b] for b in range(256)] + ["<s>", "</s>", "th", "the", "\u0120the", "<|user|>", "<think>", "er"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 3, 1, 1, 1, 3, 4, 1])
    writer.add_token_merges(["t h", "th e", "\u0120 the", "e r"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{% for m in messages %}<|user|>{{ m.content }}{% endfor %}")
    names = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
             "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].astype(np.float16))
    for layer in range(2):
        for ours, theirs in names.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                weight = permuted(weight, {"attn_q": 4, "attn_k": 2}[theirs])
            kind = np.float32 if weight.ndim == 1 else np.float16
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", weight.astype(kind))
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    writer.add_tensor("output.weight", state["lm_head.weight"].astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ids = [256, 3, 77, 12, 200, 5, 260, 31, 90, 4, 263, 8]
    with torch.no_grad():
        logits = model.double()(torch.tensor([ids])).logits[0].log_softmax(-1)
    logprobs = [logits[i, token].item() for i, token in enumerate(ids[1:])]
    (HERE / "tiny.json").write_text(json.dumps({"ids": ids, "logprobs": logprobs}) + "\n")


blocks()
tiny()
