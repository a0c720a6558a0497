"""`python train.py …`: protoseg_jax/cli/train.py."""

from protoseg_jax.cli import verb

if __name__ == "__main__":
    verb("train")
