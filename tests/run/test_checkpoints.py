"""A run's folder: checkpoints damaged, half written or without room; its lock; no pickle."""

import dataclasses
import os
import pickle
import shutil
from types import SimpleNamespace

import pytest

from protoseg_jax.errors import UserError, full_disk
from protoseg_jax.evaluation.score import score_run
from protoseg_jax.run.workdir import Workdir
from protoseg_jax.training import run as runs
from tests.small import PHASES, begin, same_arrays


def damage(folder, how):
    """Cut off or change the largest file of a checkpoint, or remove it."""
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 0x10
    largest.write_bytes(content)


@pytest.mark.parametrize(
    "how",
    ["flipped", *(pytest.param(h, marks=pytest.mark.slow) for h in ("truncated", "gone", "meta"))],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(finished, tmp_path, how, capsys):
    root = tmp_path / "work"
    shutil.copytree(finished.workdir.path, root)
    last = root / "checkpoints" / "finetune_pruned"
    if how == "gone":
        shutil.rmtree(last)
    elif how == "meta":
        text = last.with_suffix(".json").read_text()
        last.with_suffix(".json").write_text(text.replace('"class": 0', '"class": 1', 1))
    else:
        damage(last, how)
    with pytest.raises(UserError, match="finetune_pruned is damaged .*start train.py again"):
        score_run(str(root), "validation")
    run = begin(finished.experiment.config, root)
    runs.go(run)
    errors = capsys.readouterr().err
    assert "finetune_pruned is damaged" in errors and "checkpoints/damaged" in errors
    again, expected = (r.workdir.checkpoints.restore("finetune_pruned") for r in (run, finished))
    assert same_arrays(again.arrays["params"], expected.arrays["params"])
    scores = [{**e, "seconds": 0} for e in run.workdir.summary()]
    assert scores == [{**e, "seconds": 0} for e in finished.workdir.summary()]
    if how != "gone":
        assert (root / "checkpoints" / "damaged" / "finetune_pruned").is_dir()


def test_a_disk_without_room_for_a_checkpoint_keeps_the_one_before(finished, tmp_path, monkeypatch):
    checkpoints = begin(finished.experiment.config, tmp_path / "work").workdir.checkpoints
    checkpoint = finished.workdir.checkpoints.restore("warmup")
    checkpoints.save(checkpoint)
    checkpoints.wait()
    before = sorted(checkpoints.path.rglob("*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    checkpoints.save(dataclasses.replace(checkpoint, phase="joint"))
    with pytest.raises(OSError, match="disk full") as error:
        checkpoints.wait()
    assert full_disk(error.value)
    assert sorted(checkpoints.path.rglob("*")) == before
    assert checkpoints.newest(PHASES).phase == "warmup"


def test_what_a_killed_write_left_is_no_bother(finished, tmp_path, caplog):
    checkpoints = begin(finished.experiment.config, tmp_path / "work").workdir.checkpoints
    left = checkpoints.path / "warmup.orbax-checkpoint-tmp"
    left.mkdir(parents=True)
    (left / "half").write_text("written")
    checkpoints.save(finished.workdir.checkpoints.restore("warmup"))
    checkpoints.wait()
    assert not left.exists() and not caplog.records
    assert checkpoints.newest(PHASES).phase == "warmup"


def test_two_trainers_on_one_folder_are_refused(finished, tmp_path):
    first, second = Workdir(tmp_path / "work"), Workdir(tmp_path / "work")
    first.start(finished.experiment.config)
    with pytest.raises(UserError, match=f"in use by another train.py .process {os.getpid()} on"):
        second.start(finished.experiment.config)
    first.release()
    second.start(finished.experiment.config)
    second.release()


def test_nothing_that_is_read_is_executed(finished, tmp_path, monkeypatch):
    """A run's folder is restored and scored without pickle."""

    def refuse(*_, **__):
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    root = tmp_path / "work"
    shutil.copytree(finished.workdir.path, root)
    assert Workdir(root).checkpoints.newest(PHASES).phase == "finetune_pruned"
    assert Workdir(root).config().to_dict() == finished.workdir.config().to_dict()
