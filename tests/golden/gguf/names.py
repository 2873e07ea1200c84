"""Writes names.json for tests/model/convert_families.rs: the names that the package gguf gives to the tensors of a
layer, by architecture.

    pip install gguf && python tests/golden/gguf/names.py
"""

import json
from pathlib import Path

import gguf

STEMS = ["input_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"]
STEMS += [f"self_attn.{x}_proj" for x in ("q", "k", "v", "o", "qkv")] + [f"self_attn.{x}_norm" for x in "qk"]
STEMS += [f"mlp.{x}_proj" for x in ("gate", "up", "down", "gate_up")]


def names(architecture):
    known = gguf.get_tensor_name_map(architecture, 1)
    held = {gguf.TENSOR_NAMES[tensor].format(bid=0) for tensor in gguf.MODEL_TENSORS[architecture]}
    found = {stem: known.get_name(f"model.layers.0.{stem}") for stem in STEMS}
    return {stem: name.removeprefix("blk.0.") for stem, name in found.items() if name in held}


wanted = ["LLAMA", "QWEN2", "QWEN3", "GRANITE", "PHI3", "OLMO2", "SMOLLM3"]
architectures = [gguf.MODEL_ARCH[name] for name in wanted]
table = {gguf.MODEL_ARCH_NAMES[a]: names(a) for a in architectures}
(Path(__file__).parent / "names.json").write_text(json.dumps(table, indent=1) + "\n")
