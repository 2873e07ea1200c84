"""Loads model folders with Transformers and prints, a line each, the log-probability of each token but the first.

    python tests/golden/families/load.py FOLDER 1,2,3 FOLDER 4,5,6 ...

Fails where weights are missing, unexpected or of another shape.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM

for folder, tokens in zip(sys.argv[1::2], sys.argv[2::2]):
    tokens = torch.tensor([int(token) for token in tokens.split(",")])
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", output_loading_info=True
    )
    wrong = {kind: sorted(map(str, names)) for kind, names in found.items() if names}
    assert not wrong, (folder, wrong)
    with torch.no_grad():
        scores = model(tokens[None]).logits[0, :-1].log_softmax(-1)
    print(json.dumps(scores.gather(1, tokens[1:, None])[:, 0].tolist()))
