"""Loads adapters with PEFT and prints, a line each, the log-probability of each token but the first.

    python tests/golden/lora/load.py MODEL ADAPTER 1,2,3 MODEL ADAPTER 4,5,6 ...

Fails where tensors are missing, unexpected or of another shape.
"""

import json
import sys
import warnings

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

for folder, adapter, tokens in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3]):
    tokens = torch.tensor([int(token) for token in tokens.split(",")])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        scores = model(tokens[None]).logits[0, :-1].log_softmax(-1)
    print(json.dumps(scores.gather(1, tokens[1:, None])[:, 0].tolist()))
