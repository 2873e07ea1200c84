"""Segment attention as a PyTorch module."""

from typing import Optional, Sequence, Tuple

import torch

from .attention import segment_attention


class SegmentAttention(torch.nn.Module):
    """Segment attention with the roles of its heads: which read the prior rows, which the past, and how strongly.

    prior_heads, past_heads: `[q_heads]` flags; all heads by default. With `learn_gates` the weight of the past is a
    parameter `past_gate`, 1 at first; an optimizer must keep it above 0. The module has no other parameters.
    """

    def __init__(
        self,
        q_heads: int,
        *,
        prior_heads: Optional[Sequence[bool]] = None,
        past_heads: Optional[Sequence[bool]] = None,
        learn_gates: bool = False,
        softmax_scale: Optional[float] = None,
    ) -> None:
        super().__init__()
        self.prior_heads = [True] * q_heads if prior_heads is None else [bool(flag) for flag in prior_heads]
        self.past_heads = [True] * q_heads if past_heads is None else [bool(flag) for flag in past_heads]
        self.softmax_scale = softmax_scale
        gate = torch.nn.Parameter(torch.ones(q_heads, dtype=torch.float32)) if learn_gates else None
        self.register_parameter("past_gate", gate)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        prior: Optional[Tuple[torch.Tensor, torch.Tensor]] = None,
        past: Optional[Tuple[torch.Tensor, torch.Tensor]] = None,
        return_lse: bool = False,
        **lengths,
    ):
        """`segment_attention` of these tensors; prior and past are pairs of keys and values.

        lengths: `segment_len`, `prior_len`, `past_len`, `sink_len`, `query_start`.
        """
        prior_k, prior_v = (None, None) if prior is None else prior
        past_k, past_v = (None, None) if past is None else past
        return segment_attention(
            q,
            k,
            v,
            prior_k=prior_k,
            prior_v=prior_v,
            past_k=past_k,
            past_v=past_v,
            past_gate=None if past is None else self.past_gate,
            past_heads=self.past_heads,
            prior_heads=self.prior_heads,
            softmax_scale=self.softmax_scale,
            return_lse=return_lse,
            **lengths,
        )
