"""`python eval.py …`: protoseg_jax/cli/eval.py."""

from protoseg_jax.cli import verb

if __name__ == "__main__":
    verb("eval")
