"""Everything that training and evaluation read, as one compressed file: python corpus.py OUT --gguf FILE [--small].

Text: the sources of crates that cargo has unpacked under ~/.cargo/registry/src, joined per crate; one crate in eight is
held out. The tokenizer is the model's own (from the GGUF).
"""

import argparse
import lzma
import os
import pickle
import time

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

import tasks
from crates import crates, held_out

LENGTH = 8192
SINGLE, MULTI = 1, 4
PROMPTS = {2048: 96, 8192: 96, 32768: 64, 65536: 32, 131072: 16}


def tokenizer(path):
    import gguf

    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    result = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    result.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    result.decoder = decoders.ByteLevel()
    return result, np.array([t.endswith("Ċ") for t in tokens])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--small", action="store_true", help="a few sequences, for checks on a CPU")
    parser.add_argument("--root", default="~/.cargo/registry/src")
    options = parser.parse_args()
    begin = time.time()
    tok, ends = tokenizer(options.gguf)
    cache = {}

    def encode(text):
        if text not in cache:
            cache[text] = np.array(tok.encode(text).ids, np.uint16)
        return cache[text]

    train, test = [], []
    for n, (crate, text, _) in enumerate(crates(options.root)):
        if options.small and n > 40:
            break
        ids = np.array(tok.encode(text).ids, np.uint16)
        (test if held_out(crate) else train).append(ids)
    print(f"{sum(map(len, train))} tokens of {len(train)} crates, {sum(map(len, test))} of {len(test)} held out,"
          f" {time.time() - begin:.0f} s", flush=True)
    rng = np.random.default_rng(1)
    windows = [ids[i : i + LENGTH] for ids in train for i in range(0, len(ids) - LENGTH + 1, LENGTH)]
    windows = [windows[i] for i in rng.permutation(len(windows))]
    text = np.stack(windows)
    mixed, weights, breaks = text.copy(), np.ones(text.shape, np.float16), [[] for _ in windows]
    for i in range(0, len(windows), 2):  # every other sequence carries tasks
        mixed[i], weights[i], breaks[i] = tasks.training_sequence(rng, text[i], LENGTH, encode, ends)
    long = [ids[i : i + 32768] for ids in test for i in range(0, len(ids) - 32767, 32768)]
    long = [long[i] for i in rng.permutation(len(long))][: 4 if options.small else 24]
    hay = np.concatenate(test)
    prompts = {}
    for length, count in PROMPTS.items():
        if options.small and length > 8192:
            continue
        for keys in (SINGLE, MULTI):
            made = []
            for _ in range(8 if options.small else count):
                start = rng.integers(0, max(len(hay) - length, 1))
                made.append(tasks.test_prompt(rng, hay[start : start + length], length, encode, ends, keys))
            ids, at, digits, needle = zip(*made)
            prompts[(length, keys)] = {"ids": np.stack(ids), "break": np.array(at), "digits": np.array(digits),
                                       "needle": np.array(needle)}
    data = {"text": text, "mixed": mixed, "weights": weights, "breaks": breaks, "held_out": np.stack(long),
            "prompts": prompts}
    print(f"{len(windows)} sequences, {len(long)} long, {max(map(len, breaks))} breaks at most, made in"
          f" {time.time() - begin:.0f} s", flush=True)
    with lzma.open(options.out, "wb", preset=3 if options.small else 6) as file:
        pickle.dump(data, file, protocol=4)
    print(f"{os.path.getsize(options.out)} bytes, {time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
