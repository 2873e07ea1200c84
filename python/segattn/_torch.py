"""The operation on PyTorch tensors: `torch.ops.segattn.forward` and `.backward`, and their derivative formulas."""

from typing import Optional

import torch

from . import _native
from ._arguments import Lengths, Roles, Tensors, arguments, checked, heads_of, targets, upstream
from .errors import ArgumentError, DeviceError

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? prior_k, Tensor? prior_v, Tensor? past_k, Tensor? past_v, "
    "Tensor? past_gate, Tensor? segment_len, Tensor? prior_len, Tensor? past_len, Tensor? sink_len, "
    "Tensor? query_start, bool[] past_heads, bool[] prior_heads, float? scale"
)
_library = torch.library.Library("segattn", "DEF")
_library.define(f"forward({_ARGUMENTS}) -> (Tensor, Tensor)")
# An absent gradient is an empty tensor.
_library.define(
    f"backward(Tensor out, Tensor lse, Tensor? d_out, Tensor? d_lse, bool prior_grad, {_ARGUMENTS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_DTYPES = {
    "cpu": (torch.float32, torch.float64),
    "cuda": (torch.bfloat16, torch.float16),
}


def forward(tensors: Tensors, roles: Roles, lengths: Lengths, scale: Optional[float]) -> tuple:
    """`out` and `lse`."""
    heads = tensors.q.shape[2] if tensors.q.ndim == 4 else 0
    for name, tensor in tensors._asdict().items():
        if tensor is not None and not isinstance(tensor, torch.Tensor):
            raise ArgumentError(name, "a tensor like q", type(tensor).__name__)
    gate = roles.past_gate
    if gate is not None and not isinstance(gate, torch.Tensor):
        gate = torch.as_tensor(gate, dtype=torch.float32)
    rows = (x if x is None or isinstance(x, torch.Tensor) else torch.as_tensor(x) for x in lengths)
    flags = (heads_of("past_heads", roles.past_heads, heads), heads_of("prior_heads", roles.prior_heads, heads))
    return torch.ops.segattn.forward(*tensors, gate, *rows, *flags, scale)


class Torch:
    """Tensors of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def description(self, tensor: torch.Tensor) -> tuple:
        return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()

    def numbers(self, tensor: torch.Tensor) -> tuple:
        return tensor.data_ptr(), tensor.numel()

    def host_or_address(self, name: str, values, kind: str):
        if isinstance(values, list):
            return values
        if values.is_floating_point() != (kind == "float32") or values.dtype == torch.bool:
            kinds = "integers" if kind == "int32" else "floating-point numbers"
            raise ArgumentError(name, kinds, str(values.dtype))
        if values.device.type == "cpu":
            numbers = values.detach().flatten().tolist()
            if kind == "int32" and any(abs(number) >= 2**31 for number in numbers):
                raise ArgumentError(name, "numbers of 32 bits", str(max(numbers, key=abs)))
            return numbers
        if values.device != self.device or values.dtype != getattr(torch, kind) or not values.is_contiguous():
            got = f"{values.dtype}, strides {values.stride()} on {values.device}"
            raise ArgumentError(name, f"contiguous {kind} on {self.device}, or a CPU tensor", got)
        return values.data_ptr()


def _readable(tensor: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    """The tensor, copied where its strides or its address are none that the operation reads."""
    if tensor is None or tensor.ndim != 4:
        return tensor
    last = tensor.shape[-1] < 2 or tensor.stride(-1) == 1
    # A GPU copies rows 16 bytes at a time.
    aligned = tensor.device.type == "cpu" or (
        tensor.data_ptr() % 16 == 0
        and all(stride % 8 == 0 for size, stride in zip(tensor.shape[:3], tensor.stride()) if size > 1)
    )
    return tensor if last and aligned else tensor.clone(memory_format=torch.contiguous_format)


class _Call:
    """The arguments of an op, checked."""

    def __init__(self, given: tuple) -> None:
        self.tensors = checked(Tensors(*map(_readable, given[:7])))
        self.gate, lengths, flags, self.scale = given[7], Lengths(*given[8:13]), given[13:15], given[15]
        self.q = self.tensors.q
        device, dtypes = self.q.device, _DTYPES[self.q.device.type]
        if self.q.dtype not in dtypes:
            expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ArgumentError("q", f"{expected} on {device.type}", str(self.q.dtype).removeprefix("torch."))
        for name, tensor in self.tensors._asdict().items():
            if tensor is not None and tensor.device != device:
                raise ArgumentError(name, f"a tensor on {device} like q", str(tensor.device))
        self.library = Torch(device)
        gate = self.gate
        if gate is not None and gate.device.type != "cpu":
            # Kept for the call, which reads it by its address.
            gate = self.gate = gate.detach().float().contiguous()
        roles = Roles(gate, *flags)
        self.arguments = arguments(self.library, self.tensors, roles, lengths, self.scale)

    def exact(self, *shape: int) -> torch.Tensor:
        """New numbers of the type of lse."""
        return torch.empty(shape, dtype=_exact(self.q), device=self.q.device)

    def exactly(self, name: str, tensor: torch.Tensor, shape: tuple) -> torch.Tensor:
        """Contiguous numbers like lse."""
        if tuple(tensor.shape) != shape or tensor.dtype != _exact(self.q):
            got = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ArgumentError(name, f"{_exact(self.q)} of shape {shape}", got)
        return tensor.contiguous()

    def run(self, name: str, *call) -> None:
        """Runs the host's function, or on a GPU its plan on PyTorch's current stream."""
        if self.q.device.type == "cpu":
            getattr(_native, name)(self.q.dtype == torch.float64, *call)
            return
        if not _native.HAS_CUDA:
            raise DeviceError("this build of segattn has no kernels for GPUs; build it with --features cuda")
        with torch.cuda.device(self.q.device):
            ordinal = torch.cuda.current_device()
            plan = getattr(_native, f"plan_{name}")(ordinal, self.q.dtype == torch.bfloat16, *call)
            workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=self.q.device)
            # Memory that PyTorch frees is given out again in the order of the stream.
            plan.run(torch.cuda.current_stream().cuda_stream, self.library.numbers(workspace))


def _exact(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _forward(*given):
    call = _Call(given)
    batch, rows, heads, _ = call.q.shape
    out = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
    lse = call.exact(batch, heads, rows)
    call.run("forward", call.arguments, call.library.description(out), call.library.numbers(lse))
    return out, lse


def _backward(out, lse, d_out, d_lse, prior_grad, *given):
    call = _Call(given)
    q, tensors = call.q, call.tensors
    batch, rows, heads, _ = q.shape
    d_out = torch.zeros_like(out) if d_out is None else d_out
    for name, tensor in [("out", out), ("d_out", d_out)]:
        if tensor.shape != q.shape or tensor.dtype != q.dtype:
            raise ArgumentError(name, f"{q.dtype} of shape {tuple(q.shape)}", f"{tensor.dtype} {tuple(tensor.shape)}")
    out, d_out = map(_readable, (out, d_out))
    lse = call.exactly("lse", lse, (batch, heads, rows))
    d_lse = None if d_lse is None else call.exactly("d_lse", d_lse, (batch, heads, rows))
    prior_grad = prior_grad and tensors.prior_k is not None
    *gradients, d_prior_k, d_prior_v, d_past_gate = _gradients(prior_grad, given)
    d_gate = call.exact(batch, heads)
    d_prior = (d_prior_k, d_prior_v) if prior_grad else None
    read = upstream(call.library, out, lse, d_out, d_lse)
    call.run("backward", call.arguments, read, targets(call.library, gradients, d_prior, d_gate))
    if d_past_gate.numel():
        d_past_gate.copy_(d_gate.sum(0))
    return *gradients, d_prior_k, d_prior_v, d_past_gate


def _gradients(prior_grad: bool, given: tuple) -> tuple:
    """Places for all gradients; empty where there is none."""
    q, gate = given[0], given[7]

    def like(tensor, wanted=True):
        if tensor is None or not wanted:
            return q.new_empty(0)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    return *map(like, given[:3]), like(given[3], prior_grad), like(given[4], prior_grad), like(gate)


def _fake_forward(*given):
    q = given[0]
    batch, rows, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty((batch, heads, rows), dtype=_exact(q), device=q.device)


def _fake_backward(out, lse, d_out, d_lse, prior_grad, *given):
    return _gradients(prior_grad, given)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    *tensors, ctx.past_heads, ctx.prior_heads, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, d_out, d_lse):
    *tensors, out, lse = ctx.saved_tensors
    prior_grad = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    roles = (ctx.past_heads, ctx.prior_heads, ctx.scale)
    grads = torch.ops.segattn.backward(out, lse, d_out, d_lse, prior_grad, *tensors, *roles)
    d_q, d_k, d_v, d_prior_k, d_prior_v, d_past_gate = grads
    prior = (d_prior_k, d_prior_v) if prior_grad else (None, None)
    gate = d_past_gate if ctx.needs_input_grad[7] else None
    return d_q, d_k, d_v, *prior, None, None, gate, *8 * (None,)


for _device in ("CPU", "CUDA"):
    _library.impl("forward", _forward, _device)
    _library.impl("backward", _backward, _device)
torch.library.register_fake("segattn::forward", _fake_forward, lib=_library)
torch.library.register_fake("segattn::backward", _fake_backward, lib=_library)
torch.library.register_autograd("segattn::forward", _differentiate, setup_context=_save, lib=_library)
