"""Eight CPU devices, so that what runs on several devices is tested on several; one small run.

Many tests make the same small network anew: its compiled programs are kept for the session (or in
JAX_COMPILATION_CACHE_DIR, where that is set), for all of its workers.
"""

import atexit
import gc
import os
import shutil
import tempfile

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
# Nearly all the time of a test is XLA's. With 0 they run what users run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


_FLAG = "--xla_force_host_platform_device_count=8"
# XLA's older code for fused loops (xla_cpu_use_fusion_emitters=false) compiles in a third of the
# time, and computes wrong gradients: see test_unet's test of rematerialisation.
if _FLAG not in os.environ.get("XLA_FLAGS", ""):  # a worker has its master's environment
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="protoseg_jax-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# JAX traces with many small objects; to look for garbage as often as usual is a tenth of that.
gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="session")
def shared_run(tmp_path_factory, worker_id):
    """The folder of a `small` run through every phase, made by whichever worker is first."""
    from protoseg_jax.files import hold
    from protoseg_jax.training import run as runs
    from tests import small

    base = tmp_path_factory.getbasetemp()
    root = (base if worker_id == "master" else base.parent) / "shared"
    root.mkdir(exist_ok=True)
    with hold(root / ".lock", wait=True):
        if not (root / "done").exists():
            small.make_data(root / "own")
            live = small.begin(small.make_config(root), root / "work")
            runs.go(live)
            live.workdir.release()
            (root / "done").touch()
    return root


@pytest.fixture(scope="module")
def finished(shared_run, tmp_path_factory):
    """A finished run with its config, data and folder, on one device, for a module's tests."""
    from protoseg_jax.run.live import Live
    from protoseg_jax.run.workdir import Workdir
    from tests import small

    folder = tmp_path_factory.mktemp("finished") / "work"
    shutil.copytree(shared_run / "work", folder)
    workdir = Workdir(folder)
    return Live(small.experiment(workdir.config()), workdir)
