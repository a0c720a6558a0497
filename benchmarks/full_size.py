"""The paper's configs at full size, on made images with random weights: speed and memory.

    python -m benchmarks.full_size [--batch=10] [--steps=20] [--dtypes=float32,bfloat16]
        [--configs=pascal,cityscapes,isbi_em] [--out=FILE]

For configs/pascal.py, cityscapes.py and isbi_em.py (whose feature map is as large as the image) on
one device: a training step of each phase at the crop size, the joint one also without the diversity
loss; the bare forward pass to logits, projection's search and evaluation (without overlap) at the
evaluation size, in turn; a step's FLOPs as XLA counts them, as a share of the device's measured
matmul rate; the hours of the whole recipe that follow. At most a config's own batch. On a CPU:
--batch=2 --steps=1 --dtypes=float32.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from benchmarks import flops, machine
from protoseg_jax import config as configs
from protoseg_jax import losses, models
from protoseg_jax.data.labels import generic
from protoseg_jax.devices import DevicePool
from protoseg_jax.evaluation import measures, segmentation
from protoseg_jax.models.prototypes import equal_blocks
from protoseg_jax.prototypes import search
from protoseg_jax.run import prototypes as records
from protoseg_jax.run.experiment import Experiment
from protoseg_jax.training import step as steps
from protoseg_jax.training.start import settle

# Config: classes, label size, images projected from and evaluated on.
SETS = {
    "demo": (6, (128, 128), 480, 80),
    "camvid": (11, (360, 480), 367, 101),
    "pascal": (21, (375, 500), 1464, 1449),
    "cityscapes": (19, (1024, 2048), 2975, 500),
    "isbi_em": (2, (512, 512), 20, 10),
}
NO_DIVERSITY = {"diversity": 0.0}


def matmul_rate(dtype: jnp.dtype, size: int) -> float:
    """FLOP/s of one large square matmul at the backbone's default precision, the best of five."""
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.float32).astype(dtype)
    multiply = jax.jit(lambda a: a @ a)
    multiply(x).block_until_ready()
    best = np.inf
    for _ in range(5):
        start = time.monotonic()
        multiply(x).block_until_ready()
        best = min(best, time.monotonic() - start)
    return 2 * size**3 / best


@dataclasses.dataclass(frozen=True)
class Program:
    """A function to be mapped over devices, and what it is called with."""

    function: Callable  # of `replicated` and `batch`
    replicated: tuple  # arguments that every device has a copy of
    batch: dict[str, np.ndarray]
    donated: tuple[int, ...] = ()

    def given(self) -> tuple:
        """As one device gets them."""
        return *self.replicated, self.batch

    def arguments(self, pool: DevicePool) -> tuple:
        """On the devices."""
        return *pool.replicate(self.replicated), pool.shard(self.batch)

    def shapes(self, pool: DevicePool) -> tuple:
        """The arguments' shapes alone, for devices that are not there."""
        n = pool.count
        replicated = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((n, *x.shape), x.dtype), self.replicated
        )
        batch = {
            k: jax.ShapeDtypeStruct((n, len(x) // n, *x.shape[1:]), x.dtype)
            for k, x in self.batch.items()
        }
        return *replicated, batch

    def compile(self, pool: DevicePool, arguments: tuple, **options: bool):
        """For arguments, or for their shapes; with XLA's options."""
        lowered = pool.map(self.function, self.donated).lower(*arguments)
        return lowered.compile(compiler_options=options)


class Case:
    """One config, its model changed by `model`, at one dtype on so many devices, with random
    weights, or zeros, which need no compiling."""

    def __init__(self, name: str, dtype: str, devices: int = 1, random: bool = True, **model: Any):
        self.classes, self.label_size, *_ = SETS[name.partition(":")[0]]
        self.config = configs.load(name)
        self.config.compute_dtype = dtype
        self.config.model.update(model)
        if self.config.model.preprocessing == "data":
            self.config.model.mean, self.config.model.std = (127.5,) * 3, (74.0,) * 3
        settle(self.config)
        prototypes = self.config.model.prototypes_per_class * self.classes
        self.owners = equal_blocks(prototypes, self.classes)
        self.pool = DevicePool(jax.local_devices()[:devices])
        labels = generic([f"class {c}" for c in range(self.classes)])
        self.experiment = Experiment(self.config, self.pool, labels)
        self.inference = self.experiment.inference(records.new(self.owners))
        images = jnp.zeros((1, *self.config.crop_size, 3))
        init, key = self.inference.model.init, jax.random.key(0)
        if random:
            self.variables = jax.device_get(jax.jit(init)(key, images))
        else:
            shapes = jax.eval_shape(init, key, images)
            self.variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        self.rng = np.random.default_rng(0)

    def batch(
        self, size: int, image: tuple[int, int], label: tuple[int, int], shown: int | None = None
    ) -> dict:
        """Made images, labels in blocks of one class; all classes, or `shown` of them an image."""
        own = np.stack([self.rng.permutation(self.classes)[:shown] for _ in range(size)])
        which = self.rng.integers(0, own.shape[1], (size, 64))
        blocks = np.take_along_axis(own, which, 1).reshape(size, 8, 8).astype(np.uint8)
        rows, cols = (np.arange(n) * 8 // n for n in label)
        return {
            "image": self.rng.integers(0, 256, (size, *image, 3), dtype=np.uint8),
            "label": blocks[:, rows][:, :, cols],
            "size": np.tile(np.array(label, np.int32), (size, 1)),
            "index": np.arange(size, dtype=np.int32),
        }

    def training_batch(self, size: int, shown: int | None = None) -> dict:
        """A `batch` as a step sees it."""
        batch = self.batch(size, *[tuple(self.config.crop_size)] * 2, shown)
        return {k: batch[k] for k in ("image", "label")}

    def evaluation_batch(self, size: int) -> dict:
        """A `batch` as search and evaluation see it."""
        return self.batch(size, self.config.eval_size, self.label_size)

    def train_program(self, name: str, batch: dict, **loss: float) -> Program:
        """A phase's step; `loss` changes the config's."""
        phase = next(p for p in self.experiment.phases if p.name == name)
        loss = ml_collections.ConfigDict({**self.config.loss.to_dict(), **loss})
        rules = models.decay(self.config.model)
        step = steps.make_step(
            self.inference,
            phase,
            losses.terms(loss, self.owners, self.classes),
            rules,
            accumulate=1,
            feature_sizes=self.inference.feature_sizes(tuple(self.config.crop_size)),
        )
        params = self.variables["params"]
        _, frozen = steps.split(params, phase)
        constants = {k: v for k, v in self.variables.items() if k != "params"}
        state = steps.init_state(params, phase, rules)
        return Program(step, (state, frozen, constants), batch, donated=(0,))

    def forward_program(self, batch: dict) -> Program:
        """The bare forward pass to logits."""

        def logits(variables, batch):
            return self.inference(variables, batch["image"]).logits

        return Program(logits, (self.variables,), batch)

    def search_program(self, batch: dict) -> Program:
        """Projection's search."""
        step = search.make_step(self.inference, search.of_own_class(self.owners), k=1)
        table = search.empty(len(self.owners), 1, self.config.model.features)
        return Program(step, (table, self.variables), batch)

    def evaluation_program(self, batch: dict, measured=(segmentation,)) -> Program:
        """Evaluation, by default without overlap."""
        context = measures.Context(self.experiment, self.inference, "validation")
        made = [module.make(context) for module in measured]
        parts = tuple((measure.step, measure.summed) for measure in made)
        step = measures.make_step(self.inference, None, parts)
        return Program(step, (self.variables,), batch)

    def train(
        self, name: str, batch_size: int, repeats: int, **loss: float
    ) -> tuple[float, float, float]:
        """(seconds a step, bytes at the peak, FLOPs a step) of a phase."""
        program = self.train_program(name, self.training_batch(batch_size), **loss)
        state, *rest = program.arguments(self.pool)
        compiled = program.compile(self.pool, (state, *rest))

        def run(state):
            state, metrics = compiled(state, *rest)
            return state, metrics["loss"]

        seconds = timed_state(run, state, repeats)
        return seconds, peak(compiled), flops.flops(program.function, *program.given())


def timed_in_turn(runs: Sequence[Callable], repeats: int) -> list[float]:
    """Median seconds of each call, one of each in turn, after one that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        row = []
        for run in runs:
            start = time.monotonic()
            jax.block_until_ready(run())
            row.append(time.monotonic() - start)
        seconds.append(row)
    return np.median(seconds[1:], axis=0).tolist()


def timed_state(run: Callable, state, repeats: int) -> float:
    """Mean seconds of a call that changes a state, after one that does not count."""
    state, loss = run(state)
    jax.block_until_ready(state)
    start = time.monotonic()
    for _ in range(repeats):
        state, loss = run(state)
    jax.block_until_ready(state)
    assert np.isfinite(np.asarray(loss)).all(), "the loss is not finite"
    return (time.monotonic() - start) / repeats


def peak(compiled) -> float:
    """Bytes that XLA plans for a program: arguments, results and what it keeps in between."""
    memory = compiled.memory_analysis()
    parts = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    return sum(getattr(memory, p) for p in parts) - memory.alias_size_in_bytes


def page(name: str, dtype: str, batch_size: int, repeats: int) -> list[str]:
    """The table of one config at one dtype."""
    case, (*_, projected, evaluated) = Case(name, dtype), SETS[name.partition(":")[0]]
    on_cpu = jax.local_devices()[0].platform == "cpu"
    rate = matmul_rate(jnp.dtype(dtype), 4096 if on_cpu else 16384)
    lines = [
        f"## configs/{name}.py, {dtype}",
        "",
        f"Largest matmul: {rate / 1e12:.2f} TFLOP/s.",
        "",
        "| | batch | seconds a step | images/s | memory, GB | TFLOP a step | of matmul |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    hours = 0.0
    batch_size = min(batch_size, case.config.batch_size)
    for phase, changed in (
        ("warmup", {}),
        ("joint", {}),
        ("joint", NO_DIVERSITY),
        ("finetune", {}),
    ):
        if not case.config.phases[phase].steps:
            continue
        seconds, memory, count = case.train(phase, batch_size, repeats, **changed)
        if not changed:
            number = case.config.phases[phase].steps * (2 if phase == "finetune" else 1)
            hours += number * seconds * case.config.batch_size / batch_size / 3600
        without = ", λ_J = 0" if changed else ""
        lines.append(
            f"| {phase}{without} | {batch_size} | {seconds:.3f} | {batch_size / seconds:.2f} | "
            f"{memory / 1e9:.2f} | {count / 1e12:.2f} | {count / seconds / rate:.0%} |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    size = min(batch_size, case.config.eval_batch_size)
    batch = case.evaluation_batch(size)
    programs = {
        "forward": case.forward_program(batch),
        "projection": case.search_program(batch),
        "evaluation": case.evaluation_program(batch),
    }
    runs, memory = [], []
    for program in programs.values():
        given = program.arguments(case.pool)
        compiled = program.compile(case.pool, given)
        runs.append(functools.partial(compiled, *given))
        memory.append(peak(compiled))
    seconds = dict(zip(programs, timed_in_turn(runs, repeats), strict=True))
    for kind, needed in zip(programs, memory, strict=True):
        lines.append(
            f"| {kind} | {size} | {seconds[kind]:.3f} | {size / seconds[kind]:.2f} | "
            f"{needed / 1e9:.2f} | | |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    ratios = [seconds[kind] / seconds["forward"] for kind in ("projection", "evaluation")]
    passes = 2 * projected * seconds["projection"] + 6 * evaluated * seconds["evaluation"]
    hours += passes / size / 3600
    return [
        *lines,
        "",
        f"Of a bare forward pass's time, in turn, projection takes {ratios[0]:.2f} and evaluation "
        f"{ratios[1]:.2f}.",
        "",
        f"The whole recipe, batch {case.config.batch_size}, both searches and six evaluations: "
        f"{hours:,.1f} hours at this speed, validation inside phases and input not counted.",
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--configs", default="pascal,cityscapes,isbi_em")
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    lines = [
        "# The paper's configs at full size",
        "",
        f"`python -m benchmarks.full_size --batch={arguments.batch} --steps={arguments.steps} "
        f"--dtypes={arguments.dtypes} --configs={arguments.configs}`, {machine.describe()}",
        "",
        "Made images, random weights, one device. Memory is what XLA plans for the program.",
        "",
    ]
    for name in arguments.configs.split(","):
        for dtype in arguments.dtypes.split(","):
            lines += page(name, dtype, arguments.batch, arguments.steps)
    machine.report(lines, arguments.out)


if __name__ == "__main__":
    main()
