"""Tables as data sets are published, for tests/train/tables.rs to read.

    python tests/golden/parquet/make.py

needs pyarrow. Writes messages.parquet (Zstandard, three row groups) and text.parquet (Snappy).
"""

import pathlib

import pyarrow as pa
import pyarrow.parquet as pq

HERE = pathlib.Path(__file__).parent
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())])


def say(role, content):
    return {"role": role, "content": content, "name": None}


def main():
    conversations = [[say("user", f"What is {i}?"), say("assistant", f"{i} is Größe {i}.")] for i in range(5)]
    messages = pa.table(
        {
            "id": pa.array(range(5), pa.int64()),
            "messages": pa.array(conversations, pa.list_(MESSAGE)),
            "score": pa.array([0.5] * 5, pa.float64()),
        }
    )
    pq.write_table(messages, HERE / "messages.parquet", compression="zstd", row_group_size=2)
    text = pa.table({"text": ["one", "zwei ü\n", "", "four"], "label": [True, False, True, None]})
    pq.write_table(text, HERE / "text.parquet", compression="snappy")


if __name__ == "__main__":
    main()
