"""A CPU is split; compiled programs are kept, and the second start reads them."""

import os
import subprocess
import sys

import pytest

from protoseg_jax import devices
from protoseg_jax.errors import UserError

PROGRAM = """
import jax, jax.numpy as jnp
from protoseg_jax import devices

hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
devices.keep_compiled_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.ones((8, 8))).block_until_ready()
print(sum(name.endswith("cache_hits") for name in hits))
"""


def start(**variables):
    names = ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**environment, **{k: str(v) for k, v in variables.items()}},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(result.stdout)


def test_a_second_start_reads_what_the_first_compiled(tmp_path):
    assert start(XDG_CACHE_HOME=tmp_path) == 0
    (folder,) = (tmp_path / "protoseg_jax").iterdir()
    assert any(folder.iterdir())
    assert start(XDG_CACHE_HOME=tmp_path) > 0


def test_the_user_s_own_folder_is_respected(tmp_path):
    start(JAX_COMPILATION_CACHE_DIR=tmp_path / "own", XDG_CACHE_HOME=tmp_path / "other")
    assert any((tmp_path / "own").iterdir()) and not (tmp_path / "other").exists()


def test_a_folder_that_cannot_be_written_is_no_bother(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert start(XDG_CACHE_HOME=tmp_path / "file") == 0


FLAG = "--xla_force_host_platform_device_count"


@pytest.mark.parametrize(
    ("cores", "given", "arguments", "expected"),
    [
        (4, "", {}, f"{FLAG}=4"),
        (4, "", {"batch_size": 10}, f"{FLAG}=2"),
        (4, "", {"batch_size": 8, "accumulate": 4}, f"{FLAG}=2"),
        (4, "", {"batch_size": 7}, f"{FLAG}=1"),
        (4, "--xla_dump_to=x", {"batch_size": 8}, f"--xla_dump_to=x {FLAG}=4"),
        (4, "", {"before": 1, "batch_size": 8}, f"{FLAG}=1"),
        (4, "", {"wanted": 8, "before": 1}, f"{FLAG}=8"),
        (4, f"{FLAG}=3 --xla_dump_to=x", {"before": 1}, f"{FLAG}=3 --xla_dump_to=x"),
        (4, f"{FLAG}=3 --xla_dump_to=x", {"wanted": 2}, f"--xla_dump_to=x {FLAG}=2"),
    ],
)
def test_a_cpu_is_split_over_its_cores(monkeypatch, cores, given, arguments, expected):
    """As the user wants, as XLA_FLAGS says, as before, or as far as the batch divides."""
    monkeypatch.setattr(devices, "cores", lambda: cores)
    monkeypatch.setenv("XLA_FLAGS", given)
    devices.split_cpu(**arguments)
    assert os.environ["XLA_FLAGS"] == expected


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_freed_memory_is_kept():
    """A block of 64 MiB that is wanted again costs no page faults; without, 16,384."""
    program = """
import resource, sys
from protoseg_jax import devices
if sys.argv[1] == "keep":
    devices.keep_freed_memory()
b"x" * int(sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    b"x" * int(sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {}
    for how in ("keep", "leave"):
        command = [sys.executable, "-c", program, how, str(64 << 20)]
        faults[how] = int(subprocess.run(command, capture_output=True, text=True).stdout)
    assert faults["keep"] < 1000 < faults["leave"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc_trim is glibc's")
def test_freed_memory_is_given_back():
    """What lies below memory that is still used, too."""
    program = """
import pathlib
from protoseg_jax import devices

def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

devices.keep_freed_memory()
below, above = b"x" * (200 << 20), b"x" * (1 << 20)
del below
before = resident()
devices.give_back_freed_memory()
print(before - resident())
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout
    assert int(told) > 150


def test_processes_bring_one_device_each(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    devices.split_cpu(batch_size=8)
    assert os.environ["XLA_FLAGS"] == ""


def test_no_devices_are_refused():
    with pytest.raises(UserError, match="--devices=0 must be at least 1"):
        devices.split_cpu(0)


@pytest.mark.parametrize(
    ("quota", "expected"), [("200000 100000", 2), ("50000 100000", 1), ("max 100000", 4)]
)
def test_cores_are_those_of_affinity_and_quota(monkeypatch, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 3, 7})
    monkeypatch.setattr(devices.pathlib.Path, "read_text", lambda _: quota)
    assert devices.cores() == expected


def test_jax_starts_with_as_many():
    program = (
        "from protoseg_jax import devices; devices.split_cpu(3); import jax;"
        "print(jax.local_device_count())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "3\n"
