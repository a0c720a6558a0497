"""`python explain.py …`: protoseg_jax/cli/explain.py."""

from protoseg_jax.cli import verb

if __name__ == "__main__":
    verb("explain")
