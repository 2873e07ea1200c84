"""Segment attention for numpy and PyTorch, and whole models. See https://github.com/segattn/segattn."""

from .attention import Gradients, segment_attention, segment_attention_backward
from .errors import ArgumentError, DeviceError, Error, OutOfMemory
from .training import Generator, Sample, Step, Trainer

__all__ = [
    "ArgumentError",
    "DeviceError",
    "Error",
    "Generator",
    "Gradients",
    "OutOfMemory",
    "Sample",
    "Step",
    "Trainer",
    "segment_attention",
    "segment_attention_backward",
]
