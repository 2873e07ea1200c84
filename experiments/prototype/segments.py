"""Where segments begin, which rows each one sees, and which past rows it chooses (contract, second edition).

All segments of all sequences of a batch are computed side by side. Tokens are flat: token t of sequence b is row
b * length + t. The prior and the current rows of a segment keep their true distances, so they are read where they are.
Only the sinks and the past rows get new positions: they are copied to `extra` rows after the tokens. Each segment has
the same number of them, aligned to the right: [unused | sinks | past]; the last one is right before the prior tail.
"""

from dataclasses import dataclass

import numpy as np
import torch

BLOCK = 128


@dataclass(frozen=True)
class Config:
    segment_len: int = 1024  # 0: full attention
    prior_len: int = 128
    past_len: int = 128
    sinks: int = 4
    queries: int = 16
    window_len: int = 32
    readers: object = "all"  # or a set of (layer, kv head) that read the past

    def reads(self, layer, kv_heads):
        if not self.past_len:
            return [False] * kv_heads
        return [self.readers == "all" or (layer, h) in self.readers for h in range(kv_heads)]


def starts(length, breaks, segment_len):
    """First tokens of the segments: at every break and, counted from the last one, after every segment_len."""
    result, cuts = [], sorted({0, *breaks, length})
    for begin, end in zip(cuts, cuts[1:]):
        result += range(begin, end, segment_len)
    return result


class Plan:
    """Segments of a batch of sequences of one length, as tensors [batch, segments]; unused segments are last."""

    def __init__(self, config, batch, length, breaks, device, segments=None):
        self.config, self.batch, self.length = config, batch, length
        rows = [starts(length, b, config.segment_len) for b in breaks]
        count = segments or max(map(len, rows))
        assert all(len(r) <= count for r in rows), f"segments: expected at most {count}, got {max(map(len, rows))}"
        start = np.full((batch, count), length, np.int64)
        seg_of = np.empty((batch, length), np.int64)
        for b, row in enumerate(rows):
            start[b, : len(row)] = row
            seg_of[b] = b * count + np.searchsorted(row, np.arange(length), side="right") - 1
        tail = np.maximum(start - config.prior_len, 0)
        used = start < length
        sinks = np.where(used, np.minimum(config.sinks, tail), 0)
        past = np.where(used, np.minimum(config.past_len, tail - sinks), 0)
        previous = np.concatenate([np.zeros((batch, 1), np.int64), start[:, :-1]], 1)
        probe = start[..., None] - config.queries + np.arange(config.queries)
        self.count, self.active = count, max(map(len, rows))
        to = lambda a: torch.from_numpy(a).to(device)
        self.seg_of, self.start, self.tail = to(seg_of.reshape(-1)), to(start), to(tail)
        self.sinks, self.past = to(sinks), to(past)
        self.probe_valid = to((probe >= previous[..., None]) & used[..., None])
        self.probe = to(np.maximum(probe, 0))
        self.first_tail = to((tail + np.arange(batch)[:, None] * length).reshape(-1))
        self.device = device

    def extra(self, reads_any):
        """Extra rows a segment: sinks, and past rows where any head of the layer reads them; whole blocks."""
        rows = self.config.sinks + (self.config.past_len if reads_any else 0)
        return -(-rows // BLOCK) * BLOCK

    def positions(self, extra):
        """Positions of the extra rows in their sequence, [batch, segments, extra]; >= -extra."""
        return self.tail[..., None] - extra + torch.arange(extra, device=self.device)

    def first_row(self, reads, extra):
        """First valid extra row, [batch, segments, kv heads]."""
        reads = torch.tensor(reads, device=self.device)
        return extra - self.sinks[..., None] - self.past[..., None] * reads

    def rows(self, chosen, reads, extra):
        """Token that each extra row copies, [batch, segments, kv heads, extra]; unused rows copy token 0."""
        first = self.first_row(reads, extra)[..., None]
        r = torch.arange(extra, device=self.device)
        sink = (r - first).clamp(0, max(self.config.sinks - 1, 0))
        if chosen is None:
            return sink
        shift = (r - (extra - chosen.shape[-1])).clamp(min=0).expand(*chosen.shape[:-1], extra)
        reads = torch.tensor(reads, device=self.device)[:, None]
        is_past = reads & (r >= first + self.sinks[..., None, None])
        return torch.where(is_past, chosen.gather(-1, shift), sink)


def shares(q, k, probe_rows, probe_valid, low, high):
    """Score of each token: its largest share of a probe's softmax over the eligible tokens [low, high).

    q [batch, length, q heads, head_dim], k [batch, length, kv heads, head_dim], both before RoPE;
    probe_rows, probe_valid [batch, segments, queries]; low, high [batch, segments].
    Returns [batch, kv heads, segments, length] f32; tokens that are not eligible have -1.
    """
    batch, length, kv_heads, dim = k.shape
    group = q.shape[2] // kv_heads
    segments, queries = probe_rows.shape[1:]
    index = probe_rows.reshape(batch, -1, 1, 1).expand(-1, -1, q.shape[2], dim)
    probe = q.float().gather(1, index).view(batch, segments * queries, kv_heads, group, dim)
    probe = probe.permute(0, 2, 1, 3, 4).reshape(batch, kv_heads, -1, dim)
    logits = probe @ k.float().permute(0, 2, 3, 1) * dim**-0.5
    logits = logits.view(batch, kv_heads, segments, queries * group, length)
    t = torch.arange(length, device=q.device)
    eligible = ((t >= low[..., None]) & (t < high[..., None]))[:, None, :, None]
    logits = logits.masked_fill(~eligible, -1e30)
    total = logits.logsumexp(-1, keepdim=True)
    valid = probe_valid[:, None, :, :, None].expand(-1, kv_heads, -1, -1, group).reshape(total.shape)
    total = torch.where(valid, total, 1e30)
    score = (logits - total).amax(3).exp()
    return torch.where(eligible[:, :, :, 0], score, -1.0)


def take(score, left, low, high, begins, ends, window_len):
    """One step of the choice: marks the window around the best free token as taken (score 2).

    score [batch, kv heads, segments, length]; left (rows to fill), low, high [batch, kv heads, segments]; begins and
    ends [..., steps]: the windows so far, empty ones are [0, 0). Returns score, left, begin, end.
    """
    best = torch.where(score > 1.5, -1.0, score).argmax(-1)
    width = left.clamp(max=window_len)
    begin = torch.minimum(torch.maximum(best - width // 2, low), high - width)
    end = begin + width
    before = (ends > begins) & (ends <= best[..., None])
    after = (ends > begins) & (begins > best[..., None])
    begin = torch.maximum(begin, torch.where(before, ends, 0).amax(-1))
    end = torch.minimum(end, torch.where(after, begins, score.shape[-1]).amin(-1))
    used = left > 0
    begin, end = torch.where(used, begin, 0), torch.where(used, end, 0)
    t = torch.arange(score.shape[-1], device=score.device)
    score = torch.where((t >= begin[..., None]) & (t < end[..., None]), 2.0, score)
    return score, left - (end - begin), begin, end


def choose(q, k, plan, count, shares=shares, take=take):
    """Past rows of the first `count` segments of each sequence (the others get token 0), in order of position:
    [batch, segments, kv heads, past_len] tokens of the sequence.

    Where fewer are eligible, they stand at the right. Windows are cut where they meet, so more than
    past_len / window_len may be needed; what `steps` windows do not fill is filled with the best single tokens.
    """
    config = plan.config
    steps = 2 * config.past_len // config.window_len + 2
    score = shares(q, k, *(a[:, :count] for a in (plan.probe, plan.probe_valid, plan.sinks, plan.tail)))
    grow = lambda a: a[:, None, :count].expand(-1, k.shape[2], -1).contiguous()
    low, high, left = grow(plan.sinks), grow(plan.tail), grow(plan.past)
    begins, ends = torch.zeros(2, *left.shape, steps, dtype=left.dtype, device=left.device)
    for i in range(steps):
        score, left, begins[..., i], ends[..., i] = take(score, left, low, high, begins, ends, config.window_len)
    width = min(config.past_len, score.shape[-1])
    best, index = score.topk(width, -1)
    index = torch.where(best >= 0, index, -1).sort(-1).values.clamp(min=0)
    index = torch.nn.functional.pad(index, (config.past_len - width, 0, 0, plan.count - count))
    return index.transpose(1, 2)


def visible(plan, reads, extra, group):
    """Who sees whom: a function of (batch, q head, query row, key row) for flex_attention.

    Keys are the tokens, then the extra rows; `group`: query heads of a KV head.
    """
    tokens = plan.batch * plan.length
    kv_heads = len(reads)
    seg_of, first_tail = plan.seg_of.int(), plan.first_tail.int()
    first = plan.first_row(reads, max(extra, 1)).reshape(-1).int()

    def mask(b, h, q, k):
        segment = seg_of[q]
        seen = (k <= q) & (k >= first_tail[segment])
        if not extra:
            return seen
        row = torch.where(k >= tokens, k - tokens, 0)
        kv_head = h // group
        valid = (row // extra == segment) & (row % extra >= first[segment * kv_heads + kv_head])
        return seen | ((k >= tokens) & valid)

    return mask


def block_mask(plan, reads, extra, mask):
    """The block structure of `visible` for flex_attention, computed from the plan instead of row by row."""
    from torch.nn.attention.flex_attention import BlockMask

    device, tokens = plan.device, plan.batch * plan.length
    blocks, keys = tokens // BLOCK, tokens // BLOCK + plan.batch * plan.count * extra // BLOCK
    low, high = plan.seg_of[::BLOCK, None], plan.seg_of[BLOCK - 1 :: BLOCK, None]
    row, column = torch.arange(blocks, device=device)[:, None], torch.arange(keys, device=device)[None]
    local = column < blocks
    seen = local & (column <= row) & (column >= plan.first_tail[low] // BLOCK)
    full = local & (column < row) & (column * BLOCK >= plan.first_tail[high])
    if extra:
        extra_row = (column - blocks).clamp(min=0) * BLOCK
        segment, inside = extra_row // extra, extra_row % extra
        first = plan.first_row(reads, extra).view(-1, len(reads))
        mine = ~local & (segment >= low) & (segment <= high)
        seen = seen | (mine & (inside + BLOCK > first.amin(1)[segment]))
        full = full | (mine & (low == high) & (inside >= first.amax(1)[segment]))
    seen = seen & ~full

    def listed(m):
        order = torch.argsort(m.int(), dim=1, descending=True, stable=True).int()
        return m.sum(1, dtype=torch.int32)[None, None], order[None, None]

    return BlockMask.from_kv_blocks(*listed(seen), *listed(full), BLOCK_SIZE=BLOCK, mask_mod=mask,
                                    seq_lengths=(tokens, tokens + plan.batch * plan.count * extra))
