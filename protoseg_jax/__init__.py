"""ProtoSeg in JAX: interpretable semantic segmentation with prototypical parts (WACV 2023)."""

import os
from typing import Any

from protoseg_jax.version import __version__

__all__ = ["__version__", "load"]

# What is wrong with a picture is one line of ours; OpenCV reads this when it is first imported.
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")


def __getattr__(name: str) -> Any:
    """`load` brings JAX with it only when asked for."""
    if name == "load":
        from protoseg_jax.explain.model import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
