"""Writes the golden files of tests/model/families.rs: tiny random models of every family and switch, with their
log-probabilities and gradients as Transformers computes them in f64 on the CPU.

    python tests/golden/families/make.py            # all
    python tests/golden/families/make.py qwen3      # one

Each folder holds config.json and model.safetensors as Transformers writes them (bf16, so that every device reads the
same numbers), and expected.safetensors: the tokens, the log-probability of each token but the first, and the gradients
of their negative sum. Transformers rounds norms, angles and softmax to f32; all else is f64.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).parent
LENGTH = 40
SHAPE = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
HEAD = {"head_dim": 16}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.25],
    "long_factor": [1.5, 4.0],
}
# Beside the configuration: keys that segattn alone reads.
OWN = {"llama_dynamic": {"rope_length": LENGTH}, "phi3_long": {"rope_length": LENGTH}}
FAMILIES = {
    "llama_bias": ("llama", HEAD | {"attention_bias": True, "mlp_bias": True}),
    "llama_yarn": (
        "llama",
        HEAD
        | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False, "beta_fast": 4.0}},
    ),
    "llama_yarn_factor": ("llama", HEAD | {"rope_parameters": YARN | {"attention_factor": 1.3, "beta_slow": 0.5}}),
    "llama_dynamic": (
        "llama",
        HEAD
        | {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0},
        },
    ),
    "qwen2": ("qwen2", {"hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 1}),
    "qwen3": ("qwen3", HEAD | {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen3_bias": ("qwen3", HEAD | {"attention_bias": True}),
    "mistral": ("mistral", HEAD | {"sliding_window": None}),
    "ministral": ("ministral", HEAD | {"sliding_window": 8, "layer_types": ["full_attention"] * 2}),
    "smollm3": ("smollm3", {"hidden_size": 64, "intermediate_size": 8, "no_rope_layer_interval": 2}),
    "smollm3_bias": (
        "smollm3",
        {
            "hidden_size": 64,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "no_rope_layers": [1],  # without rotation the gradient of keys' biases is 0
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "granite": (
        "granite",
        {
            "hidden_size": 64,
            "intermediate_size": 8,
            "num_hidden_layers": 2,
            "attention_bias": True,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.5,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.4,
        },
    ),
    "phi3": (
        "phi3",
        {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": LONG | {
            "short_factor": [1.0, 1.1, 1.25, 1.5], "long_factor": [1.5, 2.0, 3.0, 4.0]},
         "original_max_position_embeddings": 48},
    ),
    "phi3_long": (
        "phi3",
        {"hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 1, "rope_parameters": LONG | {
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [1.5, 2.0, 2.5, 3.0, 3.5, 4.0]},
         "original_max_position_embeddings": 16},
    ),
    "olmo2": ("olmo2", {"hidden_size": 64, "intermediate_size": 8}),
    "seed_oss": ("seed_oss", HEAD | {"attention_out_bias": True, "attention_dropout": 0.0, "residual_dropout": 0.0}),
}


def values(name, shape):
    """Random values: large enough that every part of the model matters."""
    drawn = torch.randn(shape)
    if name.endswith("norm.weight"):
        return 1 + 0.3 * drawn
    if name.endswith("bias"):
        return 0.5 * drawn
    return drawn * (1.0 if "embed" in name else 1.5) / (1 if "embed" in name else shape[-1] ** 0.5)


def make(name):
    kind, keys = FAMILIES[name]
    torch.manual_seed(sorted(FAMILIES).index(name))
    config = AutoConfig.for_model(kind, **(SHAPE | keys), attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(values(key, parameter.shape).bfloat16().double())
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    for extra in folder.glob("generation_config.json"):
        extra.unlink()
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | OWN.get(name, {}), indent=1, sort_keys=True) + "\n")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    tokens = torch.randint(config.vocab_size, (LENGTH,))
    logits = model(tokens[None]).logits[0, :-1]
    scores = logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    (-scores.sum()).backward()
    held = load_file(folder / "model.safetensors").keys()
    grads = {f"grad.{k}": p.grad.float() for k, p in model.named_parameters() if k in held}
    assert len(grads) == len(held), set(held) ^ {k for k, _ in model.named_parameters()}
    save_file(grads | {"tokens": tokens, "log_probabilities": scores.detach()}, folder / "expected.safetensors")
    print(f"{name}: mean log-probability {scores.mean().item():.4f}, {len(grads)} tensors")


for wanted in sys.argv[1:] or FAMILIES:
    make(wanted)
