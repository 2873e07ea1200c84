"""The operation on numpy arrays."""

from typing import NamedTuple, Optional

import numpy as np

from . import _native
from ._arguments import Lengths, Roles, Tensors, arguments, checked, targets, upstream
from .errors import ArgumentError


class Gradients(NamedTuple):
    """Gradients with respect to each argument; `None` where it is not there or not asked for."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    prior_k: Optional[np.ndarray]
    prior_v: Optional[np.ndarray]
    past_gate: Optional[np.ndarray]


class Numpy:
    """Arrays in host memory."""

    def description(self, array: np.ndarray) -> tuple:
        size = array.itemsize
        return array.ctypes.data, array.shape, tuple(stride // size for stride in array.strides)

    def numbers(self, array: np.ndarray) -> tuple:
        return array.ctypes.data, array.size

    def host_or_address(self, name: str, values, kind: str) -> list:
        given = np.asarray(values)
        wanted = "iu" if kind == "int32" else "f"
        if given.dtype.kind not in wanted:
            kinds = "integers" if kind == "int32" else "floating-point numbers"
            raise ArgumentError(name, kinds, str(given.dtype))
        if kind == "int32" and given.size and (given.max() > 2**31 - 1 or given.min() < -(2**31)):
            raise ArgumentError(name, "numbers of 32 bits", str(given.max()))
        return given.ravel().tolist()


def readable(name: str, array) -> Optional[np.ndarray]:
    """The array, copied where its strides are none that the operation reads."""
    if array is None:
        return None
    array = np.asarray(array)
    if array.dtype not in (np.float32, np.float64):
        raise ArgumentError(name, "float32 or float64", str(array.dtype))
    strides = [stride for size, stride in zip(array.shape, array.strides) if size > 1]
    fits = all(stride >= 0 and stride % array.itemsize == 0 for stride in strides)
    last = array.ndim == 0 or array.shape[-1] < 2 or array.strides[-1] == array.itemsize
    aligned = array.flags.aligned and array.dtype.isnative
    return array if fits and last and aligned else np.ascontiguousarray(array, array.dtype.newbyteorder("="))


def like(name: str, array, shape: tuple, dtype) -> np.ndarray:
    """A contiguous array of the shape and type that it must have."""
    array = np.asarray(array)
    if array.shape != shape or array.dtype != dtype:
        raise ArgumentError(name, f"{dtype} of shape {shape}", f"{array.dtype} of shape {array.shape}")
    return np.ascontiguousarray(array)


def lse_shape(q: np.ndarray) -> tuple:
    batch, rows, heads, _ = q.shape
    return batch, heads, rows


def prepared(tensors: Tensors, lengths: Lengths) -> tuple:
    """Tensors and lengths as arrays."""
    tensors = checked(Tensors(*(readable(name, array) for name, array in tensors._asdict().items())))
    return tensors, Lengths(*(rows if rows is None else np.asarray(rows) for rows in lengths))


def forward(tensors: Tensors, roles: Roles, lengths: Lengths, scale: Optional[float]) -> tuple:
    """`out` and `lse`."""
    tensors, lengths = prepared(tensors, lengths)
    library = Numpy()
    call = arguments(library, tensors, roles, lengths, scale)
    out = np.empty(tensors.q.shape, tensors.q.dtype)
    lse = np.empty(lse_shape(tensors.q), tensors.q.dtype)
    _native.forward(out.dtype == np.float64, call, library.description(out), library.numbers(lse))
    return out, lse


def backward(tensors: Tensors, roles: Roles, lengths: Lengths, scale, saved: tuple, prior_grad: bool) -> Gradients:
    """The gradients, from `saved`: out, lse, d_out and d_lse."""
    tensors, lengths = prepared(tensors, lengths)
    q, dtype = tensors.q, tensors.q.dtype
    out, d_out = (like(name, x, q.shape, dtype) for name, x in [("out", saved[0]), ("d_out", saved[2])])
    lse = like("lse", saved[1], lse_shape(q), dtype)
    d_lse = None if saved[3] is None else like("d_lse", saved[3], lse_shape(q), dtype)
    library = Numpy()
    call = arguments(library, tensors, roles, lengths, scale)
    gradients = [np.empty(x.shape, dtype) for x in (q, tensors.k, tensors.v)]
    d_prior = None
    if prior_grad and tensors.prior_k is not None:
        d_prior = [np.empty(x.shape, dtype) for x in (tensors.prior_k, tensors.prior_v)]
    d_gate = np.empty((q.shape[0], q.shape[2]), dtype)
    read, written = upstream(library, out, lse, d_out, d_lse), targets(library, gradients, d_prior, d_gate)
    _native.backward(dtype == np.float64, call, read, written)
    d_past_gate = None if tensors.past_k is None else d_gate.sum(axis=0)
    return Gradients(*gradients, *(d_prior or (None, None)), d_past_gate)
