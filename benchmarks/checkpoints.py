"""What checkpoints cost: seconds a step waits, seconds in the background, bytes on disk.

    python -m benchmarks.checkpoints [--out=FILE.md]

The joint phase's state (parameters, Adam's moments) of `configs/demo.py:paper`'s network and of the
published ResNet-101; and the demo's seconds a joint step with and without checkpoints.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time

import jax
import ml_collections
import numpy as np

from benchmarks import flops, machine
from protoseg_jax import config as configs
from protoseg_jax import inference as inferences
from protoseg_jax import models
from protoseg_jax.devices import DevicePool
from protoseg_jax.models.prototypes import equal_blocks
from protoseg_jax.run import phases
from protoseg_jax.run.checkpoints import Checkpoint
from protoseg_jax.run.experiment import Experiment
from protoseg_jax.run.live import Live
from protoseg_jax.run.workdir import Workdir
from protoseg_jax.training import loop, start
from protoseg_jax.training import step as steps

REPEATS = 5
STEPS, WARM, EVERY = 60, 10, 10  # joint steps, those left out, steps between two checkpoints
# Config, classes and prototypes by name.
NETWORKS = {
    "demo": (configs.load("demo:paper"), 6, 48),
    "ResNet-101": (flops.config(), flops.CLASSES, flops.PROTOTYPES),
}


def joint_of(config: ml_collections.ConfigDict) -> phases.Phase:
    return next(phase for phase in phases.from_config(config) if phase.name == "joint")


def measure(name: str) -> tuple[float, float, float]:
    """(seconds blocked, seconds until it is on disk, megabytes) of one checkpoint."""
    config, classes, prototypes = NETWORKS[name]
    inference = inferences.from_config(config, classes, equal_blocks(prototypes, classes))
    pool = DevicePool(jax.local_devices()[:1])
    images = np.zeros((1, 65, 65, 3), np.float32)
    params = jax.device_get(jax.jit(inference.model.init)(jax.random.key(0), images))["params"]
    state = steps.init_state(params, joint_of(config), models.decay(config.model))
    rng = np.random.default_rng(0)  # moments of zeros would compress to nothing
    moments = jax.tree.map(
        lambda x: rng.standard_normal(x.shape, np.float32) if x.ndim else x, state.moments
    )
    state = pool.replicate(state.replace(moments=moments))
    blocked, whole = [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Workdir(folder).checkpoints
        for number in range(1, REPEATS + 1):
            begun = time.monotonic()
            local = pool.first(state)
            moments = {str(n): x for n, x in enumerate(jax.tree.leaves(local.moments))}
            arrays = {"params": {**params, **local.trainable}, "frozen": {}, "optimizer": moments}
            checkpoints.save(Checkpoint("joint", number, False, arrays, []))
            blocked.append(time.monotonic() - begun)
            checkpoints.wait()
            whole.append(time.monotonic() - begun)
        place = checkpoints.path / f"joint-{REPEATS:07d}"
        size = sum(p.stat().st_size for p in place.rglob("*") if p.is_file())
    return statistics.median(blocked), statistics.median(whole), size / 1e6


def step_seconds(every: int) -> float:
    """Mean seconds a joint step of the demo, with a checkpoint each `every` steps (0: none)."""
    config = configs.load("demo:paper")
    config.phases.joint.steps = WARM + STEPS
    config.update({"log_every": 1, "eval_every": 0, "checkpoint_every": every})
    with tempfile.TemporaryDirectory() as folder:
        pool = DevicePool(jax.local_devices()[:1])
        live = Live(Experiment(config, pool), Workdir(folder))
        live.workdir.start(config)
        loop.run(live, joint_of(config), start.initial(live.experiment), 0, lambda _: None)
        live.workdir.checkpoints.wait()
        lines = (live.workdir.path / "metrics.jsonl").read_text().splitlines()
        times = [json.loads(line)["time"] for line in lines]
    return (times[-1] - times[WARM - 1]) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    lines = [
        "# What a checkpoint costs",
        "",
        f"`python -m benchmarks.checkpoints`, {machine.describe()}",
        "",
        "| network | the step waits | on disk, with SHA-256, after | size |",
        "| --- | --- | --- | --- |",
    ]
    for name in NETWORKS:
        blocked, whole, size = measure(name)
        lines.append(f"| {name} | {blocked * 1e3:.0f} ms | {whole:.2f} s | {size:.0f} MB |")
    lines += ["", f"Joint phase: parameters and both moments. Medians of {REPEATS}."]
    pairs = [(step_seconds(0), step_seconds(EVERY)) for _ in range(REPEATS)]
    without, with_ = (1e3 * statistics.median(side) for side in zip(*pairs, strict=True))
    lines += [
        "",
        f"A joint step of the demo takes {without:.0f} ms without checkpoints and {with_:.0f} ms "
        f"with one every {EVERY} steps (the demo's own: every "
        f"{configs.load('demo:paper').checkpoint_every}); means over {STEPS} steps, medians of "
        f"{REPEATS} alternating runs.",
    ]
    machine.report(lines, arguments.out)


if __name__ == "__main__":
    main()
