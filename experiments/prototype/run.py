"""Trains and evaluates the arms, most valuable first; every result is a line of JSON at once.

python run.py --gguf FILE --data FILE --heads heads.json --out ROWS [--seconds N] [--steps N] [--plan "ARM;ARM"]
python run.py --smoke --steps 8 --out ROWS

A run stops before an arm that would not fit into --seconds; the arms found complete in ROWS are left out, so that the
same command goes on where it stopped.
"""

import argparse
import json
import lzma
import os
import pickle
import time
from dataclasses import replace

import numpy as np
import torch

import model
import weights
from segments import Config

BATCH = 8  # sequences a step
TOKENS = 65536  # of a batch in evaluation (or one sequence, if longer)
SEGMENTS = 160  # of a batch at most; a fixed number, so that shapes are few
RATE, WARM = 1e-4, 20


def arms(heads):
    """name: (configuration in training and evaluation, tasks in the data or not, others to evaluate)."""
    top = lambda n: frozenset((layer, head) for layer, head, _ in heads[:n])
    full, every = Config(0), Config()
    ten, twenty = replace(every, readers=top(10)), replace(every, readers=top(20))
    none = replace(every, past_len=0)
    tail = replace(ten, prior_len=512)
    return {
        "every": (every, True, {"past off": none}),
        "full": (full, True, {"in segments": every}),
        "ten": (ten, True, {}),
        "ten, tail 512": (tail, True, {}),
        "no past": (none, True, {}),
        "ten, text only": (ten, False, {}),
        "every, text only": (every, False, {}),
        "twenty": (twenty, True, {}),
        "no past, tail 512": (replace(tail, past_len=0), True, {}),
        "full, text only": (full, False, {}),
        "every, no sinks": (replace(every, sinks=0), True, {}),
    }


class Rows:
    """Results as lines of JSON; also what is complete already."""

    def __init__(self, path):
        self.path, self.complete = path, set()
        if os.path.exists(path):
            rows = map(json.loads, open(path))
            self.complete = {r["arm"] for r in rows if r["metric"] == "complete"}

    def add(self, **row):
        with open(self.path, "a") as file:
            file.write(json.dumps({"experiment": "prototype"} | row) + "\n")
        print(json.dumps(row), flush=True)


def batches(data, tasks, steps):
    """(ids, loss weights, breaks) of each step; the same order for every arm."""
    ids = data["mixed"] if tasks else data["text"]
    for step in range(steps):
        rows = slice(step * BATCH, (step + 1) * BATCH)
        weight = data["weights"][rows] if tasks else np.ones((BATCH, ids.shape[1]), np.float16)
        yield ids[rows], weight, data["breaks"][rows] if tasks else [[]] * BATCH


def train(llama, config, data, tasks, steps, device, report):
    optimizer = torch.optim.AdamW(llama.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=device == "cuda")
    llama.train()
    report_at = {1, 4, 8, *range(25, steps + 1, 25), steps}
    sums, begin, since = torch.zeros(4, device=device), time.time(), 0
    for step, (ids, weight, breaks) in enumerate(batches(data, tasks, steps)):
        rate = RATE * min(1.0, (step + 1) / WARM) * min(1.0, 0.1 + 0.9 * (steps - step) / steps / 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = torch.from_numpy(ids.astype(np.int64)).to(device)
        weight = torch.from_numpy(weight).to(device).float()
        hidden = llama(ids, config, breaks, SEGMENTS // BATCH)
        targets = torch.cat([ids[:, 1:], ids[:, :1]], 1)
        weight = torch.cat([weight[:, 1:], torch.zeros_like(weight[:, :1])], 1)
        nats = llama.losses(hidden, targets)
        (nats * weight).sum().div(weight.sum()).backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            text, answer = weight == 1, weight > 1
            sums += torch.stack([(nats * text).sum(), text.sum(), (nats * answer).sum(), answer.sum()])
        since += 1
        if step + 1 in report_at:
            a, b, c, d = sums.tolist()
            now = time.time()
            report(step=step + 1, text=a / b, answer=c / d if d else None, rate=since * ids.numel() / (now - begin))
            sums.zero_()
            begin, since = now, 0


def loss(llama, config, data, length, device):
    """Nats by kilotoken of position, [length / 1024], over the held-out text, and the number of tokens."""
    text = data["held_out"].reshape(-1, length)
    count = max(TOKENS // length, 1)
    sums = np.zeros(length // 1024)
    for i in range(0, len(text) // count * count, count):
        ids = torch.from_numpy(text[i : i + count].astype(np.int64)).to(device)
        nats = llama.losses(llama(ids, config, None, SEGMENTS // count), torch.cat([ids[:, 1:], ids[:, :1]], 1))
        nats[:, -1] = 0
        sums += nats.view(count, -1, 1024).sum((0, 2)).cpu().double().numpy()
    tokens = len(text) // count * count * length
    return sums / (tokens / len(sums)), tokens


def needles(llama, config, prompts, limit, device):
    """All seven digits the likeliest (0 or 1 a prompt); share of the needle's rows among the chosen, [layer, head]."""
    length = prompts["ids"].shape[1]
    count = max(TOKENS // length, 1)
    found, recall = [], {}
    for i in range(0, min(limit, len(prompts["ids"])) // count * count, count):
        pick = slice(i, i + count)
        ids = torch.from_numpy(prompts["ids"][pick].astype(np.int64)).to(device)
        needle = torch.from_numpy(prompts["needle"][pick]).to(device)
        at = torch.from_numpy(prompts["digits"][pick]).to(device)

        def watch(layer, chosen, plan):
            rows = (plan.seg_of.view(count, length)[:, -1] - torch.arange(count, device=device) * plan.count)
            chosen = chosen[torch.arange(count, device=device), rows]  # of the answer's segment
            hit = (chosen >= needle[:, :1, None]) & (chosen < needle[:, 1:, None])
            share = hit.sum(-1) / (needle[:, 1] - needle[:, 0])[:, None]
            recall.setdefault(layer, []).append(share.cpu().numpy())

        breaks = [[int(b)] for b in prompts["break"][pick]]
        hidden = llama(ids, config, breaks, SEGMENTS // count, watch)
        hidden = hidden.gather(1, (at - 1)[..., None].expand(-1, -1, hidden.shape[-1]))
        best = (hidden @ llama.w["embed"].to(hidden.dtype).T).argmax(-1)
        found += (best == ids.gather(1, at)).all(1).tolist()
    return found, {layer: np.concatenate(r).mean(0) for layer, r in recall.items()}


LIMITS = {2048: 96, 8192: 64, 32768: 32, 65536: 16, 131072: 8}  # prompts


@torch.no_grad()
def evaluate(llama, config, data, device, add, heads, lengths, limits):
    llama.eval()
    for length in (8192, 32768):
        by_position, tokens = loss(llama, config, data, length, device)
        add(task="loss", length=length, metric="nats", value=float(by_position.mean()), samples=tokens,
            by_position=[round(float(x), 4) for x in by_position])
    for length in lengths:
        for keys in (1, 4):
            found, recall = needles(llama, config, data["prompts"][length, keys], limits[length], device)
            task = f"needle, {keys} key" + "s" * (keys > 1)
            add(task=task, length=length, metric="success", value=float(np.mean(found)), samples=len(found))
            if recall:
                reads = {(layer, h): float(r[h]) for layer, r in recall.items() for h in range(len(r))
                         if config.reads(layer, len(r))[h]}
                best = [reads[layer, h] for layer, h, _ in heads[:10] if (layer, h) in reads]
                add(task=task, length=length, metric="recall", value=float(np.mean(list(reads.values()))),
                    measured_ten=float(np.mean(best)), samples=len(found))


def invented(steps):
    """The model's shape with random weights, and data of the real form: for a smoke run without files."""
    rng = np.random.default_rng(0)
    some = lambda *size: rng.integers(0, 49152, size).astype(np.uint16)
    text = some(steps * BATCH, 8192)
    prompts = {(n, 1): {"ids": some(max(TOKENS // n, 1), n), "break": np.full(max(TOKENS // n, 1), n - 16),
                        "digits": np.tile(np.arange(n - 15, n - 8), (max(TOKENS // n, 1), 1)),
                        "needle": np.tile([n // 2, n // 2 + 20], (max(TOKENS // n, 1), 1))} for n in LIMITS}
    weight = np.ones(text.shape, np.float16)
    weight[:, 4000:4008] = 16
    data = {"text": text, "mixed": text, "weights": weight, "breaks": [[1000, 4000]] * len(text),
            "held_out": text[:8].reshape(-1, 32768), "prompts": prompts}
    heads = [[layer, layer % 3, 0.0] for layer in range(5, 25)]
    return *weights.random(30, 576, 9, 3, 1536, 49152), data, heads


def check_compiled(device):
    """Compiled kernels against the dense mask, f32, values and gradients."""
    torch.backends.cuda.matmul.allow_tf32 = False
    shape, state = weights.random(2, 192, 3, 1, 256, 512)
    ids = torch.randint(0, 512, (2, 2048), generator=torch.Generator().manual_seed(1)).to(device)
    config, results = Config(512, 128, 128, 4), []
    for fast in (False, True):
        llama = model.Llama(shape, state, model.Functions(fast), torch.float32).to(device).train()
        nats = llama.losses(llama(ids, config, [[700, 705], [1300]], 8), ids.roll(-1, 1))
        nats.mean().backward()
        results.append([nats.detach()] + [p.grad for p in llama.parameters()])
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(results[1], results[0]))
    print(f"compiled against dense, f32, values and gradients: worst relative difference {worst:.1e}", flush=True)
    torch.backends.cuda.matmul.allow_tf32 = True


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    for name in ("gguf", "data", "heads"):
        parser.add_argument("--" + name, default="")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--plan", default="", help="arms to train, separated by ';' (their names hold commas)")
    parser.add_argument("--untrained", default="every;full;ten;no past", help="arms to evaluate before training")
    parser.add_argument("--smoke", action="store_true", help="invented weights and data: does it run, how fast")
    options = parser.parse_args()
    begin = time.time()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True  # only f32 products of bf16 numbers: exact
    if options.smoke:
        check_compiled(device)
        shape, state, data, heads = invented(options.steps)
    else:
        with lzma.open(options.data) as file:
            data = pickle.load(file)
        heads = json.load(open(options.heads))
        shape, state = weights.load(options.gguf)
    state = {k: v.to(device) for k, v in state.items()}
    functions = model.Functions(fast=device == "cuda")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows, all_arms = Rows(options.out), arms(heads)
    steps = options.steps or len(data["text"]) // BATCH
    print(f"loaded after {time.time() - begin:.0f} s, {steps} steps", flush=True)

    def lengths_of(config, brief):
        if not config.segment_len:
            return [2048, 8192, 32768]
        return [2048, 8192, 32768] if brief else list(LIMITS)

    def measure(llama, config, arm, tokens, seconds, run_as=None, brief=False):
        start = time.time()
        slow = not config.segment_len or config.readers == "all"
        limits = {k: v // 2 if brief or (k > 32768 and slow) else v for k, v in LIMITS.items()}
        extra = {"run_as": run_as} if run_as else {}
        add = lambda **row: rows.add(arm=arm, seed=1, tokens=tokens, gpu_seconds=round(seconds, 1), **extra, **row)
        evaluate(llama, config, data, device, add, heads, lengths_of(config, brief), limits)
        print(f"{arm} {run_as or ''}: evaluated in {time.time() - start:.0f} s", flush=True)

    if not options.smoke:
        for arm in options.untrained.split(";") if options.untrained else []:
            if "untrained " + arm in rows.complete:
                continue
            llama = model.Llama(shape, state, functions, dtype).to(device)
            measure(llama, all_arms[arm][0], "untrained " + arm, 0, 0.0, brief=True)
            rows.add(arm="untrained " + arm, metric="complete")
    longest = 0.0
    for arm in options.plan.split(";") if options.plan else all_arms:
        if arm in rows.complete:
            continue
        start = time.time()
        if start - begin + longest > options.seconds:
            print(f"stopped before {arm!r}: the longest arm took {longest:.0f} s", flush=True)
            break
        config, tasks, others = all_arms[arm]
        torch.manual_seed(1)
        llama = model.Llama(shape, state, functions, dtype).to(device)
        report = lambda **row: rows.add(arm=arm, seed=1, metric="training", **row)
        train(llama, config, data, tasks, steps, device, report)
        if device == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
            print(f"{arm}: {peak:.1f} GiB, {time.time() - start:.0f} s", flush=True)
        if options.smoke:
            with torch.no_grad():
                for length in (2048, 131072) if config.segment_len else (2048,):
                    for again in range(2):
                        now = time.time()
                        needles(llama.eval(), config, data["prompts"][length, 1], 99, device)
                        print(f"prompts of {length}: {time.time() - now:.2f} s a batch", flush=True)
                print("loss", loss(llama, config, data, 32768, device)[0].mean(), flush=True)
        else:
            seconds, tokens = time.time() - start, steps * BATCH * data["text"].shape[1]
            measure(llama, config, arm, tokens, seconds)
            for name, other in others.items():
                measure(llama, other, arm, tokens, seconds, run_as=name, brief=True)
            rows.add(arm=arm, metric="complete")
        del llama
        longest = max(longest, time.time() - start)


if __name__ == "__main__":
    main()
