"""ProtoSeg in JAX: interpretable semantic segmentation with prototypical parts (WACV 2023)."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """`load` brings JAX with it only when asked for."""
    if name == "load":
        from protoseg_jax.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
