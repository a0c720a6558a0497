"""Our joint step and forward pass against PyTorch's on the same CPU, in turn.

    python -m benchmarks.pytorch [--cases=resnet101,msc,em,camvid,demo,forward,lite0,lite0_forward]
        [--rounds=3] [--devices=2] [--diversity=0.25] [--out=FILE]

PyTorch's side is the authors' form of the same network, loss and optimiser (benchmarks/authors.py)
over the same weights and images, in each of its two memory layouts, with as many threads as there
are cores. Each side is a process of its own that waits while another works. After one step that
does not count, whose losses must agree, a round is one step of each. Ours splits a batch over
`--devices` parts of the CPU, as far as it divides, as training does; by default one a core.
"""

import argparse
import dataclasses
import multiprocessing
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

from benchmarks import authors, full_size, machine
from protoseg_jax import models
from protoseg_jax.devices import cores, keep_compiled_programs, keep_freed_memory, split_cpu
from protoseg_jax.inference import shrink_labels
from protoseg_jax.models import efficientnet
from protoseg_jax.training import optimizer

OURS, LAYOUTS = "ours", ("contiguous_format", "channels_last")
TOLERANCE = 1e-2  # of the first losses


@dataclasses.dataclass(frozen=True)
class Task:
    """What is timed.

    Attributes:
      title: of its row.
      config: as `benchmarks.full_size.Case` takes it.
      batch: images.
      shown: classes that an image's labels show, as in the real data; None: a forward pass.
      model: changes of `config.model`.
    """

    title: str
    config: str
    batch: int
    shown: int | None
    model: dict[str, Any] = dataclasses.field(default_factory=dict)


LITE0 = {
    "backbone": "efficientnet",
    "depth": 0,
    "output_stride": 32,
    "stages": (3, 5, 7),
    "width": 64,
}
LITE0 |= {"preprocessing": "efficientnet_lite"}
TASKS = {
    "resnet101": Task("DeepLabv2-ResNet-101, 2 × 321²", "pascal", 2, 3, {"msc": ()}),
    "msc": Task("the same with MSC", "pascal", 2, 3),
    "em": Task("EM's U-Net (`:cpu`), 4 × 128²", "isbi_em:cpu", 4, 2),
    "camvid": Task("CamVid's U-Net, 8 × 180×240", "camvid:scratch", 8, 9),
    "demo": Task("the demo's ResNet-14, 8 × 128²", "demo:paper", 8, 3),
    "forward": Task("forward, DeepLabv2-ResNet-101, 1024×2048", "cityscapes", 1, None),
    "lite0": Task(
        "EfficientNet-Lite0 on several stages, 8 × 180×240", "camvid:scratch", 8, 9, LITE0
    ),
    "lite0_forward": Task("forward, the same", "camvid:scratch", 8, None, LITE0),
}


def calm(variables: Any) -> Any:
    """Random weights whose frozen BatchNorms keep 33 blocks from adding up to large values."""

    def scale(path: tuple, x: np.ndarray) -> np.ndarray:
        names = [key.key for key in path]
        return 0.3 * x if names[0] == "frozen" and names[-2:] == ["norm3", "scale"] else x

    return jax.tree_util.tree_map_with_path(scale, variables)


def flat(tree: Any) -> dict[str, Any]:
    """Leaves by their path, joined by "/"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


def ours(task: Task, devices: int, diversity: float) -> tuple[Callable[[], float], dict]:
    """A call as `authors.make` gives it, and the job for that."""
    parts = max(n for n in range(1, devices + 1) if task.batch % n == 0)
    case = full_size.Case(task.config, "float32", parts, **task.model)
    case.variables = calm(case.variables)
    config, params = case.config, flat(case.variables["params"])
    normal = case.inference.preprocessing
    job = {
        "model": config.model.to_dict(),
        "rows": efficientnet.rows(config.model.depth)
        if config.model.backbone == "efficientnet"
        else None,
        "parameters": {**flat(case.variables.get("frozen", {})), **params},
        "normal": tuple(np.array(x, np.float32) for x in (normal.mean, normal.std)),
    }
    assert normal.channels == (0, 1, 2), "the counterpart takes RGB"
    if task.shown is None:
        program = case.forward_program({"image": case.evaluation_batch(task.batch)["image"]})
        arguments = program.arguments(case.pool)
        forward = program.compile(case.pool, arguments)
        job["image"] = program.batch["image"]
        return lambda: float(np.abs(forward(*arguments)).mean()), job

    phase = next(p for p in case.experiment.phases if p.name == "joint")
    assert phase.schedule == "poly" and config.loss.diversity_reduction == "present"
    rules, batch = models.decay(config.model), case.training_batch(task.batch, task.shown)
    sizes = case.inference.feature_sizes(tuple(config.crop_size))
    job |= {
        "image": batch["image"],
        "labels": [np.array(shrink_labels(batch["label"], None, s)) for s in sizes],
        "owners": case.owners,
        "diversity": diversity,
        "phase": dataclasses.asdict(phase),
        "trained": {n for n in params if n.split("/")[0] in phase.learning_rates},
        "decayed": {n for n in params if rules[n.split("/")[0]](tuple(n.split("/")))},
        "weight_decay": optimizer.WEIGHT_DECAY,
    }
    program = case.train_program("joint", batch, diversity=diversity)
    state, *rest = program.arguments(case.pool)
    compiled = program.compile(case.pool, (state, *rest))

    def step() -> float:
        nonlocal state
        state, metrics = compiled(state, *rest)
        jax.block_until_ready(state)
        return float(metrics["loss"][0])

    return step, job


def serve(pipe: Any, side: str, *arguments: Any) -> None:
    """A side's process: send what the others need, then time a step whenever asked."""
    if side == OURS:
        keep_compiled_programs()
        keep_freed_memory()
        step, job = ours(*arguments)
    else:
        step, job = authors.make(*arguments), None
    pipe.send(job)
    while pipe.recv():
        start = time.perf_counter()
        value = step()
        pipe.send((time.perf_counter() - start, value))


class Side:
    """A process that takes steps."""

    def __init__(self, side: str, *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, side, *arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.job = self.pipe.recv()

    def step(self) -> tuple[float, float]:
        """(seconds, loss)."""
        self.pipe.send(True)
        return self.pipe.recv()

    def end(self) -> None:
        self.pipe.send(False)
        self.process.join()


def measure(task: Task, rounds: int, devices: int, diversity: float) -> tuple[str, bool]:
    """The row of a task, and whether the first losses agree."""
    first = Side(OURS, task, devices, diversity)
    sides = [first, *(Side(x, first.job, x, cores()) for x in LAYOUTS)]
    losses = np.array([side.step()[1] for side in sides])
    taken = np.array([[side.step() for side in sides] for _ in range(rounds)])
    for side in sides:
        side.end()
    assert np.isfinite(losses).all() and np.isfinite(taken).all(), "a loss is not finite"
    least, middle = taken[..., 0].min(0), np.median(taken[..., 0], 0)
    cells = [f"{a:.3f}, {b:.3f}" for a, b in zip(least, middle, strict=True)]
    ratios = [f"{x[0] / min(x[1:]):.2f}" for x in (least, middle)]
    off = np.abs(losses[1:] / losses[0] - 1).max()
    row = f"| {task.title} | {' | '.join(cells)} | {' | '.join(ratios)} | {off:.0e} |"
    return row, off <= TOLERANCE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(TASKS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--devices", type=int, default=cores())
    parser.add_argument("--diversity", type=float, default=0.25, help="λ_J; 0: both without")
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    names = arguments.cases.split(",")
    split_cpu(arguments.devices)  # of the sides
    rows, wrong = [], []
    for name in names:
        row, agree = measure(TASKS[name], arguments.rounds, arguments.devices, arguments.diversity)
        rows.append(row)
        wrong += [] if agree else [name]
        print(row, file=sys.stderr, flush=True)
    lines = [
        "# Against PyTorch on a CPU",
        "",
        f"`python -m benchmarks.pytorch --cases={arguments.cases} --rounds={arguments.rounds} "
        f"--devices={arguments.devices} --diversity={arguments.diversity:g}`, "
        f"{machine.describe()} PyTorch {torch.__version__}, {cores()} threads.",
        "",
        "Seconds of a joint step, or of a forward pass, made images, random weights, float32: the "
        f"least of {arguments.rounds}, the median. Ratios: ours over the better of PyTorch's. "
        "Labels show as many classes an image as the real ones do; no weights of classes.",
        "",
        "| | ours | PyTorch, contiguous | PyTorch, channels last | ratio, least | ratio, median "
        "| first losses differ by |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *rows,
    ]
    machine.report(lines, arguments.out)
    if wrong:
        sys.exit(f"the losses of the first step differ by more than {TOLERANCE:g}: {wrong}")


if __name__ == "__main__":
    main()
