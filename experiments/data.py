"""Training and held-out text for the experiments: python experiments/data.py [OUT] [--root FOLDER] [--megabytes N].

The text is the sources of the crates that crates/Cargo.toml lists by exact version; cargo fetches and unpacks them.
Files of a crate are joined in the order of their paths, one document a crate; whole crates are held out, one in eight,
by a hash of the name, so that a crate is on the same side for every version. Writes OUT/train.jsonl, OUT/held_out.jsonl
(a `text`, a `crate` and a `license` a line) and OUT/long.jsonl, which has the held-out crates joined into documents of
some 150,000 tokens and more. Prints sizes, digests and licences: results on text of another digest are not paired.
Nothing of the text belongs into the repository: each crate's licence holds for it.
"""

import argparse
import collections
import hashlib
import json
import os
import subprocess
import sys
import tomllib

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "prototype"))

from crates import crates, held_out  # noqa: E402

LIST = os.path.join(os.path.dirname(os.path.abspath(__file__)), "crates", "Cargo.toml")
LONG = 500_000  # characters, some 3.3 of source code a token


def fetched():
    """Names of the folders, up to a `+`, that cargo unpacks the listed crates into."""
    target = "x86_64-unknown-linux-gnu"  # without those that only other systems need
    subprocess.run(["cargo", "fetch", "--locked", "--target", target, "--manifest-path", LIST], check=True)
    with open(LIST, "rb") as file:
        crates = tomllib.load(file)["dependencies"]
    return {f"{crate.get('package', name)}-{crate['version'].removeprefix('=')}" for name, crate in crates.items()}


def licence(folder):
    """What the crate's manifest says, or names of its licence files."""
    try:
        with open(os.path.join(folder, "Cargo.toml"), "rb") as file:
            package = tomllib.load(file)["package"]
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return "unknown"
    return package.get("license") or package.get("license-file") or "unknown"


def joined(documents):
    """Documents of at least LONG characters; what is left over goes to the last one."""
    result = []
    for document in documents:
        if not result or len(result[-1]["text"]) >= LONG:
            result.append(document)
        else:
            names = ("crate", "license")
            result[-1] = {"text": result[-1]["text"] + document["text"]} | {
                name: result[-1][name] + "; " + document[name] for name in names}
    if len(result) > 1 and len(result[-1]["text"]) < LONG:
        result[-2]["text"] += result.pop()["text"]
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "data"))
    home = os.environ.get("CARGO_HOME", "~/.cargo")
    parser.add_argument("--root", default=home + "/registry/src", help="where cargo unpacks crates")
    parser.add_argument("--megabytes", type=float, help="at most so much text, in whole crates")
    options = parser.parse_args()
    os.makedirs(options.out, exist_ok=True)
    sides = {name: [] for name in ("train", "held_out")}
    size, licences, missing = 0, collections.Counter(), fetched()
    for name, text, folder in crates(options.root):
        if name.split("+")[0] not in missing:
            continue
        missing.remove(name.split("+")[0])
        if options.megabytes and size + len(text) > options.megabytes * 1e6:
            continue
        size += len(text)
        said = licence(folder)
        licences[said] += len(text)
        sides["held_out" if held_out(name) else "train"].append({"text": text, "crate": name, "license": said})
    if missing:
        sys.exit(f"not under {options.root}: {', '.join(sorted(missing))}")
    sides["long"] = joined(sides["held_out"])
    for side, documents in sides.items():
        if not documents:
            sys.exit(f"no crate for {side}: --megabytes leaves none")
        path = os.path.join(options.out, f"{side}.jsonl")
        with open(path + ".part", "w", encoding="utf-8") as file:
            for document in documents:
                file.write(json.dumps(document, ensure_ascii=False) + "\n")
        os.replace(path + ".part", path)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
        lengths = sorted(len(document["text"]) for document in documents)
        print(f"{path}: {len(documents)} documents, {sum(lengths) / 1e6:.1f} MB of text; one has {lengths[0] / 1e3:.0f}"
              f" to {lengths[-1] / 1e3:.0f} kB, the median {lengths[len(lengths) // 2] / 1e3:.0f}; SHA-256 {digest}")
    print("licences, by text:")
    for said, length in licences.most_common():
        print(f"  {length / 1e6:7.1f} MB  {said}")


if __name__ == "__main__":
    main()
