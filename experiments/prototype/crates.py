"""Text of the crates that cargo has unpacked, and which of them are held out."""

import glob
import hashlib
import os


def crates(root, limit=1_500_000):
    """(crate, text, folder) with files in the order of their paths; generated giants are cut at `limit` bytes."""
    for folder in sorted(glob.glob(os.path.expanduser(root) + "/*/*")):
        parts, size = [], 0
        for path in sorted(glob.glob(folder + "/**/*", recursive=True)):
            if not path.endswith((".rs", ".md", ".toml")) or os.path.getsize(path) > 300_000:
                continue
            text = open(path, encoding="utf-8", errors="ignore").read()
            text = f"// {os.path.relpath(path, folder)}\n{text}\n"
            size += len(text)
            if size > limit:
                break
            parts.append(text)
        if size > 30_000:
            yield os.path.basename(folder), "".join(parts), folder


def held_out(crate):
    return int(hashlib.sha256(crate.rsplit("-", 1)[0].encode()).hexdigest(), 16) % 8 == 0
