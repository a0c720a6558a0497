"""`python -m protoseg_jax VERB …`."""

from protoseg_jax.cli import main

if __name__ == "__main__":
    main()
