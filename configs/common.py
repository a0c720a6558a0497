"""Every key of a config, with its meaning and default: protoseg_jax/config.py."""

from protoseg_jax.config import default

__all__ = ["default"]
