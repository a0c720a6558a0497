"""ProtoSeg in JAX: interpretable semantic segmentation with prototypical parts (WACV 2023)."""

__version__ = "0.1.0"
