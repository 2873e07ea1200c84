"""Checks the arguments of a call and describes them to `_native`, for arrays of any library."""

from typing import Any, NamedTuple, Optional, Protocol, Sequence

from .errors import ArgumentError


class Lengths(NamedTuple):
    """Valid rows; `None`: all rows, and 0 for `sink_len` and `query_start`."""

    segment_len: Any = None
    prior_len: Any = None
    past_len: Any = None
    sink_len: Any = None
    query_start: Any = None


class Roles(NamedTuple):
    """Which query heads read what."""

    past_gate: Any = None
    past_heads: Optional[Sequence[bool]] = None
    prior_heads: Optional[Sequence[bool]] = None


class Tensors(NamedTuple):
    """Of one type, `[batch, rows, heads, head_dim]`."""

    q: Any
    k: Any
    v: Any
    prior_k: Any = None
    prior_v: Any = None
    past_k: Any = None
    past_v: Any = None


class Library(Protocol):
    """What a call needs to know of arrays."""

    def description(self, array) -> tuple:
        """Address, shape, and strides in elements; the last dimension is contiguous."""

    def numbers(self, array) -> tuple:
        """Address and number of elements of contiguous numbers."""

    def host_or_address(self, name: str, values, kind: str):
        """A list of numbers of `kind` ("int32" or "float32"), or the address of them in device memory."""


def checked(tensors: Tensors) -> Tensors:
    """The tensors, whose types, dimensions and pairs fit."""
    for name, tensor in tensors._asdict().items():
        if tensor is None and name in ("q", "k", "v"):
            raise ArgumentError(name, "a tensor [batch, rows, heads, head_dim]", "None")
        if tensor is None:
            continue
        if tensor.ndim != 4:
            raise ArgumentError(name, "4 dimensions [batch, rows, heads, head_dim]", f"shape {tuple(tensor.shape)}")
        if tensor.dtype != tensors.q.dtype:
            raise ArgumentError(name, f"{tensors.q.dtype} like q", str(tensor.dtype))
    for k, v in [("prior_k", "prior_v"), ("past_k", "past_v")]:
        given = [getattr(tensors, k) is None, getattr(tensors, v) is None]
        if given[0] != given[1]:
            missing, other = (k, v) if given[0] else (v, k)
            raise ArgumentError(missing, f"a tensor, as {other} is there", "None")
    return tensors


def heads_of(name: str, heads: Optional[Sequence[bool]], count: int) -> list:
    """`[q_heads]` flags; all of them by default."""
    flags = [True] * count if heads is None else [bool(flag) for flag in heads]
    if len(flags) != count:
        raise ArgumentError(name, f"{count} flags, one for each query head", str(len(flags)))
    return flags


def arguments(library: Library, tensors: Tensors, roles: Roles, lengths: Lengths, scale: Optional[float]) -> dict:
    """The call as `_native` takes it. The tensors must outlive it."""

    def pair(k, v):
        return None if k is None else (library.description(k), library.description(v))

    heads = tensors.q.shape[2]
    past_heads = heads_of("past_heads", roles.past_heads, heads)
    gate = [1.0] * heads if roles.past_gate is None else roles.past_gate
    gate = library.host_or_address("past_gate", gate, "float32")
    if isinstance(gate, list):
        if len(gate) != heads:
            raise ArgumentError("past_gate", f"q_heads = {heads} elements", str(len(gate)))
        gate = [weight if reads else 0.0 for weight, reads in zip(gate, past_heads)]
    rows = {}
    for name, values in lengths._asdict().items():
        if values is None:
            rows[name] = None
            continue
        numbers = library.host_or_address(name, values, "int32")
        per_head = name in ("past_len", "sink_len")
        rows[name] = (numbers, getattr(values, "ndim", 1) == 2) if per_head else numbers
    return {
        "q": library.description(tensors.q),
        "k": library.description(tensors.k),
        "v": library.description(tensors.v),
        "prior": pair(tensors.prior_k, tensors.prior_v),
        "past": pair(tensors.past_k, tensors.past_v),
        "past_gate": gate,
        "past_heads": past_heads,
        "prior_heads": heads_of("prior_heads", roles.prior_heads, heads),
        "scale": scale,
        **rows,
    }


def upstream(library: Library, out, lse, d_out, d_lse) -> dict:
    """What a backward pass reads beside the call, as `_native` takes it."""
    return {
        "out": library.description(out),
        "lse": library.numbers(lse),
        "d_out": library.description(d_out),
        "d_lse": None if d_lse is None else library.numbers(d_lse),
    }


def targets(library: Library, gradients: Sequence, d_prior: Optional[Sequence], d_past_gate) -> dict:
    """Where a backward pass writes the gradients of q, k and v, of the prior's keys and values, and of the gates."""
    d_q, d_k, d_v = map(library.description, gradients)
    return {
        "d_q": d_q,
        "d_k": d_k,
        "d_v": d_v,
        "d_prior": None if d_prior is None else tuple(map(library.description, d_prior)),
        "d_past_gate": library.numbers(d_past_gate),
    }
