"""A Llama decoder with segment attention (or full attention), all segments of a batch at once, layer by layer."""

import torch
import torch.nn.functional as F

import segments
from segments import Config, Plan  # noqa: F401

CHUNK = 16384  # tokens whose logits exist at a time


def rms(x, weight, eps):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def rotate(x, cos, sin):
    """RoPE, "rotate half"; cos and sin [..., 1, head_dim / 2] in f32."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def before_attention(x, norm, weight, cos, sin, eps, dtype, q_heads, kv_heads):
    """Returns q and k before RoPE, v, then q and k after it; [tokens, heads, head_dim]."""
    y = F.linear(rms(x, norm, eps).to(dtype), weight.to(dtype))
    y = y.view(len(x), q_heads + 2 * kv_heads, -1)
    q, k, v = y.split([q_heads, kv_heads, kv_heads], 1)
    return q, k, v, rotate(q, cos, sin), rotate(k, cos, sin)


def after_attention(x, o, out, norm, gate_up, down, eps, dtype):
    x = x + F.linear(o, out.to(dtype))
    gate, up = F.linear(rms(x, norm, eps).to(dtype), gate_up.to(dtype)).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, down.to(dtype))


def extra_rows(k, v, index, cos, sin):
    """Copies of sinks and past rows at their new positions; no gradient. index [batch, segments, kv heads, rows]."""
    batch, count, heads, rows = index.shape
    flat = index.transpose(1, 2).reshape(batch, heads, -1, 1).expand(-1, -1, -1, k.shape[-1])
    k = k.transpose(1, 2).gather(2, flat).view(batch, heads, count, rows, -1)
    v = v.transpose(1, 2).gather(2, flat)
    k = rotate(k, cos[:, None], sin[:, None]).reshape(v.shape)
    return k.transpose(0, 1).flatten(1, 2), v.transpose(0, 1).flatten(1, 2)


def token_losses(h, embed, targets):
    """Nats of each target; h [tokens, width]."""
    logits = F.linear(h, embed).float()
    return F.cross_entropy(logits, targets, reduction="none")


class Functions:
    """The parts of a step, compiled where there is a GPU. Shapes are few and fixed, weights are arguments."""

    def __init__(self, fast):
        wrap = (lambda f: torch.compile(f, dynamic=False)) if fast else (lambda f: f)
        for f in (before_attention, after_attention, extra_rows, token_losses):
            setattr(self, f.__name__, wrap(f))
        self.shares, self.take = wrap(segments.shares), wrap(segments.take)
        self.flex = None
        if fast:
            import torch._dynamo as dynamo

            dynamo.config.recompile_limit = 64
            from torch.nn.attention.flex_attention import flex_attention

            self.flex = torch.compile(flex_attention, dynamic=False)


class Llama(torch.nn.Module):
    def __init__(self, shape, state, functions, dtype):
        super().__init__()
        self.shape, self.functions, self.dtype = shape, functions, dtype
        self.w = torch.nn.ParameterDict({k.replace(".", "_"): torch.nn.Parameter(v.clone()) for k, v in state.items()})
        self.head_dim = shape["width"] // shape["q_heads"]
        self.tables = {}

    def table(self, low, high, device):
        """cos and sin of the positions low, low + 1, ..., high - 1 (angles in f64)."""
        if (low, high) not in self.tables:
            half = self.head_dim // 2
            frequency = self.shape["theta"] ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
            angle = torch.arange(low, high, dtype=torch.float64, device=device)[:, None] * frequency
            self.tables[low, high] = angle.cos().float(), angle.sin().float()
        return self.tables[low, high]

    def forward(self, ids, config, breaks=None, plan_segments=None, watch=None):
        """Hidden states [batch, length, width] before the head.

        watch(layer, chosen, plan) is called with the rows that each segment of a reading layer has chosen.
        """
        batch, length = ids.shape
        s, w, f = self.shape, self.w, self.functions
        heads, kv_heads = s["q_heads"], s["kv_heads"]
        cos, sin = (t.repeat(batch, 1)[:, None] for t in self.table(0, length, ids.device))
        x = F.embedding(ids.reshape(-1), w["embed"])
        plan = kinds = None
        if config.segment_len:
            plan = Plan(config, batch, length, breaks or [[]] * batch, ids.device, plan_segments)
            kinds = {}
        for i in range(s["layers"]):
            q, k, v, q_rot, k_rot = f.before_attention(
                x, w[f"{i}_norm1"], w[f"{i}_qkv"], cos, sin, s["eps"], self.dtype, heads, kv_heads
            )
            if plan is None:
                fold = lambda a: a.view(batch, length, -1, self.head_dim).transpose(1, 2)
                o = F.scaled_dot_product_attention(fold(q_rot), fold(k_rot), fold(v), is_causal=True, enable_gqa=True)
                o = o.transpose(1, 2).reshape(batch * length, -1)
            else:
                o = self.segment_attention(i, plan, kinds, (q, k, v, q_rot, k_rot), watch)
            x = f.after_attention(x, o, w[f"{i}_out"], w[f"{i}_norm2"], w[f"{i}_gate_up"], w[f"{i}_down"], s["eps"],
                                  self.dtype)
        return rms(x, w["norm"], s["eps"]).to(self.dtype).view(batch, length, -1)

    def segment_attention(self, layer, plan, kinds, parts, watch):
        q, k, v, q_rot, k_rot = parts
        f, batch, length = self.functions, plan.batch, plan.length
        reads = plan.config.reads(layer, k.shape[1])
        if tuple(reads) not in kinds:
            extra = plan.extra(any(reads))
            mask = segments.visible(plan, reads, extra, q.shape[1] // k.shape[1])
            cos, sin = self.table(-extra, length, q.device)
            position = plan.positions(extra) + extra
            kinds[tuple(reads)] = (extra, mask, cos[position], sin[position],
                                   segments.block_mask(plan, reads, extra, mask) if f.flex else None)
        extra, mask, cos, sin, blocks = kinds[tuple(reads)]
        keys, values = k_rot.transpose(0, 1), v.transpose(0, 1)
        if extra:
            with torch.no_grad():
                fold = lambda a: a.detach().view(batch, length, -1, self.head_dim)
                chosen = None
                if any(reads):
                    chosen = segments.choose(fold(q), fold(k), plan, *(
                        (plan.count, f.shares, f.take) if self.training else (plan.active,)))
                    if watch:
                        watch(layer, chosen, plan)
                more_k, more_v = f.extra_rows(fold(k), fold(v), plan.rows(chosen, reads, extra), cos, sin)
            keys, values = torch.cat([keys, more_k], 1), torch.cat([values, more_v], 1)
        queries = q_rot.transpose(0, 1)[None]
        if blocks is not None:
            o = f.flex(queries, keys[None], values[None], block_mask=blocks, enable_gqa=True)
        else:
            h, r, c = (torch.arange(n, device=q.device) for n in (q.shape[1], len(q), keys.shape[1]))
            seen = mask(0, h[:, None, None], r[:, None], c)
            o = F.scaled_dot_product_attention(queries, keys[None], values[None], attn_mask=seen[None], enable_gqa=True)
        return o[0].transpose(0, 1).reshape(len(q), -1)

    def losses(self, hidden, targets):
        """Nats of each target [batch, length] given hidden states of the same places."""
        embed = self.w["embed"].to(self.dtype)
        h, t = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        parts = zip(h.split(CHUNK), t.split(CHUNK))
        return torch.cat([self.functions.token_losses(a, embed, b) for a, b in parts]).view(targets.shape)
