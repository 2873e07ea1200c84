"""Writes the golden files of tests/adapters: adapters of the tiny models in tests/golden/families, as PEFT writes them,
with the log-probabilities and gradients that PEFT and Transformers compute in f64 on the CPU.

    python tests/golden/lora/make.py

Each folder holds adapter_config.json and adapter_model.safetensors (bf16, so that every device reads the same numbers),
and expected.safetensors: the tokens, the log-probability of each token but the first, and the gradients of their
negative sum for the adapters' tensors, under the names of the file. The folder's name begins with the model's.
"""

import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
MODELS = HERE.parent / "families"
ALL = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
CASES = {
    "qwen3": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "phi3": {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": ALL},
    "olmo2": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.1},
    "granite": {"r": 1, "lora_alpha": 0.5, "target_modules": ["k_proj", "up_proj"], "layers_to_transform": [1]},
    "llama_bias": {"r": 2, "lora_alpha": 2, "target_modules": r".*self_attn\.(q|o)_proj"},
}


def base(name):
    return AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float64, attn_implementation="eager")


def make(name):
    torch.manual_seed(sorted(CASES).index(name))
    model = get_peft_model(base(name), LoraConfig(task_type="CAUSAL_LM", **CASES[name])).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_((torch.randn(parameter.shape) / parameter.shape[1] ** 0.5).bfloat16().double())
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({k: v.bfloat16() for k, v in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "README.md").unlink(missing_ok=True)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = name
    settings["target_modules"] = sorted(v) if isinstance(v := settings["target_modules"], list) else v
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
    model = PeftModel.from_pretrained(base(name), folder, is_trainable=True).eval()
    tokens = load_file(MODELS / name / "expected.safetensors")["tokens"]
    scores = model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    (-scores.sum()).backward()
    named = {k.replace(".default.", "."): p.grad.float() for k, p in model.named_parameters() if "lora_" in k}
    assert named.keys() == tensors.keys(), named.keys() ^ tensors.keys()
    grads = {f"grad.{k}": g.contiguous() for k, g in named.items()}
    save_file(grads | {"tokens": tokens, "log_probabilities": scores.detach()}, folder / "expected.safetensors")
    print(f"{name}: mean log-probability {scores.mean().item():.4f}, {len(grads)} tensors")


for case in CASES:
    make(case)
