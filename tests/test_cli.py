"""The command line: verbs, flags, exit codes; what it says of a wrong one, and how soon."""

import subprocess
import sys
from pathlib import Path

import pytest

from protoseg_jax import config

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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "IMAGE … missing"),
        (["a.png"], "no --workdir given"),
        (["--images=a.png,b.png", "--workdir=nothing"], "no image at 'a.png'"),
        (["a.png", "--workdir=nothing"], "no image at 'a.png'"),
        ([str(ROOT / "docs" / "explorer.png"), "--workdir=nothing"], "holds no run"),
    ],
)
def test_what_cannot_be_segmented_is_one_line_and_exit_code_2(arguments, words, tmp_path):
    command = [sys.executable, "-m", "protoseg_jax", "segment", *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert not any(tmp_path.iterdir())


def test_an_unknown_verb_is_one_line_and_exit_code_2():
    command = [sys.executable, "-m", "protoseg_jax", "trian"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.strip() == (
        "error: 'trian' is no verb of protoseg; choose one of train, eval, segment, explain, "
        "remove, check, tables, port, sheet"
    )


@pytest.mark.parametrize(
    "verb", ["", "train", "eval", "segment", "explain", "remove", "tables", "port"]
)
def test_help_fits_a_screen_and_brings_neither_jax_nor_tfds(verb):
    """What makes it quick: the time itself depends on the machine."""
    script = (
        "import sys\n"
        "from protoseg_jax import cli\n"
        "try:\n"
        "    cli.main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "heavy = {'jax', 'flax', 'tensorflow_datasets', 'matplotlib', 'cv2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    command = [sys.executable, "-c", script, *[verb][: len(verb)], "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) < 40 and max(map(len, lines)) <= 110
    assert verb in result.stdout


def test_a_config_is_found_by_its_name(tmp_path):
    """From anywhere; and what is no config names the ready ones."""
    command = [sys.executable, "-m", "protoseg_jax", "train", "--config=dmo"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and "demo" in result.stderr
    assert config.find("isbi_em:cpu") == f"{ROOT / 'configs' / 'isbi_em.py'}:cpu"
    assert config.load("isbi_em:cpu").batch_size == 4
