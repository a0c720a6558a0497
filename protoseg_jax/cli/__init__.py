"""The command line: a file a verb. What a verb needs is imported when it runs, not before.

    protoseg VERB …            the installed command
    python -m protoseg_jax VERB …
    python train.py …          and eval.py, explain.py: the same verbs

A verb's module defines its flags, `main`, and `ARGUMENTS` where it takes any; its docstring is its
help.
"""

import importlib
import sys
from collections.abc import Sequence

from protoseg_jax import program

VERBS = {
    "train": "train a config, or go on with it",
    "eval": "score a run; write its predictions",
    "segment": "segment images, folders of them",
    "explain": "a run's explorer page, or the paper's figures of it",
    "remove": "a new run without some of a run's prototypes",
    "check": "what is wrong in a data folder, all at once, and how to mend it",
    "tables": "the paper's Tables 1-4 of runs",
    "port": "PyTorch weights as an .npz or as a run",
    "sheet": "a picture of a config's augmented training examples",
}


def verb(name: str, arguments: Sequence[str] | None = None) -> None:
    """Run a verb as a program.

    Args:
      name: a key of `VERBS`.
      arguments: by default those of this process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    module = importlib.import_module(f"protoseg_jax.cli.{name}")
    program.run(module, [f"protoseg {name}", *arguments])


def main() -> None:
    """`protoseg VERB …`."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        print("protoseg VERB …; protoseg VERB --help says more\n")
        print("\n".join(f"  {name:<8} {what}" for name, what in VERBS.items()))
    elif name not in VERBS:
        program.exit_with(f"{name!r} is no verb of protoseg; choose one of {', '.join(VERBS)}")
    else:
        verb(name, arguments)
