"""Llama models of Hugging Face Transformers in segments, with state and retrieval (docs/contract.md, section 2).

    model = segattn.transformers.from_pretrained("run/checkpoints/step-0000000030")
    loss = model(input_ids, labels=input_ids).loss

Projections, norms and MLPs are those of Transformers; attention, segments and retrieval are those of segattn. A
forward pass takes whole sequences from their first token on. To generate, use `segattn.Generator`.
"""

import json
import os
from typing import Optional, Sequence, Union

import torch
import transformers

from . import _native
from ._torch import Torch
from .attention import segment_attention
from .errors import ArgumentError

_NAME = "segattn"
_ROPES = ("default", "linear", "llama3")


def from_pretrained(folder: Union[str, os.PathLike], **options) -> torch.nn.Module:
    """`AutoModelForCausalLM.from_pretrained` of a model folder, in segments as its config.json says.

    options go to Transformers, for example `dtype=torch.float32`.
    """
    options.setdefault("dtype", torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    run_in_segments(model)
    _load_gates(model, os.fspath(folder))
    return model


def run_in_segments(model: torch.nn.Module, segment: Optional[dict] = None, *, detach_state: bool = False) -> None:
    """Makes a Llama model run in segments from now on.

    segment: the `segment` object of docs/contract.md, section 2; by default that of the model's config. The gradient
    flows from segment to segment through the tail, over the whole sequence; with `detach_state` it stays in each
    segment (TBPTT(0)). Layers that read the past get a parameter `past_gate`, 1 for every head.

    `model(input_ids, breaks=[...])` ends segments at these positions too. There is no padding and no cache.
    """
    base = getattr(model, "model", model)
    if model.config.model_type != "llama" or not hasattr(base, "layers"):
        raise ArgumentError("model", "a Llama model", model.config.model_type)
    segment = getattr(model.config, "segment", None) if segment is None else segment
    if segment is None:
        raise ArgumentError("segment", "the segment object of docs/contract.md, section 2", "None")
    rope = base.rotary_emb
    if rope.rope_type not in _ROPES or rope.attention_scaling != 1:
        raise ArgumentError("model", f"rotary positions of type {', '.join(_ROPES)}", rope.rope_type)
    model.config.segment = segment
    runner = _Runner(base, _own_config(model.config, segment), detach_state)
    transformers.AttentionInterface.register(_NAME, _attend)
    model.set_attn_implementation(_NAME)
    base.forward = runner


def _own_config(config, segment: dict) -> str:
    """The part of config.json that segments depend on."""
    heads = config.num_attention_heads
    return json.dumps(
        {
            "model_type": "llama",
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
            "segment": segment,
        }
    )


def _load_gates(model: torch.nn.Module, folder: str) -> None:
    """Reads the past gates, which Transformers does not know."""
    from safetensors import safe_open

    gates = {name: gate for name, gate in model.named_parameters() if name.endswith(".past_gate")}
    files = [name for name in sorted(os.listdir(folder)) if name.endswith(".safetensors")] if gates else []
    for name in files:
        with safe_open(os.path.join(folder, name), "pt") as tensors:
            for key in gates.keys() & set(tensors.keys()):
                gates[key].data.copy_(tensors.get_tensor(key))


class _Runner:
    """The forward pass of the decoder, segment by segment."""

    def __init__(self, base: torch.nn.Module, config: str, detach_state: bool) -> None:
        self.base, self.config, self.detach_state = base, config, detach_state
        self.whole = base.forward
        self.plan = _native.segment_plan(config)
        for layer, past_heads in zip(base.layers, self.plan.past_heads):
            attention = layer.self_attn
            if past_heads and not hasattr(attention, "past_gate"):
                device = attention.q_proj.weight.device
                gate = torch.ones(base.config.num_attention_heads, dtype=torch.float32, device=device)
                attention.register_parameter("past_gate", torch.nn.Parameter(gate))

    def __call__(self, input_ids=None, attention_mask=None, inputs_embeds=None, breaks: Sequence[int] = (), **kwargs):
        for name in ("past_key_values", "cache", "position_ids"):
            if kwargs.pop(name, None) is not None:
                raise ArgumentError(name, "None: segments have states and positions of their own", "a value")
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ArgumentError("attention_mask", "ones: sequences without padding", "zeros in it")
        if input_ids is None:
            raise ArgumentError("input_ids", "token ids", "None")
        if self.base.gradient_checkpointing and self.base.training:
            raise ArgumentError("model", "one without gradient checkpointing", "gradient checkpointing")
        ends = [_native.segments(self.config, ids, list(breaks)) for ids in input_ids.tolist()]
        if any(other != ends[0] for other in ends):
            raise ArgumentError("input_ids", "sequences whose segments end at the same places", "break ids elsewhere")
        kwargs["use_cache"] = False
        embeds = self.base.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        states = [_State(self, layer) for layer in range(len(self.base.layers))]
        hidden = []
        for first, end in ends[0]:
            # At position 0 the rotation of Transformers changes nothing: queries and keys arrive unrotated.
            positions = torch.zeros(1, end - first, dtype=torch.long, device=embeds.device)
            is_last = end == input_ids.shape[1]
            for state in states:
                state.is_last = is_last
            part = self.whole(
                inputs_embeds=embeds[:, first:end], position_ids=positions, segattn_states=states, **kwargs
            )
            hidden.append(part.last_hidden_state)
        part.last_hidden_state = torch.cat(hidden, 1)
        return part


def _attend(module, query, key, value, attention_mask, segattn_states=None, dropout=0.0, **_):
    """The attention function that Transformers calls: `[batch, heads, rows, head_dim]`, unrotated."""
    if segattn_states is None:
        raise ArgumentError("model", "one that run_in_segments has made", "one that only names the attention segattn")
    if dropout:
        raise ArgumentError("attention_dropout", "0", str(dropout))
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return segattn_states[module.layer_idx].attend(module, q, k, v), None


class _State:
    """What a layer carries from segment to segment: tail, sinks, pool and selection, before rotation."""

    def __init__(self, runner: _Runner, layer: int) -> None:
        self.runner, self.plan, self.layer = runner, runner.plan, layer
        self.past_heads, prior_heads = self.plan.past_heads[layer], self.plan.prior_heads[layer]
        self.prior = [self.plan.prior_len if reads else 0 for reads in prior_heads]
        config = runner.base.config
        group = config.num_attention_heads // config.num_key_value_heads
        kv_heads = [head // group for head in range(config.num_attention_heads)]
        self.roles = {
            "prior_heads": [prior_heads[head] for head in kv_heads],
            "past_heads": [head in self.past_heads for head in kv_heads],
        }
        self.tokens, self.is_last = 0, False
        self.tail = self.sinks = self.selected = None
        self.pool = []

    def attend(self, module, q, k, v):
        rows = q.shape[1]
        current = torch.arange(rows, device=q.device)[:, None]
        given = {"softmax_scale": module.scaling, **self.roles}
        if self.tail is not None:
            count = self.tail[0].shape[1]
            given["prior_k"] = self.rotate(self.tail[0], torch.arange(-count, 0, device=q.device)[:, None])
            given["prior_v"] = self.tail[1]
        if self.tokens:
            given.update(self.past(module, q))
        out = segment_attention(self.rotate(q, current), self.rotate(k, current), v, **given)
        if not self.is_last:
            self.close(q, k, v)
        return out

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`[batch, rows, heads, head_dim]` at positions of shape [rows, 1], or [batch, rows, heads]."""
        # Transformers has positions of the shape [batch, rows].
        tables = self.runner.base.rotary_emb(x, positions.reshape(1, -1))
        cos, sin = (table.reshape(*positions.shape, -1) for table in tables)
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    def past(self, module, q: torch.Tensor) -> dict:
        """Sinks and selected rows of every KV head, and how many there are."""
        batch, heads = q.shape[0], len(self.prior)
        kept = 0 if self.sinks is None else self.sinks[0].shape[1]
        tails = [min(prior, self.tokens) for prior in self.prior]
        sinks = [min(kept, self.tokens - tail) for tail in tails]
        chosen = [[[] for _ in range(heads)] for _ in range(batch)]
        for b, of_heads in enumerate(self.selected or []):
            for head, tokens in zip(self.past_heads, of_heads):
                chosen[b][head] = tokens
        lengths = [[sinks[h] + len(chosen[b][h]) for h in range(heads)] for b in range(batch)]
        most = max(map(max, lengths))
        if most == 0:
            return {}
        k, v = (torch.zeros(batch, most, heads, q.shape[-1], dtype=q.dtype, device=q.device) for _ in range(2))
        pool = [torch.cat(parts, 1) for parts in zip(*self.pool)]
        for h in range(heads):
            for place, rows in zip((k, v), self.sinks or ()):
                place[:, : sinks[h], h] = rows[:, : sinks[h], h]
            for b in range(batch):
                if chosen[b][h]:
                    at = torch.tensor(chosen[b][h], device=q.device)
                    for place, rows in zip((k, v), pool):
                        place[b, sinks[h] : lengths[b][h], h] = self.rounded(rows[b, at, self.past_heads.index(h)])
        # The last row of a head stands directly before its prior rows.
        ends = torch.tensor(lengths)[:, None] + torch.tensor(tails)
        positions = (torch.arange(most)[:, None] - ends).to(q.device)
        return {
            "past_k": self.rotate(k, positions),
            "past_v": v,
            "past_gate": getattr(module, "past_gate", None),
            "past_len": torch.tensor(lengths, dtype=torch.int32),
            "sink_len": torch.tensor([sinks] * batch, dtype=torch.int32),
        }

    def rounded(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of one head as the pool holds them."""
        if self.plan.pool_bits == 16:
            return rows
        held = rows.float().cpu().contiguous()
        _native.round_to_pool(self.runner.config, Torch(held.device).numbers(held))
        return held.to(rows)

    @torch.no_grad()
    def retrieve(self, q: torch.Tensor) -> None:
        """Shortens the pool and selects past rows, by the last queries of the segment, on the CPU in f32."""
        self.shorten(self.asked(_native.beyond_length, q))
        self.selected = self.asked(_native.select, q)

    def asked(self, choose, q: torch.Tensor) -> list:
        """The tokens that each head of each sequence chooses of the pool."""
        queries = q[:, -self.plan.probe_rows :].float().cpu().contiguous()
        keys = torch.cat([part for part, _ in self.pool], 1).float().cpu().contiguous()
        tail = 0 if self.tail is None else self.tail[0].shape[1]
        numbers = Torch(keys.device).numbers
        return [
            choose(self.runner.config, self.layer, numbers(keys[b]), numbers(queries[b]), tail)
            for b in range(q.shape[0])
        ]

    def shorten(self, dropped: list) -> None:
        """Drops these tokens of each sequence and head, as many of each."""
        if not dropped[0][0]:
            return
        pool = [torch.cat(parts, 1) for parts in zip(*self.pool)]
        tokens = pool[0].shape[1]
        kept = [[sorted(set(range(tokens)).difference(of_head)) for of_head in heads] for heads in dropped]
        # [batch, tokens, heads, 1]
        at = torch.tensor(kept, device=pool[0].device).transpose(1, 2)[..., None]
        self.pool = [[rows.gather(1, at.expand(-1, -1, -1, rows.shape[-1])) for rows in pool]]

    def close(self, q, k, v) -> None:
        """Ends the segment."""
        if any(self.prior):
            tail = [k, v] if self.tail is None else [torch.cat(pair, 1) for pair in zip(self.tail, (k, v))]
            tail = [rows[:, -self.plan.prior_len :] for rows in tail]
            self.tail = [rows.detach() for rows in tail] if self.runner.detach_state else tail
        missing = self.plan.sink_len - self.tokens
        if missing > 0:
            first = [rows[:, :missing].detach() for rows in (k, v)]
            self.sinks = first if self.sinks is None else [torch.cat(pair, 1) for pair in zip(self.sinks, first)]
        self.tokens += q.shape[1]
        if self.past_heads:
            self.pool.append([rows[:, :, self.past_heads].detach() for rows in (k, v)])
            self.retrieve(q.detach())
