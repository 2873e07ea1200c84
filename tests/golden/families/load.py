"""Loads a model folder with Transformers and prints the log-probability of each token but the first.

    python tests/golden/families/load.py FOLDER 1,2,3

Fails where weights are missing, unexpected or of another shape.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM

folder, tokens = sys.argv[1], torch.tensor([int(token) for token in sys.argv[2].split(",")])
model, found = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float64, attn_implementation="eager", output_loading_info=True
)
wrong = {kind: sorted(map(str, names)) for kind, names in found.items() if names}
assert not wrong, wrong
with torch.no_grad():
    scores = model(tokens[None]).logits[0, :-1].log_softmax(-1)
print(json.dumps(scores.gather(1, tokens[1:, None])[:, 0].tolist()))
