"""Several processes on one machine (gloo between CPUs): equal gradients, equal runs, no hanging."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import kill
from tests.small import make_data
from tests.training import test_step

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def start(lines, scratch, devices=1):
    """One process a command line, all of one run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = kill.environment(scratch)
    common |= {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(len(lines)),
        "XLA_FLAGS": f"{common['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
    }
    return [
        subprocess.Popen(
            line,
            cwd=ROOT,
            env={**common, "JAX_PROCESS_ID": str(n)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n, line in enumerate(lines)
    ]


@pytest.mark.parametrize("devices", [1, 2])
def test_two_processes_compute_and_learn_what_one_does(tmp_path, devices):
    line = [sys.executable, "-m", "tests.training.process_worker", str(tmp_path / "out.npz")]
    for process in start([line, line], tmp_path, devices):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    got = np.load(tmp_path / "out.npz")
    state, metrics = test_step.run("joint", 1)
    expected = test_step.first_gradient(state)
    assert sum(name.startswith("gradient_") for name in got.files) == len(expected)
    for n, a in enumerate(expected):
        b = got[f"gradient_{n}"]
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a) + 1e-9
    assert float(got["loss"]) == pytest.approx(metrics["loss"], rel=1e-5)
    one = test_step.sgd(1)
    leaves, structure = jax.tree_util.tree_flatten_with_path(one)
    two = [got[f"sgd{jax.tree_util.keystr(path)}"] for path, _ in leaves]
    test_step.assert_same_after_sgd(one, structure.unflatten(two))


def test_a_run_of_two_processes_equals_a_run_of_one(tmp_path):
    """Every phase; the first process writes; scores and prototypes agree."""
    make_data(tmp_path / "data")
    two = kill.command(tmp_path / "data", tmp_path / "cache", tmp_path / "two")
    one = kill.command(tmp_path / "data", tmp_path / "cache", tmp_path / "one")
    steps = ["--config.phases.warmup.steps=2", "--config.phases.joint.steps=2"]
    for process in start([two + steps, two + steps], tmp_path):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    subprocess.run(one + steps, env=kill.environment(tmp_path), check=True, capture_output=True)
    got, expected = (kill.results(tmp_path / name) for name in ("two", "one"))
    assert [e["phase"] for e in got["summary"]] == list(kill.PHASES)
    first_losses = [[loss for *_, loss in r["steps"][:4]] for r in (got, expected)]
    np.testing.assert_allclose(*first_losses, rtol=1e-3)
    for name, a in expected["arrays"].items():
        if name.startswith("warmup/"):
            assert np.linalg.norm(a - got["arrays"][name]) <= 1e-2 * np.linalg.norm(a) + 1e-6


def test_a_peer_that_dies_ends_the_others_with_a_message(tmp_path):
    make_data(tmp_path / "data")
    line = kill.command(tmp_path / "data", tmp_path / "cache", tmp_path / "work")
    line.append("--config.phases.joint.steps=100000")
    first, second = start([line, line], tmp_path)
    metrics, deadline = tmp_path / "work" / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and '"joint"' in metrics.read_text()):
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(1)
    second.kill()
    second.communicate()
    _, errors = first.communicate(timeout=60)
    assert first.returncode not in (0, None)
    assert errors.strip(), "it ended without a word"


def test_incomplete_variables_are_one_line(tmp_path):
    environment = {**os.environ, "JAX_COORDINATOR_ADDRESS": "localhost:1"}
    line = kill.command(tmp_path, tmp_path, tmp_path / "work")
    result = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert "JAX_NUM_PROCESSES, JAX_PROCESS_ID is not" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
