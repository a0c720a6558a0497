"""Runs the project's programs from a benchmark."""

import pathlib
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def call(name: str, *line: str) -> None:
    """Run one of them, train.py say, its command told; end with its exit code unless that is 0."""
    command = [sys.executable, str(ROOT / name), *line]
    print("+", shlex.join(command), file=sys.stderr, flush=True)
    code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    if code:
        sys.exit(code)
