"""Which KV heads read what is asked for: attention on the asked statement while its answer is read, under full
attention, on statements of the training kind. python heads.py GGUF > heads.json (a CPU, some minutes)."""

import json
import pickle
import sys

import numpy as np
import torch

import corpus
import model
import tasks
import weights

PROMPTS, LENGTH = 24, 1280


def prompt(rng, text, encode, ends):
    """Text with four records of one form, a question and its answer.

    Returns ids [1, tokens], the asked record's rows [begin, end) and the rows that predict the answer.
    """
    statement, question = tasks.RECORDS[rng.integers(len(tasks.RECORDS))]
    names = rng.choice(tasks.TRAIN_ADJECTIVES, 4, replace=False), rng.choice(tasks.TRAIN_NOUNS, 4, replace=False)
    records = [(f"{a} {n}", tasks.digits(rng, 7)) for a, n in zip(*names)]
    cuts = np.sort(rng.choice(tasks.line_ends(text[:LENGTH], ends), 4, replace=False))
    asked, ids, last = int(rng.integers(4)), [], 0
    for i, (cut, (key, value)) in enumerate(zip(cuts, records)):
        ids += text[last:cut].tolist()
        piece = encode("\n" + statement.format(k=key, v=value) + "\n").tolist()
        if i == asked:
            rows = len(ids), len(ids) + len(piece)
        ids, last = ids + piece, cut
    key, value = records[asked]
    ids += text[last:LENGTH].tolist() + encode("\n" + question.format(k=key)).tolist()
    answer = encode(" " + value).tolist()
    return torch.tensor([ids + answer]), rows, list(range(len(ids), len(ids) + len(answer) - 1))


def prepare(gguf, out):
    tok, ends = corpus.tokenizer(gguf)
    encode = lambda text: np.array(tok.encode(text).ids)
    text = np.concatenate([encode(t) for _, (c, t, _) in zip(range(6), corpus.crates("~/.cargo/registry/src"))
                           if not corpus.held_out(c)])
    rng, prompts = np.random.default_rng(7), []
    while len(prompts) < PROMPTS:
        start = rng.integers(len(text) - LENGTH)
        if len(tasks.line_ends(text[start : start + LENGTH], ends)) >= 40:
            prompts.append(prompt(rng, text[start:], encode, ends))
    with open(out, "wb") as file:
        pickle.dump(prompts, file)


@torch.no_grad()
def measure(gguf, prompts, out):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape, state = weights.load(gguf)
    functions, seen = model.Functions(fast=False), []
    inner = functions.before_attention

    def record(*arguments):
        result = inner(*arguments)
        seen.append(result[3:])
        return result

    functions.before_attention = record
    llama = model.Llama(shape, state, functions, torch.float32).to(device)
    group = shape["q_heads"] // shape["kv_heads"]
    mass = np.zeros((shape["layers"], shape["kv_heads"]))
    with open(prompts, "rb") as file:
        prompts = pickle.load(file)
    for ids, rows, reading in prompts:
        seen.clear()
        llama(ids.to(device), model.Config(0))
        at = torch.tensor(reading, device=device)
        for layer, (q, k) in enumerate(seen):
            logits = torch.einsum("ihd,khd->hik", q[at], k.repeat_interleave(group, 1)) * q.shape[-1] ** -0.5
            hidden = torch.arange(len(k), device=device) > at[:, None]
            p = logits.masked_fill(hidden, -torch.inf).softmax(-1)[..., slice(*rows)].sum(-1)
            mass[layer] += p.view(shape["kv_heads"], -1).mean(1).cpu().numpy() / len(prompts)
    order = np.argsort(-mass, axis=None)[:40]
    heads = [[*map(int, divmod(i, mass.shape[1])), round(float(mass.flat[i]), 4)] for i in order]
    with open(out, "w") as file:
        json.dump(heads, file)
    print("heads:", heads[:20])


if __name__ == "__main__":
    {"prepare": prepare, "measure": measure}[sys.argv[1]](*sys.argv[2:])
