"""The command line: verbs, flags, exit codes; what it says of a wrong one, and how soon."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("program", "arguments", "words"),
    [
        ("train.py", ["--config=configs/nothing.py"], "does not exist"),
        ("train.py", ["--config=configs/demo.py", "--config.sed=1"], "sed"),
        ("train.py", ["--config=configs/demo.py", "--config.seed=x"], "seed"),
        ("train.py", ["--config=configs/demo.py", "--smok"], "smok"),
        ("train.py", [], "no --config given"),
        ("train.py", ["--config=configs/pascal.py:nothing"], "no row 'nothing', but imagenet"),
        ("eval.py", ["--workdir=/nowhere/at/all"], "holds no run"),
    ],
)
def test_a_bad_command_line_is_one_line_and_exit_code_2(program, arguments, words, tmp_path):
    command = [sys.executable, str(ROOT / program), *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert words in result.stderr
