"""A small run with patches for prototypes, on hand-made images in three sizes."""

import dataclasses

import jax
import pytest
from discs import make_data
from test_run import make_config

from protoseg_jax.devices import DevicePool
from protoseg_jax.training import run as runs
from protoseg_jax.training.run import Run
from protoseg_jax.workdir import Workdir, write_json


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """Random weights as its joint phase, and their projection: explaining needs no more."""
    root = tmp_path_factory.mktemp("explained")
    make_data(root / "own")
    config = make_config(root)
    config.batch_size = 8  # whatever the number of devices
    workdir = Workdir(root / "work")
    run = Run(config, workdir, DevicePool(jax.local_devices()[:1]))
    workdir.start(config, runs.manifest(config))
    write_json(workdir.path / "classes.json", vars(run.data.label_set))
    joint = dataclasses.replace(run.initial(), phase="joint", step=3)
    workdir.save(joint)
    projected = run.projection_phase(run.phases[2], joint)
    workdir.save(projected)
    run.write_prototypes(projected)
    workdir.wait()
    workdir.release()
    return run
