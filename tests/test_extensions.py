"""A backbone, a data set, a loss term and a measure from outside the package, by dotted path."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from protoseg_jax import extensions
from protoseg_jax.errors import UserError
from tests import kill

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "vgg",
            "model.backbone='vgg' is unknown; choose one of efficientnet, resnet, unet; "
            "a module of yours",
        ),
        (None, "model.backbone='' is unknown; choose one of efficientnet, resnet, unet"),
        ("nowhere.net", r"model.backbone='nowhere.net' is unknown"),
        ("json", "model.backbone='json' is unknown"),  # not by the way of Python's own modules
        ("json.tool", r"model.backbone='json.tool' \(.*tool.py\) has no 'build'; define it there"),
        ("deeplab", r"has no 'GROUPS'|has no 'build'"),
        ("broken.net", r"model.backbone='broken.net' does not import \(ZeroDivisionError: div"),
        ("broken.more", r"model.backbone='broken.more' does not import \(No module named 'nu"),
    ],
)
def test_what_is_not_found_is_one_line(name, words, tmp_path, monkeypatch):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "net.py").write_text("1 / 0\n")
    (tmp_path / "broken" / "more.py").write_text("import nuumpy\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        extensions.find("model.backbone", name, "models", needs=("build", "GROUPS"))
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder of somebody's own: the toy package and nothing of the checkout."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(ROOT / "tests" / "toy", home / "toy")
    return home


def protoseg(home, *arguments):
    line = [sys.executable, "-m", "protoseg_jax", *arguments]
    return subprocess.Popen(
        line,
        cwd=home,
        env=kill.environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def done(process, code=0):
    out, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    return out, errors


@pytest.mark.slow
def test_everything_from_outside(home):
    """Trained, killed and resumed, pruned, scored, and explained from the run's folder alone."""
    train = ["train", "--config=toy/config.py", "--workdir=run"]
    process = protoseg(home, *train)
    metrics, deadline = home / "run" / "metrics.jsonl", time.monotonic() + 240
    while not metrics.exists() or metrics.read_text().count("\n") < 12:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    _, errors = done(protoseg(home, *train))
    assert "going on in phase joint after step" in errors
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    joint = [line for line in lines if line["phase"] == "joint"]
    assert [line["step"] for line in joint] == list(range(1, 41))
    assert 0 < joint[-1]["pull"] < joint[0]["pull"]
    parts = joint[0]["cross_entropy"] + 0.25 * joint[0]["diversity"] + 0.1 * joint[0]["pull"]
    assert joint[0]["loss"] == pytest.approx(parts, rel=1e-5)
    phases = [entry["phase"] for entry in json.loads((home / "run" / "summary.json").read_text())]
    assert phases == ["joint", "projection", "finetune", "pruning", "finetune_pruned"]

    out, _ = done(protoseg(home, "eval", "--workdir=run", "--interpretability", "--predictions=p"))
    assert "points told to be squares" in out and "utilisation" in out
    scores = json.loads((home / "run" / "eval" / "validation-finetune_pruned.json").read_text())
    assert 0 <= scores["interpretability"]["squares"] <= 1
    assert {p.name for p in (home / "p" / "validation").iterdir()} == {
        f"validation{n}_squares.png" for n in range(3)
    }

    # From the run's folder alone: no data set, not even its module.
    (home / "toy" / "squares.py").unlink()
    shutil.rmtree(home / "data_cache")
    picture = next((home / "run" / "prototypes" / "sources").glob("*.jpg"))
    done(protoseg(home, "explain", "--workdir=run", f"--images={picture}"))
    assert (home / "run" / "explain" / "index.html").is_file()
