"""Runs killed at random moments end bit-identical; SIGTERM and Ctrl-C save first."""

import json
import random
import shutil
import signal
import subprocess
import time

import pytest

from protoseg_jax import devices
from tests import kill

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("kill")
    return scratch, *kill.undisturbed(scratch)


def in_joint_training(line, scratch, workdir):
    """A run's process, as soon as its first step of joint training is told of."""
    running = subprocess.Popen(
        line, env=kill.environment(scratch), stderr=subprocess.PIPE, text=True
    )
    metrics, deadline = workdir / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and '"joint"' in metrics.read_text()):
        assert running.poll() is None and time.monotonic() < deadline, running.communicate()
        time.sleep(0.01)
    return running


@pytest.mark.parametrize("number", [1, 3])  # which strike early, however fast the machine is then
def test_sigkill_at_random_moments(reference, number):
    """Two here; `python -m tests.kill` does fifty."""
    scratch, expected, took = reference
    got, struck = kill.trial(scratch, number, took, random.Random(number), signal.SIGKILL)
    assert struck
    assert kill.differences(got, expected) == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(reference, tmp_path, signum):
    scratch, expected, _ = reference
    line = kill.command(scratch / "data", scratch / "cache", tmp_path / "work")
    running = in_joint_training(line, scratch, tmp_path / "work")
    running.send_signal(signum)
    _, errors = running.communicate(timeout=240)
    assert running.returncode == 128 + signum, errors
    subprocess.run(line, env=kill.environment(scratch), check=True, capture_output=True)
    assert kill.differences(kill.results(tmp_path / "work"), expected) == []


@pytest.mark.parametrize("gone", ["data", "cache"])
def test_a_folder_that_disappears_in_the_middle_of_an_epoch(reference, tmp_path, gone):
    """Runs read their prepared copy alone; without that they end with one line, and go on later."""
    scratch, expected, _ = reference
    shutil.copytree(scratch / "data", tmp_path / "data")
    line = kill.command(tmp_path / "data", tmp_path / "cache", tmp_path / "work")
    running = in_joint_training(line, scratch, tmp_path / "work")
    shutil.move(tmp_path / gone, tmp_path / "aside")
    _, errors = running.communicate(timeout=240)
    if gone == "cache":
        assert running.returncode == 2
        last = errors.strip().splitlines()[-1]
        assert last.startswith(f"error: prepared data {tmp_path / 'cache'}")
        assert last.endswith("start the same command again to have it prepared again")
        assert "Traceback" not in errors
        subprocess.run(line, env=kill.environment(scratch), check=True, capture_output=True)
    else:
        assert running.returncode == 0, errors
    assert kill.differences(kill.results(tmp_path / "work"), expected) == []


def test_a_run_that_goes_on_keeps_its_devices(reference, tmp_path):
    """A CPU is split by its cores and the batch, or as --devices says; the manifest knows."""
    scratch, *_ = reference

    def local_devices(workdir):
        return json.loads((workdir / "manifest.json").read_text())["devices"]["local_devices"]

    assert local_devices(scratch / "reference") == min(devices.cores(), 2)
    line = kill.command(scratch / "data", scratch / "cache", tmp_path / "work")
    # Joint training and projection will do.
    left_out = ("warmup", "finetune", "pruning", "finetune_pruned")
    line += [f"--config.phases.{name}.steps=0" for name in left_out]
    for extra in (["--devices=1"], []):
        subprocess.run(
            [*line, *extra], env=kill.environment(scratch), check=True, capture_output=True
        )
        assert local_devices(tmp_path / "work") == 1
