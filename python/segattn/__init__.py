"""Segment attention for numpy and PyTorch. See https://github.com/segattn/segattn."""

from .attention import Gradients, segment_attention, segment_attention_backward
from .errors import ArgumentError, DeviceError, Error, OutOfMemory

__all__ = [
    "ArgumentError",
    "DeviceError",
    "Error",
    "Gradients",
    "OutOfMemory",
    "segment_attention",
    "segment_attention_backward",
]
