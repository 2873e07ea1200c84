# make.py models FOLDER SIZE: a Qwen3, a Llama of its sizes, two small models, and one of SmolLM2-135M's sizes in bf16
#   and in f32, with random weights; prompts and training data beside them. SIZE is `full`, or `tiny` for a trial.
# make.py rate LOG: new tokens a second, of a log of `segattn generate`.
# make.py steps RUN: tokens a second of a run's later steps, the seconds of its steps, and its losses.
# make.py same GENERATED SCORED: whether new tokens have the log-probabilities that scoring gives them, to the bit.
import json, os, random, re, statistics, sys

sys.path += [os.path.dirname(os.path.abspath(__file__)), os.path.join(os.path.dirname(__file__), "../ranks")]
import model as weights

SIZES = {
    # hidden, inner, layers, heads, KV heads, head_dim, vocab
    "full": {
        "large": (2048, 6144, 28, 16, 8, 128, 151936),
        "hundred": (3200, 8640, 4, 32, 32, 100, 512),
        "small": (1024, 3072, 4, 8, 4, 128, 512),
        "smol": (576, 1536, 30, 9, 3, 64, 49152),
    },
    "tiny": {
        "large": (64, 160, 2, 4, 2, 32, 512),
        "hundred": (200, 160, 2, 2, 2, 100, 512),
        "small": (64, 160, 2, 4, 2, 32, 512),
        "smol": (64, 160, 2, 4, 2, 32, 512),
    },
}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}" \
           "{% if add_generation_prompt %}<assistant>{% endif %}"


def config(family, sizes, tied):
    hidden, inner, layers, heads, kv_heads, dim, vocab = sizes
    class_name = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[family]
    return {
        "model_type": family, "architectures": [class_name], "vocab_size": vocab, "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": dim, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": tied, "max_position_embeddings": 40960, "torch_dtype": "bfloat16",
    }


def models(folder, size):
    sizes = SIZES[size]
    weights.write(f"{folder}/qwen3", config("qwen3", sizes["large"], True))
    weights.write(f"{folder}/llama", config("llama", sizes["large"], True))
    segments = {"segment_len": 256, "prior_len": 128, "past_len": 64,
                "retrieval": {"queries": 16, "window_len": 32}}
    for name, family in (("hundred", "llama"), ("small", "qwen3")):
        reads = [[["prior", "past"]] * sizes[name][4]] * sizes[name][2]
        shape = config(family, sizes[name], False)
        weights.write(f"{folder}/{name}", {**shape, "segment": {**segments, "head_reads": reads}})
    for dtype in ("bfloat16", "float32"):
        weights.write(f"{folder}/smol-{dtype}", {**config("llama", sizes["smol"], True), "torch_dtype": dtype})
    rng = random.Random(1)
    vocab, length = sizes["large"][-1], 8192 if size == "full" else 64
    ids = [rng.randrange(vocab) for _ in range(40 * length)]
    open(f"{folder}/ids.bin", "wb").write(b"".join(i.to_bytes(4, "little") for i in ids))
    for i in range(8):
        json.dump(ids[i * length:i * length + length // 8], open(f"{folder}/prompt-{i}.json", "w"))
    words = ["segment", "prior", "past", "gate", "the", "of", "a", "tail", "sum", "tree"]
    text = " ".join(rng.choice(words) for _ in range(20000))
    open(f"{folder}/text.txt", "w").write(text)
    json.dump(list(text[:1000].encode()), open(f"{folder}/words.json", "w"))
    json.dump(list(text[:64].encode()), open(f"{folder}/short.json", "w"))
    open(f"{folder}/template.jinja", "w").write(TEMPLATE)


def rate(log):
    said = re.findall(r"new: \d+ tokens, ([\d.]+)/s", open(log).read())
    print(said[-1] if said else "nan")


def steps(run):
    lines = [json.loads(line) for line in open(f"{run}/metrics.jsonl")]
    lines = [line for line in lines if "loss" in line]
    seconds = [line["seconds"] for line in lines]
    median = statistics.median(seconds[3:]) if len(seconds) > 3 else float("nan")
    losses = [round(line["loss"], 4) for line in lines]
    print(f"{lines[-1]['tokens'] / median:.0f}", [round(x, 4) for x in seconds], losses[0], losses[-1])


def same(generated, scored):
    new = json.load(open(generated))["logprobs"]
    all_of_them = json.load(open(scored))["logprobs"]
    equal = sum(a == b for a, b in zip(new, all_of_them[-len(new):]))
    print(f"equal bits: {equal} of {len(new)}")


if __name__ == "__main__":
    {"models": models, "rate": rate, "steps": steps, "same": same}[sys.argv[1]](*sys.argv[2:])
