# model.py make FOLDER SHAPE TOKENS: a model with random weights in bf16, and a prompt.
# model.py seconds LOG: of a log of `segattn generate -n 1`, the seconds from the prompt to the first token.
import json, os, random, re, sys

SHAPES = {
    # hidden, inner, layers, heads, vocab, segment, prior, past
    "7b": (4096, 11008, 32, 32, 32000, 4096, 512, 512),
    "tiny": (64, 160, 6, 4, 300, 64, 16, 16),
}
LONG_HEADS = [0, 1, 2, 4, 9, 12, 14, 15, 16, 18, 19, 22, 23, 26, 29, 30]
LONG_LAYERS = [6, 8, 11, 18]
BLOCK = 4194301  # numbers, a prime: no two rows of a matrix are equal


def block(exponent):
    """Numbers of random sign, from 2^exponent to twice as much."""
    biased = 127 + exponent
    low = bytes((biased & 1) << 7 | b & 127 for b in range(256))
    high = bytes((b & 1) << 7 | biased >> 1 for b in range(256))
    rng = random.Random(exponent)
    numbers = bytearray(2 * BLOCK)
    numbers[0::2] = rng.randbytes(BLOCK).translate(low)
    numbers[1::2] = rng.randbytes(BLOCK).translate(high)
    return bytes(numbers)


def config_of(shape):
    """`config.json` of a Llama with the paper's roles of heads."""
    hidden, inner, layers, heads, vocab, segment, prior, past = SHAPES[shape]
    long_layers = LONG_LAYERS if layers > 18 else [1, 4]

    def reads(layer, head):
        if head not in LONG_HEADS:
            return ["prior"]
        return ["past"] if layer in long_layers else []

    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": vocab, "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "head_dim": hidden // heads, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "max_position_embeddings": 1 << 20, "torch_dtype": "bfloat16",
        "segment": {"segment_len": segment, "prior_len": prior, "past_len": past,
                    "head_reads": [[reads(l, h) for h in range(heads)] for l in range(layers)]},
    }


def tensors_of(config):
    """Names and shapes of a Llama's tensors, or of a Qwen3's."""
    hidden, inner, vocab = (config[f"{x}_size"] for x in ("hidden", "intermediate", "vocab"))
    dim = config["head_dim"]
    q, kv = (dim * config[f"num_{x}_heads"] for x in ("attention", "key_value"))
    tensors = [("model.embed_tokens.weight", [vocab, hidden])]
    for l in range(config["num_hidden_layers"]):
        of = f"model.layers.{l}."
        tensors += [(of + f"self_attn.{x}_proj.weight", [rows, hidden]) for x, rows in zip("qkv", (q, kv, kv))]
        tensors += [(of + "self_attn.o_proj.weight", [hidden, q])]
        tensors += [(of + f"mlp.{x}_proj.weight", [inner, hidden]) for x in ("gate", "up")]
        tensors += [(of + "mlp.down_proj.weight", [hidden, inner])]
        tensors += [(of + f"{x}_layernorm.weight", [hidden]) for x in ("input", "post_attention")]
        if config["model_type"] == "qwen3":
            tensors += [(of + f"self_attn.{x}_norm.weight", [dim]) for x in "qk"]
    tensors += [("model.norm.weight", [hidden])]
    return tensors if config["tie_word_embeddings"] else tensors + [("lm_head.weight", [vocab, hidden])]


def write(folder, config):
    """A model folder with random weights, in bf16; where `torch_dtype` is float32, as f32 numbers that are not bf16."""
    wide = config["torch_dtype"] == "float32"
    size = 4 if wide else 2
    os.makedirs(folder, exist_ok=True)
    json.dump(config, open(f"{folder}/config.json", "w"))
    tensors = tensors_of(config)
    header, at = {}, 0
    for name, sizes in tensors:
        count = sizes[0] * (sizes[1] if len(sizes) > 1 else 1)
        header[name] = {"dtype": "F32" if wide else "BF16", "shape": sizes, "data_offsets": [at, at + size * count]}
        at += size * count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    blocks = {True: memoryview(block(-9)), False: memoryview(block(-6))}

    def put(numbers):
        if not wide:
            return file.write(numbers)
        longer = bytearray(2 * len(numbers))
        longer[0::4] = b"\1" * (len(numbers) // 2)
        longer[2::4], longer[3::4] = numbers[0::2], numbers[1::2]
        file.write(longer)
        return len(numbers)

    with open(f"{folder}/model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for i, (name, sizes) in enumerate(tensors):
            begin, end = header[name]["data_offsets"]
            left, start = 2 * (end - begin) // size, 2 * (i * 1000003 % BLOCK)
            if len(sizes) == 1:
                put(b"\x80\x3f" * (left // 2))
                continue
            source = blocks["o_proj" in name or "down_proj" in name]
            while left > 0:
                done = put(source[start:start + left])
                left, start = left - done, (start + done) % (2 * BLOCK)


def make(folder, shape, tokens):
    config = config_of(shape)
    write(folder, config)
    rng = random.Random(1)
    for name, count in (("long", tokens), ("part", tokens // 4)):
        json.dump([rng.randrange(config["vocab_size"]) for _ in range(count)], open(f"{folder}/{name}.json", "w"))


def seconds(log):
    said = re.findall(r"prompt: (\d+) tokens, ([\d.]+)/s; new: (\d+) tokens, ([\d.]+)/s", open(log).read())
    if not said:
        return print("no figure")
    prompt, rate, new, after = map(float, said[-1])
    # The last new token is sampled and not read.
    print(f"{prompt / rate + new / after:.4f} s to the first token ({prompt / rate:.4f} + {new / after:.4f})")


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        seconds(sys.argv[2])
