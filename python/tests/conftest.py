"""Where PyTorch is required and missing, tests fail instead of being left out."""

import os

import pytest


def optional(name: str):
    """The module, or the tests of the file are skipped."""
    if os.environ.get("SEGATTN_REQUIRE_TORCH"):
        return __import__(name)
    return pytest.importorskip(name)
