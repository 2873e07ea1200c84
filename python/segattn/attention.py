"""Segment attention: one softmax over the rows of a segment, the tail of the segment before, and retrieved rows."""

import sys
from typing import Optional, Sequence

from . import _numpy
from ._arguments import Lengths, Roles, Tensors
from ._numpy import Gradients
from .errors import ArgumentError


def segment_attention(
    q,
    k,
    v,
    *,
    prior_k=None,
    prior_v=None,
    past_k=None,
    past_v=None,
    past_gate=None,
    past_heads: Optional[Sequence[bool]] = None,
    prior_heads: Optional[Sequence[bool]] = None,
    segment_len=None,
    prior_len=None,
    past_len=None,
    sink_len=None,
    query_start=None,
    softmax_scale: Optional[float] = None,
    return_lse: bool = False,
):
    """Attention of a segment's queries to the segment itself (causal), to its prior rows and to past rows.

    Shapes (docs/contract.md, section 1):

        q                   [batch, rows, q_heads, head_dim]
        k, v                [batch, segment, kv_heads, head_dim]; q_heads is a multiple of kv_heads
        prior_k, prior_v    [batch, prior, kv_heads, head_dim]: the tail of the segment before
        past_k, past_v      [batch, past, kv_heads, head_dim]: retrieved rows; they get no gradient
        past_gate           [q_heads] float32, at least 0: the weight of the past rows in each head; 1 by default
        past_heads          [q_heads] flags: which query heads read the past rows; all by default
        prior_heads         [q_heads] flags: which query heads read the prior rows; all by default
        segment_len         [batch] integers: valid rows of k and v; all by default
        prior_len           [batch] integers: valid rows of the prior; all by default
        past_len            [batch] or [batch, kv_heads] integers: valid rows of the past; all by default
        sink_len            as past_len: first rows of the past that every head reads with weight 1; 0 by default
        query_start         [batch] integers: position of the first query row in its segment; 0 by default

    Returns `out`, shaped like q, and with `return_lse` also the log-sum-exp of the scores, [batch, q_heads, rows].
    Padding rows of `out` are 0, of the log-sum-exp -inf.

    numpy arrays and CPU tensors are float32, computed on all cores (head_dim: multiples of 8 up to 256), or float64,
    computed by a slow reference. CUDA tensors are bfloat16 or float16. A tensor whose last dimension is not contiguous
    is copied; all other strides are used as they are.

    PyTorch tensors have gradients for q, k, v, prior_k, prior_v, past_gate, and through the log-sum-exp.

    Raises `ArgumentError`, which names the argument, what was expected and what came.
    """
    tensors = Tensors(q, k, v, prior_k, prior_v, past_k, past_v)
    roles = Roles(past_gate, past_heads, prior_heads)
    lengths = Lengths(segment_len, prior_len, past_len, sink_len, query_start)
    out, lse = _library(q).forward(tensors, roles, lengths, softmax_scale)
    return (out, lse) if return_lse else out


def segment_attention_backward(
    d_out,
    q,
    k,
    v,
    out,
    lse,
    *,
    d_lse=None,
    prior_grad: bool = True,
    prior_k=None,
    prior_v=None,
    past_k=None,
    past_v=None,
    past_gate=None,
    past_heads: Optional[Sequence[bool]] = None,
    prior_heads: Optional[Sequence[bool]] = None,
    segment_len=None,
    prior_len=None,
    past_len=None,
    sink_len=None,
    softmax_scale: Optional[float] = None,
) -> Gradients:
    """The gradients of numpy arrays, from those of `out` and, optionally, of `lse`; PyTorch calls it by itself.

    out, lse: what `segment_attention` returned. Without `prior_grad` the gradients of the prior rows are left out. All
    other arguments are those of `segment_attention`; query_start must be 0.
    """
    if _library(q) is not _numpy:
        raise ArgumentError("q", "a numpy array; PyTorch tensors have .backward()", type(q).__name__)
    tensors = Tensors(q, k, v, prior_k, prior_v, past_k, past_v)
    roles = Roles(past_gate, past_heads, prior_heads)
    lengths = Lengths(segment_len, prior_len, past_len, sink_len)
    return _numpy.backward(tensors, roles, lengths, softmax_scale, (out, lse, d_out, d_lse), prior_grad)


def _library(q):
    """The module that computes arrays like q. PyTorch is not imported before a tensor of it comes."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(q, torch.Tensor):
        from . import _torch

        return _torch
    return _numpy
