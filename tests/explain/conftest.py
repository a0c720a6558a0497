"""A small run with patches for prototypes, on hand-made images in three sizes."""

import dataclasses

import pytest

from protoseg_jax.explain.model import Model
from protoseg_jax.files import write_json
from protoseg_jax.prototypes import pictures, project
from protoseg_jax.training import start as starts
from tests.small import begin, make_config, make_data


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """Random weights as its joint phase, and their projection: explaining needs no more."""
    root = tmp_path_factory.mktemp("explained")
    make_data(root / "own")
    config = make_config(root)
    config.batch_size = 8  # whatever the number of devices
    live = begin(config, root / "work")
    write_json(live.workdir.path / "classes.json", vars(live.experiment.labels))
    joint = dataclasses.replace(starts.initial(live.experiment), phase="joint", step=3)
    live.workdir.checkpoints.save(joint)
    projected = project.run(live, joint)
    live.workdir.checkpoints.save(projected)
    pictures.write(live.workdir.path, live.experiment, projected)
    live.workdir.checkpoints.wait()
    live.workdir.release()
    return Model(live.workdir, live.experiment, "projection", projected)
