"""PyTorch's side of the model bench: one JSON line in, one out.

    {"do": "check", "folder", "tokens"}
        log-probabilities by Transformers in f32 and bf16, and by Model below
    {"do": "prefill", "who", "shape", "tokens"}
        first token and peak memory: "flash" and "cudnn" by Transformers' Llama, "compiled" by Model with the faster
        of the two
    {"do": "decode", "shape", "batch", "tokens"}
        Model, compiled, in a CUDA graph: one step at that context
    {"do": "train", "shape", "tokens", "steps", "seconds"}
        Model, compiled: steps with the faster attention
    {"do": "free"}
        gives memory back

"shape" is a config.json. Weights are random, in bf16; training holds them in f32 and multiplies in bf16.
"""

import gc
import json
import sys
import time
import traceback


def reply(value):
    print(json.dumps(value), flush=True)


try:
    import torch
    import torch.nn.functional as F
    import transformers
    from safetensors.torch import load_file
    from torch import nn
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.checkpoint import checkpoint
    from transformers.models.llama.modeling_llama import LlamaForCausalLM
except ImportError as error:
    reply({"missing": f"PyTorch and transformers: {error}"})
    sys.exit(0)
if not torch.cuda.is_available():
    reply({"missing": "PyTorch has no CUDA device"})
    sys.exit(0)

transformers.logging.set_verbosity_error()
torch.set_float32_matmul_precision("high")
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
HELD = {}


def free():
    HELD.clear()
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()


def synced():
    torch.cuda.synchronize()
    return time.perf_counter()


def memory():
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
    }


# ---- Transformers


def llama(shape):
    """A Transformers Llama of random weights, kept until something else is asked for."""
    key = json.dumps(shape, sort_keys=True)
    if key not in HELD:
        free()
        other = ("architectures", "model_type")
        config = transformers.LlamaConfig(**{k: v for k, v in shape.items() if k not in other})
        config._attn_implementation = "sdpa"
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("cuda"):
                model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(torch.float32)
        HELD[key] = model.eval().requires_grad_(False)
    return HELD[key]


@torch.inference_mode()
def prefill(ask):
    shape = ask["shape"]
    if ask["who"] == "compiled":
        return prefill_compiled(shape, ask["tokens"])
    model = llama(shape)

    def first(ids):
        return model(ids, use_cache=True, logits_to_keep=1).logits

    return read_prompt(first, BACKENDS[ask["who"]], shape, ask["tokens"], min(ask["tokens"], 4096))


def read_prompt(first, backend, shape, tokens, warm):
    """Times `first`, which reads ids and returns the logits of the last, after a prompt of `warm` tokens."""
    weights = torch.cuda.memory_allocated()
    # Keys and values that do not fit should not be found out layer by layer.
    heads = shape["num_hidden_layers"] * shape["num_key_value_heads"]
    cache = torch.empty(4 * heads * shape["head_dim"] * tokens, dtype=torch.uint8, device="cuda")
    del cache
    torch.cuda.empty_cache()

    def read(count):
        ids = torch.randint(shape["vocab_size"], (1, count), device="cuda")
        begin = synced()
        first(ids)[0, -1].argmax().item()
        return synced() - begin

    with sdpa_kernel(backend):
        read(warm)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        seconds = read(tokens)
        if seconds < 1:
            seconds = min(seconds, read(tokens))
    return {"first_token_s": seconds, "weights_bytes": weights, **memory()}


# ---- A Llama to be compiled: products of one input are one product, keys and values lie in place


def tables(shape, count, dtype=torch.bfloat16):
    dim = shape["head_dim"]
    powers = torch.arange(0, dim, 2, device="cuda", dtype=torch.float32) / dim
    angles = torch.outer(torch.arange(count, device="cuda", dtype=torch.float32), shape["rope_theta"] ** -powers)
    both = torch.cat([angles, angles], -1)
    return both.cos().to(dtype), both.sin().to(dtype)


def rotate(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Block(nn.Module):
    def __init__(self, shape):
        super().__init__()
        hidden, inner = shape["hidden_size"], shape["intermediate_size"]
        self.heads, self.kv_heads, self.dim = (
            shape[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim")
        )
        self.norm = nn.RMSNorm(hidden, shape["rms_norm_eps"])
        self.qkv = nn.Linear(hidden, (self.heads + 2 * self.kv_heads) * self.dim, bias=False)
        self.out = nn.Linear(self.heads * self.dim, hidden, bias=False)
        self.mlp_norm = nn.RMSNorm(hidden, shape["rms_norm_eps"])
        self.gate_up = nn.Linear(hidden, 2 * inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x, cos, sin, k_cache=None, v_cache=None):
        batch, rows, _ = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, rows, -1, self.dim).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if k_cache is not None:
            # A prompt fills the cache; a step's token is the last of the context.
            k_cache[:, :, -rows:] = k
            v_cache[:, :, -rows:] = v
            k, v = k_cache, v_cache
        grouped = self.heads != self.kv_heads
        y = F.scaled_dot_product_attention(q, k, v, is_causal=rows > 1, enable_gqa=grouped)
        x = x + self.out(y.transpose(1, 2).reshape(batch, rows, -1))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Model(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape["vocab_size"], shape["hidden_size"])
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape["num_hidden_layers"]))
        self.norm = nn.RMSNorm(shape["hidden_size"], shape["rms_norm_eps"])
        self.head = nn.Linear(shape["hidden_size"], shape["vocab_size"], bias=False)
        if shape["tie_word_embeddings"]:
            self.head.weight = self.embedding.weight


def make(shape, dtype):
    with torch.device("cuda"):
        model = Model(shape).to(dtype)
    residual = (2 * len(model.blocks)) ** -0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02 * (residual if "out." in name or "down." in name else 1))
    return model


def compiled(model):
    for block in model.blocks:
        block.compile(dynamic=False)
    return model


# ---- Prefill and decoding


def prefill_compiled(shape, tokens):
    free()
    attention = faster_attention(shape, tokens, backward=False)
    model = compiled(make(shape, torch.bfloat16).requires_grad_(False))
    cos, sin = tables(shape, tokens)
    held = []

    def first(ids):
        held.clear()
        size = (2, 1, shape["num_key_value_heads"], tokens, shape["head_dim"])
        x = model.embedding(ids)
        for block in model.blocks:
            held.append(torch.empty(size, device="cuda", dtype=torch.bfloat16))
            x = block(x, cos, sin, *held[-1])
        return model.head(model.norm(x[:, -1:]))

    # Compiled for this length, by a prompt of this length.
    return read_prompt(first, BACKENDS[attention], shape, tokens, tokens) | {"attention": attention}


@torch.inference_mode()
def decode(ask):
    shape, batch, context = ask["shape"], ask["batch"], ask["tokens"]
    free()
    torch.cuda.reset_peak_memory_stats()
    model = compiled(make(shape, torch.bfloat16).requires_grad_(False))
    cos, sin = (table[-1:] for table in tables(shape, context))
    cache_shape = (2, batch, shape["num_key_value_heads"], context, shape["head_dim"])
    caches = [torch.randn(cache_shape, device="cuda", dtype=torch.bfloat16) for _ in model.blocks]
    token = torch.zeros(batch, 1, device="cuda", dtype=torch.long)

    def step():
        x = model.embedding(token)
        for block, cache in zip(model.blocks, caches):
            x = block(x, cos, sin, cache[0], cache[1])
        logits = model.head(model.norm(x)).float()
        token.copy_(logits[:, -1:].argmax(-1))

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    times = []
    for _ in range(64):
        begin = synced()
        graph.replay()
        token[0, 0].item()
        times.append(synced() - begin)
    return {"step_s": sorted(times)[len(times) // 2], **memory()}


# ---- Training


class ChunkedLoss(torch.autograd.Function):
    """Mean cross entropy of `x weight^T`; gradients are taken with the loss, so logits of one chunk live at a time."""

    @staticmethod
    def forward(ctx, x, weight, targets, rows=4096):
        narrow = weight.to(torch.bfloat16)
        d_x, d_weight = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        total = torch.zeros((), device=x.device)
        for first in range(0, len(x), rows):
            part = slice(first, first + rows)
            loss, d_x[part], d_w = loss_chunk(x[part], narrow, targets[part], 1.0 / len(x))
            d_weight += d_w
            total += loss
        ctx.save_for_backward(d_x, d_weight)
        return total

    @staticmethod
    def backward(ctx, d_loss):
        d_x, d_weight = ctx.saved_tensors
        return d_x * d_loss, d_weight * d_loss, None, None


@torch.compile(dynamic=False)
def loss_chunk(x, weight, targets, scale):
    logits = (x @ weight.T).float()
    log_p = torch.log_softmax(logits, -1)
    loss = -log_p.gather(1, targets[:, None]).sum() * scale
    ones = torch.arange(weight.shape[0], device=x.device)[None] == targets[:, None]
    d_logits = ((log_p.exp() - ones.float()) * scale).to(torch.bfloat16)
    return loss, d_logits @ weight, d_logits.T @ x


def faster_attention(shape, tokens, backward):
    """The backend with the faster forward (and backward) on this shape."""
    best, seconds, tokens = None, float("inf"), min(tokens, 32768)
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]

    def random(count):
        x = torch.randn(1, tokens, count, shape["head_dim"], device="cuda", dtype=torch.bfloat16)
        return x.transpose(1, 2).requires_grad_(backward)

    q, k, v = random(heads), random(kv_heads), random(kv_heads)
    for name, backend in BACKENDS.items():
        try:
            with sdpa_kernel(backend):
                for _ in range(2):
                    begin = synced()
                    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
                    if backward:
                        torch.autograd.grad(out, (q, k, v), out)
                    took = synced() - begin
            if took < seconds:
                best, seconds = name, took
        except RuntimeError:
            continue
    return best


def train_with(ask, attention, recompute):
    shape, count = ask["shape"], ask["tokens"]
    free()
    torch.cuda.reset_peak_memory_stats()
    model = compiled(make(shape, torch.float32))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    cos, sin = tables(shape, count)
    ids = torch.randint(shape["vocab_size"], (1, count + 1), device="cuda")

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            x = model.embedding(ids[:, :-1]).to(torch.bfloat16)
            for block in model.blocks:
                x = checkpoint(block, x, cos, sin, use_reentrant=False) if recompute else block(x, cos, sin)
            x = model.norm(x).to(torch.bfloat16)
        loss = ChunkedLoss.apply(x[0], model.head.weight, ids[0, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    with sdpa_kernel(BACKENDS[attention]):
        losses = [step().item(), step().item()]
        times, start = [], synced()
        while len(times) < ask["steps"] and time.perf_counter() - start < ask["seconds"]:
            begin = synced()
            losses.append(step().item())
            times.append(synced() - begin)
    return {
        "step_s": sorted(times)[len(times) // 2],
        "attention": attention,
        "recompute": recompute,
        "losses": [losses[0], losses[-1]],
        **memory(),
    }


def train(ask):
    free()
    attention = faster_attention(ask["shape"], ask["tokens"], backward=True)
    try:
        return train_with(ask, attention, False)
    except torch.OutOfMemoryError:
        pass
    return train_with(ask, attention, True)


# ---- The same numbers


@torch.inference_mode()
def check(ask):
    free()
    ids = torch.tensor([ask["tokens"]], device="cuda")

    def log_probabilities(logits):
        log_p = torch.log_softmax(logits[0, :-1].float(), -1)
        return log_p.gather(1, ids[0, 1:, None])[:, 0].tolist()

    torch.set_float32_matmul_precision("highest")
    with sdpa_kernel(SDPBackend.MATH):
        answer = {"reference": log_probabilities(logits(read_model(ask["folder"], torch.float32), ids))}
    torch.set_float32_matmul_precision("high")
    answer["compiled"] = log_probabilities(logits(compiled(read_model(ask["folder"], torch.bfloat16)), ids))
    for name, backend in BACKENDS.items():
        try:
            theirs = LlamaForCausalLM.from_pretrained(
                ask["folder"], dtype=torch.bfloat16, attn_implementation="sdpa"
            )
            with sdpa_kernel(backend):
                answer[name] = log_probabilities(theirs.cuda().eval()(ids, use_cache=False).logits)
        except Exception:  # The others are compared nevertheless.
            traceback.print_exc()
    return answer


def read_model(folder, dtype):
    """Model with the weights of a folder in the Hugging Face layout."""
    with open(f"{folder}/config.json") as file:
        shape = json.load(file)
    tensors = load_file(f"{folder}/model.safetensors", device="cuda")

    def stacked(layer, names):
        return torch.cat([tensors[f"model.layers.{layer}.{name}.weight"] for name in names])

    model = make(shape, dtype).requires_grad_(False)
    model.embedding.weight.copy_(tensors["model.embed_tokens.weight"])
    model.head.weight.copy_(tensors["lm_head.weight"])
    model.norm.weight.copy_(tensors["model.norm.weight"])
    for i, block in enumerate(model.blocks):
        block.norm.weight.copy_(stacked(i, ["input_layernorm"]))
        block.qkv.weight.copy_(stacked(i, [f"self_attn.{x}_proj" for x in "qkv"]))
        block.out.weight.copy_(stacked(i, ["self_attn.o_proj"]))
        block.mlp_norm.weight.copy_(stacked(i, ["post_attention_layernorm"]))
        block.gate_up.weight.copy_(stacked(i, ["mlp.gate_proj", "mlp.up_proj"]))
        block.down.weight.copy_(stacked(i, ["mlp.down_proj"]))
    return model


def logits(model, ids):
    dtype = model.head.weight.dtype
    cos, sin = (table.to(dtype) for table in tables(model.shape, ids.shape[1], torch.float32))
    x = model.embedding(ids)
    for block in model.blocks:
        x = block(x, cos, sin)
    return model.head(model.norm(x))


ACTIONS = {"check": check, "prefill": prefill, "decode": decode, "train": train, "free": lambda _: free() or {}}


def attempt(ask):
    try:
        return ACTIONS[ask["do"]](ask)
    except torch.OutOfMemoryError:
        failed = "out of memory"
    except Exception as error:  # What a peer cannot do must not end the bench.
        traceback.print_exc()
        text = str(error)
        failed = "out of memory" if "out of memory" in text.lower() else f"{type(error).__name__}: {text}"[:300]
    # The exception, and with it the frames that hold tensors, is gone here.
    gc.collect()
    torch.cuda.empty_cache()
    return {"failed": failed}


def main():
    reply({
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cudnn": torch.backends.cudnn.version(),
    })
    for line in sys.stdin:
        reply(attempt(json.loads(line)))


if __name__ == "__main__":
    main()
