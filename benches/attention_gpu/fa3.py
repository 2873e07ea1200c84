"""FlashAttention-3 out of a library for JAX, called on torch tensors [batch, rows, heads, head_dim] of bf16 or f16.

The library is libdew_flash_attn3.so of the PyPI package dew-flash-attn-cu13 0.3.6 (sm_90a, CUDA 13). It exports two
handlers of XLA's foreign function interface, dew_flash3_mha_fwd and dew_flash3_mha_bwd. A handler takes one call frame:
its buffers, its attributes, and a table of functions, of which it calls those for its stream, memory and errors. The
structs below are those of XLA's xla/ffi/api/c_api.h, version 0.3. torch is imported first: it brings libcudart.so.13.
"""

import ctypes as C

PRED, S64, F16, F32, F64, BF16 = 1, 5, 10, 11, 12, 16
BUFFER, SCALAR, EXECUTE = 1, 3, 3
P, SIZE, I64, I32 = C.c_void_p, C.c_size_t, C.c_int64, C.c_int


def struct(name, **fields):
    return type(name, (C.Structure,), {"_fields_": list(fields.items())})


HEAD = {"size": SIZE, "extension": P}
Buffer = struct("Buffer", **HEAD, dtype=I32, data=P, rank=I64, dims=C.POINTER(I64))
Text = struct("Text", ptr=C.c_char_p, len=SIZE)
Scalar = struct("Scalar", dtype=I32, value=P)
Values = struct("Values", **HEAD, count=I64, types=C.POINTER(I32), values=C.POINTER(P))
Attributes = struct(
    "Attributes", **HEAD, count=I64, types=C.POINTER(I32), names=C.POINTER(C.POINTER(Text)), values=C.POINTER(P)
)
Version = struct("Version", **HEAD, major=I32, minor=I32)
Frame = struct(
    "Frame", **HEAD, api=P, context=P, stage=I32, args=Values, results=Values, attributes=Attributes, future=P
)
OfError = struct("OfError", **HEAD, message=C.c_char_p, code=I32)
OfStream = struct("OfStream", **HEAD, context=P, stream=P)
OfMemory = struct("OfMemory", **HEAD, context=P, bytes=SIZE, alignment=SIZE, data=P)
OfDevice = struct("OfDevice", **HEAD, context=P, device=C.c_int32)
FUNCTIONS = (
    "error_create error_message error_destroy register stream type_register context state_set state_get allocate free "
    "schedule threads future_create future_available future_error run device find options"
).split()
Api = struct("Api", **HEAD, version=Version, internal=P, **{name: P for name in FUNCTIONS})
Function = C.CFUNCTYPE(P, P)


class Library:
    """The library on torch's current stream and device."""

    def __init__(self, path, torch):
        self.torch, self.library, self.errors, self.memory = torch, C.CDLL(path), [], {}
        self.functions = {
            "error_create": Function(self.error),
            "stream": Function(self.stream),
            "allocate": Function(self.allocate),
            "device": Function(self.device),
            "free": Function(lambda _: None),
            "error_destroy": Function(lambda _: None),
        }
        self.api = Api(size=C.sizeof(Api), version=Version(C.sizeof(Version), None, 0, 3))
        for name, function in self.functions.items():
            setattr(self.api, name, C.cast(function, P))

    def error(self, at):
        self.errors.append(OfError.from_address(at).message.decode())
        return len(self.errors)

    def stream(self, at):
        OfStream.from_address(at).stream = self.torch.cuda.current_stream().cuda_stream

    def device(self, at):
        OfDevice.from_address(at).device = self.torch.cuda.current_device()

    def allocate(self, at):
        """One piece of memory for each size, used again by the next call, as a caching allocator would do."""
        asked = OfMemory.from_address(at)
        if asked.bytes not in self.memory:
            self.memory[asked.bytes] = self.torch.empty(asked.bytes + 256, dtype=self.torch.uint8, device="cuda")
        asked.data = (self.memory[asked.bytes].data_ptr() + 255) // 256 * 256

    def buffers(self, tensors, keep):
        """`tensors`: (address, dtype, shape)."""
        pointers, types = (P * len(tensors))(), (I32 * len(tensors))(*[BUFFER] * len(tensors))
        for i, (data, dtype, shape) in enumerate(tensors):
            dims = (I64 * len(shape))(*shape)
            buffer = Buffer(C.sizeof(Buffer), None, dtype, data, len(shape), dims)
            keep += [dims, buffer]
            pointers[i] = C.addressof(buffer)
        keep += [pointers, types]
        return Values(C.sizeof(Values), None, len(tensors), types, pointers)

    def call(self, name, arguments, results, attributes):
        """`attributes`: {name: (dtype, ctypes value)}."""
        keep, names = [], sorted(attributes)
        texts, values = (C.POINTER(Text) * len(names))(), (P * len(names))()
        for i, key in enumerate(names):
            text, scalar = Text(key.encode(), len(key)), Scalar(attributes[key][0], C.addressof(attributes[key][1]))
            keep += [text, scalar]
            texts[i], values[i] = C.pointer(text), C.addressof(scalar)
        types = (I32 * len(names))(*[SCALAR] * len(names))
        frame = Frame(size=Frame.future.offset, api=C.addressof(self.api), context=1, stage=EXECUTE)
        frame.args, frame.results = self.buffers(arguments, keep), self.buffers(results, keep)
        frame.attributes = Attributes(C.sizeof(Attributes), None, len(names), types, texts, values)
        handler = getattr(self.library, name)
        handler.restype, handler.argtypes = P, [P]
        self.errors.clear()
        if handler(C.addressof(frame)):
            raise RuntimeError(f"{name}: {self.errors}")


def calls(path, q, k, v):
    """forward() and backward(), causal to the last key; backward needs a forward before it, and computes its
    gradients of random ones of the output. Both run on the current stream."""
    import torch

    library = Library(path, torch)
    q, k, v = (x.contiguous() for x in (q, k, v))
    batch, rows, heads, head_dim = q.shape
    kinds = {torch.bfloat16: BF16, torch.float16: F16, torch.float32: F32}

    def buffer(x, shape=None):
        return x.data_ptr(), kinds[x.dtype], tuple(shape or x.shape)

    def floats(*shape):
        return torch.empty(shape, dtype=torch.float32, device="cuda")

    out, lse, unused = torch.empty_like(q), floats(batch, heads, rows), floats(1)
    d_out, gradients = torch.randn_like(q), [torch.empty_like(x) for x in (q, k, v)]
    scratch = [floats(heads * (batch * rows + 128 * (batch + 1))) for _ in range(2)]
    attributes = {
        "softmax_scale": (F64, C.c_double(head_dim**-0.5)),
        "is_causal": (PRED, C.c_bool(True)),
        "window_size_left": (S64, I64(-1)),
        "window_size_right": (S64, I64(-1)),
    }
    inputs = [buffer(x) for x in (q, k, v)]

    def forward():
        results = [buffer(out), buffer(lse), buffer(unused, (1, 1, 1, 1)), buffer(unused, (1, 1, 1))]
        library.call("dew_flash3_mha_fwd", inputs, results, attributes)

    def backward():
        arguments = [buffer(d_out), *inputs, buffer(out), buffer(lse)]
        results = [buffer(x) for x in (*gradients, *scratch)]
        library.call("dew_flash3_mha_bwd", arguments, results, attributes)

    return forward, backward
