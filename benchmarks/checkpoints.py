"""What checkpoints cost: seconds a step waits, seconds in the background, bytes on disk.

    python benchmarks/checkpoints.py [--out=FILE.md]

The joint phase's state (parameters, Adam's moments) of `configs/demo.py`'s network and of the
published ResNet-101; and the demo's seconds a joint step with and without checkpoints.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time

import jax
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import flops  # noqa: E402
import machine  # noqa: E402

from configs import demo  # noqa: E402
from protoseg_jax import inference as inferences  # noqa: E402
from protoseg_jax.devices import DevicePool  # noqa: E402
from protoseg_jax.training import step as steps  # noqa: E402
from protoseg_jax.training.run import Run  # noqa: E402
from protoseg_jax.workdir import Checkpoint, Workdir  # noqa: E402

REPEATS = 5
STEPS, WARM, EVERY = 60, 10, 10  # joint steps, those left out, steps between two checkpoints


def network(name: str) -> inferences.Inference:
    if name == "demo":
        return inferences.from_config(demo.get_config(), 6, 48)
    return inferences.from_config(flops.config(), flops.CLASSES, flops.PROTOTYPES)


def measure(name: str) -> tuple[float, float, float]:
    """(seconds blocked, seconds until it is on disk, megabytes) of one checkpoint."""
    inference, pool = network(name), DevicePool(jax.local_devices()[:1])
    images = np.zeros((1, 65, 65, 3), np.float32)
    params = jax.device_get(jax.jit(inference.model.init)(jax.random.key(0), images))["params"]
    state = steps.init_state(params, flops.PHASES["joint"])
    rng = np.random.default_rng(0)  # moments of zeros would compress to nothing
    moments = jax.tree.map(
        lambda x: rng.standard_normal(x.shape, np.float32) if x.ndim else x, state.moments
    )
    state = pool.replicate(state.replace(moments=moments))
    blocked, whole = [], []
    with tempfile.TemporaryDirectory() as folder:
        workdir = Workdir(folder)
        for number in range(1, REPEATS + 1):
            start = time.monotonic()
            local = pool.first(state)
            moments = {str(n): x for n, x in enumerate(jax.tree.leaves(local.moments))}
            arrays = {"params": {**params, **local.trainable}, "frozen": {}, "optimizer": moments}
            workdir.save(Checkpoint("joint", number, False, arrays, []))
            blocked.append(time.monotonic() - start)
            workdir.wait()
            whole.append(time.monotonic() - start)
        place = workdir.checkpoints / f"joint-{REPEATS:07d}"
        size = sum(p.stat().st_size for p in place.rglob("*") if p.is_file())
    return statistics.median(blocked), statistics.median(whole), size / 1e6


def step_seconds(every: int) -> float:
    """Mean seconds a joint step of the demo, with a checkpoint each `every` steps (0: none)."""
    config = demo.get_config()
    config.phases.joint.steps = WARM + STEPS
    config.update({"log_every": 1, "eval_every": 0, "checkpoint_every": every})
    with tempfile.TemporaryDirectory() as folder:
        run = Run(config, Workdir(folder), DevicePool(jax.local_devices()[:1]))
        run.workdir.start(config, {})
        joint = next(phase for phase in run.phases if phase.name == "joint")
        run.train_phase(joint, run.initial(), 0)
        run.workdir.wait()
        lines = (run.workdir.path / "metrics.jsonl").read_text().splitlines()
        times = [json.loads(line)["time"] for line in lines]
    return (times[-1] - times[WARM - 1]) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    lines = [
        "# What a checkpoint costs",
        "",
        f"`python benchmarks/checkpoints.py`, {machine.describe()}",
        "",
        "| network | the step waits | on disk, with SHA-256, after | size |",
        "| --- | --- | --- | --- |",
    ]
    for name in ("demo", "ResNet-101"):
        blocked, whole, size = measure(name)
        lines.append(f"| {name} | {blocked * 1e3:.0f} ms | {whole:.2f} s | {size:.0f} MB |")
    lines += ["", f"Joint phase: parameters and both moments. Medians of {REPEATS}."]
    pairs = [(step_seconds(0), step_seconds(EVERY)) for _ in range(REPEATS)]
    without, with_ = (1e3 * statistics.median(side) for side in zip(*pairs, strict=True))
    lines += [
        "",
        f"A joint step of the demo takes {without:.0f} ms without checkpoints and {with_:.0f} ms "
        f"with one every {EVERY} steps (the demo's own: every "
        f"{demo.get_config().checkpoint_every}); means over {STEPS} steps, medians of {REPEATS} "
        "alternating runs.",
    ]
    machine.report(lines, arguments.out)


if __name__ == "__main__":
    main()
