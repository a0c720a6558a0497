"""A run: its phases in order, each scored, drawn and checkpointed; resumable.

`train` is what train.py calls. Everything a run leaves behind is in its `Workdir`.
"""

import dataclasses
import datetime
import functools
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import flax
import jax
import ml_collections
import numpy as np
import optax
import orbax.checkpoint
import tensorboardX

import protoseg_jax
from protoseg_jax import inference as inferences
from protoseg_jax import losses
from protoseg_jax.data import augment, builders, pipeline, tiles
from protoseg_jax.devices import (
    DevicePool,
    backend_description,
    barrier,
    is_main,
    leave_processes,
    on_any_process,
    stack_metrics,
)
from protoseg_jax.errors import UserError
from protoseg_jax.evaluation import evaluate as evaluation
from protoseg_jax.explain import figures
from protoseg_jax.interrupts import Interrupted, Interrupts
from protoseg_jax.models import port_torch
from protoseg_jax.progress import Progress, say
from protoseg_jax.prototypes import patch_search
from protoseg_jax.prototypes.projection import project
from protoseg_jax.prototypes.pruning import NEIGHBOURS, prune
from protoseg_jax.training import optimizer as optimizers
from protoseg_jax.training import phases as phases_lib
from protoseg_jax.training import start as starts
from protoseg_jax.training import step as steps
from protoseg_jax.training.phases import Phase
from protoseg_jax.workdir import Checkpoint, Workdir, write_json


class Run:
    """A config's data, devices and folder, and what every phase needs of them.

    Args:
      config: the experiment.
      workdir: its folder.
      pool: the devices; all local ones by default.

    Raises:
      UserError: the config does not fit the data or the devices.
    """

    def __init__(
        self, config: ml_collections.ConfigDict, workdir: Workdir, pool: DevicePool | None = None
    ):
        self.config = config
        self.workdir = workdir
        self.pool = pool or DevicePool()
        self.interrupts = Interrupts()
        self.phases = phases_lib.from_config(config)
        self.data = builders.from_config(config)
        self.num_classes = len(self.data.label_set)
        self.black_box = config.model.head == "linear"
        self.held_out = self._held_out()
        self.prototype_init = config.model.get("prototype_init", "uniform")
        self._tiled: dict[tuple[str, bool], tiles.Tiled] = {}

    # -- models and data -----------------------------------------------------------------------

    def _held_out(self) -> int | None:
        """The class of `data.held_out`, which is void for this run and has no prototypes."""
        name, names = self.config.data.get("held_out"), self.data.label_set.names
        if name and name not in names:
            raise UserError(
                f"data.held_out={name!r} is no class of data set {self.data.name!r}; "
                f"choose one of: {', '.join(names)}"
            )
        return names.index(name) if name else None

    def source(self, split: str) -> builders.Source | pipeline.Without:
        """A split's images and labels, a held-out class void."""
        source = self.data.source(split)
        return source if self.held_out is None else pipeline.Without(source, self.held_out)

    def check(self) -> None:
        """Refuse what would only show later.

        Raises:
          UserError: the batch does not divide, a size or number is too small, an image is smaller
            than a tile, a class has nothing to learn from, or a new run's weights are not its
            network's.
        """
        config = self.config
        self.pool.check_batch(config.batch_size, config.accumulate)
        if self.prototype_init not in starts.PROTOTYPE_INITS:
            raise UserError(
                f"model.prototype_init={self.prototype_init!r} is unknown; choose one of: "
                f"{', '.join(starts.PROTOTYPE_INITS)}"
            )
        for key in ("eval_batch_size", "log_every"):
            if config[key] < 1:
                raise UserError(f"{key}={config[key]} must be at least 1; set --config.{key}")
        for key in ("crop_size", "eval_size"):
            size = tuple(config[key])
            points = (0, 0)
            if len(size) == 2 and min(size) >= 8:
                points = min(self.inference([{"class": 0}]).feature_sizes(size), key=min)
            if min(points) < 2:
                raise UserError(
                    f"{key}={size} is too small for the backbone: it leaves fewer than 2×2 points; "
                    f"set --config.{key} to (height, width) of 8 pixels or more"
                )
        for split in ("validation", config.data.projection_split):
            self.examples(split)
        for split in dict.fromkeys((config.data.train_split, config.data.projection_split)):
            pixels = self.data.class_pixels(split)
            absent = [
                name
                for c, name in enumerate(self.data.label_set.names)
                if not pixels[c] and c != self.held_out
            ]
            if absent:
                raise UserError(
                    f"no pixel of class {', '.join(map(repr, absent))} in split {split!r} of "
                    f"data set {self.data.name!r}, so there is nothing to learn it from; add "
                    "images of it, or remove it from the classes"
                )
        if not (self.workdir.path / "config.json").is_file():
            self.initial()

    def inference(self, prototypes: list[dict[str, Any]]) -> inferences.Inference:
        """The model for these prototypes."""
        return inferences.from_config(self.config, self.num_classes, len(prototypes))

    def classes_of(self, prototypes: list[dict[str, Any]]) -> np.ndarray:
        """c(j), [M]."""
        return np.array([p["class"] for p in prototypes], np.int64)

    def class_weights(self) -> np.ndarray | None:
        """Weights of the cross-entropy by `loss.class_balance`, or None: all alike (see losses).

        A class held out has no say in the others' weights, and 1 itself.
        """
        power = self.config.loss.get("class_balance", 0.0)
        if not power:
            return None
        learnt = [c for c in range(self.num_classes) if c != self.held_out]
        weights = np.ones(self.num_classes, np.float32)
        pixels = self.data.class_pixels(self.config.data.train_split)
        weights[learnt] = losses.class_weights(pixels[learnt], power)
        return weights

    @property
    def eval_batch_size(self) -> int:
        """Images an evaluation batch of this process: the config's, rounded up to the devices."""
        return -(-self.config.eval_batch_size // self.pool.total) * self.pool.count

    def examples(self, split: str, *, held_out: bool = False) -> Any:
        """What evaluation and search look at, one after another: a split's images, or with
        `eval_overlap` their tiles. `held_out` keeps the labels of a class that is held out."""
        source = self.data.source(split) if held_out else self.source(split)
        overlap = self.config.get("eval_overlap")
        if overlap is None:
            return source
        if (split, held_out) not in self._tiled:  # it looks at every image's size
            tiled = tiles.Tiled(source, tuple(self.config.eval_size), overlap)
            self._tiled[split, held_out] = tiled
        return self._tiled[split, held_out]

    def eval_batches(self, split: str, start: int = 0, *, held_out: bool = False):
        """This process's part of `examples`, from one on, at evaluation preprocessing."""
        return pipeline.eval_batches(
            self.examples(split, held_out=held_out),
            eval_size=tuple(self.config.eval_size),
            batch_size=self.eval_batch_size,
            workers=self.config.data.workers,
            start=start,
            part=(self.pool.process, self.pool.processes),
            largest=self.data.label_size(split) if self.pool.processes > 1 else None,
        )

    def asked_to_stop(self) -> int:
        """The signal that asked any process to stop, or 0; all must call this at the same place."""
        return on_any_process(self.interrupts.pending)

    @functools.lru_cache(maxsize=1)  # noqa: B019 (a program has one run)
    def initial(self) -> Checkpoint:
        """The run before its first phase (`start.initial`)."""
        return starts.initial(self)

    def score(
        self, checkpoint: Checkpoint, split: str, *, overlap: bool = True, flips: bool = False
    ) -> dict[str, Any]:
        """Scores of a checkpoint on a split; `flips` averages over mirror images."""
        inference = self.inference(checkpoint.prototypes)
        return evaluation.evaluate(
            self.pool,
            inferences.flipped(inference, self.config) if flips else inference,
            checkpoint.variables,
            self.eval_batches(split),
            prototype_classes=self.classes_of(checkpoint.prototypes),
            num_classes=self.num_classes,
            overlap=overlap,
        )

    # -- the phases ----------------------------------------------------------------------------

    def train_phase(self, phase: Phase, start: Checkpoint, first_batch: int) -> Checkpoint:
        """Run an optimiser phase from `start` (the phase before, or a place inside this one).

        Args:
          phase: the phase.
          start: where to go on.
          first_batch: the data position of the phase's step 0.

        Raises:
          UserError: the loss is not finite.
        """
        config, pool = self.config, self.pool
        inference = self.inference(start.prototypes)
        params, frozen_vars = start.arrays["params"], start.arrays["frozen"]
        state = steps.init_state(params, phase)
        if start.phase == phase.name:
            structure = jax.tree.structure(state.moments)
            saved = start.arrays["optimizer"]
            leaves = [saved[str(n)] for n in range(len(saved))]
            state = state.replace(step=np.int32(start.step), moments=structure.unflatten(leaves))
        begun = start.step if start.phase == phase.name else 0
        _, frozen = steps.split(params, phase)
        constants = {"frozen": frozen_vars} if frozen_vars else {}

        step = pool.map(
            steps.make_step(
                inference,
                phase,
                prototype_classes=self.classes_of(start.prototypes),
                num_classes=self.num_classes,
                loss_config=config.loss,
                accumulate=config.accumulate,
                feature_sizes=inference.feature_sizes(tuple(config.crop_size)),
                class_weights=self.class_weights(),
            ),
            donate_argnums=(0,),
        )
        batches = pipeline.train_batches(
            self.source(config.data.train_split),
            augment.from_config(config),
            batch_size=config.batch_size,
            seed=config.seed,
            start=first_batch + begun,
            workers=config.data.workers,
            part=(pool.process, pool.processes),
        )
        state, frozen, constants = map(pool.replicate, (state, frozen, constants))
        clock = _started(start, phase.name)
        board = tensorboardX.SummaryWriter(
            str(self.workdir.path / "tensorboard"),
            purge_step=first_batch + begun + 1,
            write_to_disk=is_main(),
        )
        pending: list[dict[str, jax.Array]] = []
        window = time.monotonic()

        def checkpoint(number: int) -> Checkpoint:
            local = pool.first(state)
            merged = {**params, **jax.device_get(local.trainable)}
            moments = {str(n): x for n, x in enumerate(jax.tree.leaves(local.moments))}
            finished = number == phase.steps
            arrays = {"params": merged, "frozen": frozen_vars}
            if not finished:  # the next phase starts with fresh moments
                arrays["optimizer"] = moments
            seconds = time.monotonic() - clock
            return Checkpoint(phase.name, number, finished, arrays, start.prototypes, seconds)

        with Progress(phase.name, phase.steps, begun) as progress:
            batches = pool.prefetch(batches)
            for number in range(begun + 1, phase.steps + 1):
                state, metrics = step(state, frozen, constants, next(batches))
                pending.append(metrics)
                last = number == phase.steps
                saves = config.checkpoint_every and number % config.checkpoint_every == 0
                scores = config.eval_every and number % config.eval_every == 0 and not last
                logs = last or number % config.log_every == 0
                # With several processes all must stop at the same step: they agree where they log.
                stop = self.asked_to_stop() if not last and (logs or pool.processes == 1) else 0
                if logs or saves or scores or stop:
                    means = stack_metrics(pending)
                    rate = len(pending) * config.batch_size / (time.monotonic() - window)
                    self._log(board, phase, number, first_batch, means, rate)
                    progress.update(len(pending), means["loss"], rate)
                    pending = []
                    if not math.isfinite(means["loss"]):
                        raise UserError(
                            f"the loss is {means['loss']} at step {number} of phase {phase.name}; "
                            f"lower its phases.{phase.name}.learning_rates, or look at the data; "
                            f"the last good checkpoint is kept in {self.workdir.checkpoints}"
                        )
                    if not last and (stop or saves or scores):
                        now = checkpoint(number)
                    if not last and (stop or saves):
                        self.workdir.save(now)
                    if stop:
                        raise Interrupted(stop)
                    if scores:
                        result = self.score(now, "validation", overlap=False)
                        miou = _percent(result["miou"])
                        say(f"{phase.name} step {number}: validation mIoU {miou}")
                        board.add_scalar("validation/miou", result["miou"], first_batch + number)
                    window = time.monotonic()
        board.close()
        return checkpoint(phase.steps)

    def _log(self, board, phase, number, first_batch, means, rate) -> None:
        """One line of metrics.jsonl and the same on TensorBoard."""
        fastest = max(phase.learning_rates.values())
        means = {
            **means,
            "learning_rate": float(optimizers.schedule(phase, fastest)(number - 1)),
            "images_per_second": rate,
        }
        line = {"phase": phase.name, "step": number, "time": time.time(), **means}
        self.workdir.append_metrics(line)
        for key, value in means.items():
            board.add_scalar(f"train/{key}", value, first_batch + number)

    def search(self, start: Checkpoint, *, k: int, within_class: bool) -> patch_search.Patches:
        """The k nearest patches of every prototype in the projection split."""
        inference = self.inference(start.prototypes)
        classes = self.classes_of(start.prototypes)
        split = self.config.data.projection_split

        name = "projection" if within_class else "pruning"
        table, done = patch_search.empty(len(classes), k, self.config.model.features), 0
        if start.phase == name:  # a search that goes on
            table, done = patch_search.Patches(**start.arrays["search"]), start.step
        total, stride = len(self.examples(split)), self.eval_batch_size * self.pool.processes
        clock = _started(start, name)

        def after_batch(best) -> None:
            progress.update(min(stride, total - progress.done))
            done = progress.done
            if done == total:
                return
            stop = self.asked_to_stop()
            every = self.config.checkpoint_every
            if stop or (every and done // stride % every == 0):
                arrays = {n: start.arrays[n] for n in ("params", "frozen")}
                arrays["search"] = vars(best())
                seconds = time.monotonic() - clock
                self.workdir.save(Checkpoint(name, done, False, arrays, start.prototypes, seconds))
            if stop:
                raise Interrupted(stop)

        def run(step, table, batches, after):
            return patch_search.search(self.pool, step, start.variables, batches, table, after)

        with Progress(name, total, done, unit="image") as progress:
            patches = run(
                patch_search.make_search_step(inference, classes, k=k, within_class=within_class),
                table,
                self.eval_batches(split, done),
                after_batch,
            )
        missing = np.unique(classes[~np.isfinite(patches.squared_distance[:, 0])])
        for c in missing.tolist() if within_class else []:
            say(
                f"warning: class {self.data.label_set.names[c]!r} has pixels but no point on the "
                "feature map; its prototypes are projected onto cells that contain any of its "
                "pixels"
            )
            found = run(
                patch_search.make_fallback_step(inference, c),
                patch_search.empty(len(classes), k, self.config.model.features),
                self.eval_batches(split),
                None,
            )
            own = classes == c
            patches = jax.tree.map(
                lambda a, b, own=own: np.where(own.reshape(-1, *[1] * (a.ndim - 1)), b, a),
                patches,
                found,
            )
        return patches

    def projection_phase(self, phase: Phase, start: Checkpoint) -> Checkpoint:
        """Replace prototypes by their nearest patches; drop duplicates."""
        clock = _started(start, phase.name)
        patches = self.search(start, k=1, within_class=True)
        result = project(patches, self.classes_of(start.prototypes))
        arrays, prototypes = keep_prototypes(start, result.keep)
        arrays["params"]["prototypes"] = {"vectors": result.vectors}
        size = self.inference(prototypes).feature_sizes(tuple(self.config.eval_size))[-1]
        source = self.examples(self.config.data.projection_split)
        for prototype, place in zip(prototypes, result.sources, strict=True):
            example = source[place["image"]]
            box = inferences.cell_box(place["row"], place["col"], size, example["image"].shape[:2])
            prototype.update(place, image_id=example["image_id"], box=box)
            if isinstance(source, tiles.Tiled):
                prototype["tile"] = list(source.places[place["image"]].corner)
        say(
            f"projection: {len(start.prototypes)} prototypes became patches, "
            f"{len(start.prototypes) - len(prototypes)} duplicates dropped"
        )
        seconds = time.monotonic() - clock
        return Checkpoint(phase.name, 1, True, arrays, prototypes, seconds)

    def pruning_phase(self, phase: Phase, start: Checkpoint) -> Checkpoint:
        """Drop prototypes whose nearest patches are not of their class."""
        clock = _started(start, phase.name)
        patches = self.search(start, k=NEIGHBOURS, within_class=False)
        keep, saved = prune(patches, self.classes_of(start.prototypes))
        arrays, prototypes = keep_prototypes(start, keep)
        for c in saved:
            say(
                f"warning: pruning would have dropped every prototype of class "
                f"{self.data.label_set.names[c]!r}; its best one is kept"
            )
        say(f"pruning: {len(keep)} of {len(start.prototypes)} prototypes stay")
        seconds = time.monotonic() - clock
        return Checkpoint(phase.name, 1, True, arrays, prototypes, seconds)

    # -- what a phase leaves behind ------------------------------------------------------------

    def write_prototypes(self, checkpoint: Checkpoint) -> None:
        """prototypes.json, the source crops, the source images and one picture a class.

        A prototype's "source" is the example it comes from: its file in prototypes/sources/, its
        own (height, width), which the file may be smaller than, and the patch's box in it.
        """
        names = self.data.label_set.names
        inference = self.inference(checkpoint.prototypes)
        eval_size = tuple(self.config.eval_size)
        size = inference.feature_sizes(eval_size)[-1]
        keys = ("index", "class", "class_name", "image_id", "row", "col", "box", "squared_distance")
        entries = [{**p, "class_name": names[p["class"]]} for p in checkpoint.prototypes]
        in_images = [{**e, "box": _moved(e["box"], e.get("tile", (0, 0)))} for e in entries]
        source = self.examples(self.config.data.projection_split)
        folder = self.workdir.path / "prototypes"
        folder.mkdir(exist_ok=True)
        for old in (*folder.glob("*.png"), *folder.glob("sources/*.jpg")):
            old.unlink()
        homes = {}
        for number in sorted({e["image"] for e in entries}):
            example = source[number]
            name = figures.source_name(number, example["image_id"])
            figures.save_source(folder / "sources" / name, example["image"])
            homes[number] = {"file": name, "size": list(example["image"].shape[:2])}
        write_json(
            self.workdir.path / "prototypes.json",
            {
                "phase": checkpoint.phase,
                "eval_size": list(eval_size),
                "feature_size": list(size),
                "classes": list(names),
                "prototypes": [
                    {k: placed[k] for k in keys}
                    | {"source": {**homes[e["image"]], "box": e["box"]}}
                    for e, placed in zip(entries, in_images, strict=True)
                ],
            },
        )
        infer = jax.jit(lambda v, image: inference(v, image[None]).similarities[0])
        variables = checkpoint.variables
        for c, name in enumerate(names):
            own = [(j, e) for j, e in enumerate(entries) if e["class"] == c]
            if not own:
                continue
            images = [source[e["image"]]["image"] for _, e in own]
            activations = [
                np.asarray(infer(variables, inference.prepare(image))[..., j])
                for image, (j, _) in zip(images, own, strict=True)
            ]
            for image, (_, entry) in zip(images, own, strict=True):
                crop, _ = figures.crop_with_context(image, entry["box"])
                figures.save_png(folder / f"{entry['index']:03d}.png", crop)
            safe = figures.file_name(name)
            figures.class_picture(
                folder / f"class_{c:02d}_{safe}.png", name, [e for _, e in own], images, activations
            )

    def summarise(self, phase: Phase, checkpoint: Checkpoint) -> None:
        """Score a finished phase on validation and add it to summary.json."""
        scores = self.score(checkpoint, "validation")
        if phase.kind != "train" and is_main():
            self.write_prototypes(checkpoint)
        self.workdir.wait()  # a phase that is scored must have its checkpoint
        self.workdir.add_summary(
            {
                "phase": phase.name,
                "steps": checkpoint.step if phase.kind == "train" else None,
                "num_prototypes": None if self.black_box else len(checkpoint.prototypes),
                **{k: scores[k] for k in ("miou", "pixel_accuracy", "pixel_error", "overlap")},
                **{k: scores[k] for k in ("f_error", "overlap_pooled") if k in scores},
                "seconds": round(checkpoint.seconds, 2),
            }
        )
        say(f"{phase.name}: validation mIoU {_percent(scores['miou'])}")

    def go(self) -> None:
        """Every phase that is not yet done."""
        if is_main():
            write_json(self.workdir.path / "classes.json", vars(self.data.label_set))
        names = [phase.name for phase in self.phases]
        state = self.workdir.newest(names)
        at = names.index(state.phase) if state else 0
        # A phase beyond the checkpoint was scored only if its own checkpoint has been lost.
        over = names[: at + bool(state and state.finished)]
        summary = self.workdir.summary()
        kept = [entry for entry in summary if entry["phase"] in over]
        if len(kept) < len(summary):
            self.workdir.write_summary(kept)
        scored = [entry["phase"] for entry in kept]
        if scored[-1:] == names[-1:]:  # a ported run has no warm-up
            say(f"this run is finished ({self.workdir.path}); name another --workdir for a new one")
        elif state:
            say(f"going on in phase {state.phase} after step {state.step}")
        if state is None:
            state = self.initial()
            if self.prototype_init == "patches" and not self.black_box:
                state = starts.on_patches(self, state)
        for phase in self.phases[at:]:
            if phase.name in scored:
                continue
            resumed = state.phase == phase.name
            before = names[: names.index(phase.name)]
            self.workdir.truncate_metrics(before, phase.name, state.step if resumed else 0)
            if not (resumed and state.finished):
                first_batch = sum(
                    p.steps for p in self.phases if p.kind == "train" and p.name in before
                )
                with self.interrupts.held():
                    state = self._run_phase(phase, state, first_batch)
                    self.workdir.save(state)
                    if stop := self.asked_to_stop():
                        raise Interrupted(stop)
            self.summarise(phase, state)
        if is_main():
            print(evaluation.stage_table(self.workdir.summary()))

    def _run_phase(self, phase: Phase, state: Checkpoint, first_batch: int) -> Checkpoint:
        if phase.kind == "projection":
            return self.projection_phase(phase, state)
        if phase.kind == "pruning":
            return self.pruning_phase(phase, state)
        return self.train_phase(phase, state, first_batch)


def _moved(box: list[int], corner: tuple[int, int]) -> list[int]:
    """A box within a tile, in the image's pixels."""
    (y, x), (top, left, bottom, right) = corner, box
    return [top + y, left + x, bottom + y, right + x]


def _started(start: Checkpoint, phase: str) -> float:
    """When a phase began by the monotonic clock, had it run without a break."""
    return time.monotonic() - (start.seconds if start.phase == phase else 0.0)


def keep_prototypes(
    start: Checkpoint, keep: np.ndarray
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Arrays and prototypes with only the prototypes at positions `keep`: new shapes."""
    params = dict(start.arrays["params"])
    params["prototypes"] = {"vectors": np.asarray(params["prototypes"]["vectors"])[keep]}
    params["head"] = {"kernel": np.asarray(params["head"]["kernel"])[keep]}
    arrays = {"params": params, "frozen": start.arrays["frozen"]}
    return arrays, [dict(start.prototypes[j]) for j in keep.tolist()]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"


def manifest(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What a run was made with: versions, commit, devices, command, dtype."""
    root = Path(protoseg_jax.__file__).resolve().parents[1]
    commit = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "protoseg_jax": protoseg_jax.__version__,
        "python": sys.version.split()[0],
        "versions": {m.__name__: m.__version__ for m in (jax, flax, optax, orbax.checkpoint, np)},
        "git_commit": commit.stdout.strip() or None,
        "devices": backend_description(),
        "command": sys.argv,
        "compute_dtype": config.compute_dtype,
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def write_ported(config: ml_collections.ConfigDict, source: str, workdir: str) -> None:
    """Write the weights of a trained ProtoSeg as a run whose joint phase is finished.

    Args:
      config: of the run.
      source: the weights file.
      workdir: the run's folder, which must be new.

    Raises:
      UserError: the weights are no ProtoSeg or do not fit the config, or the folder holds
        something.
    """
    ported = port_torch.load(source)
    if ported.prototype_classes is None:
        raise UserError(
            f"{source} is a {ported.origin} ResNet, and only a trained ProtoSeg makes a run's "
            "folder; write an .npz and set --config.pretrained.path to it"
        )
    folder = Workdir(workdir)
    if (folder.path / "config.json").exists():
        raise UserError(f"{workdir} holds a run already; name another folder")
    starts.follow(config, port_torch.ORIGINS[ported.origin])
    start = starts.with_weights(Run(config, folder), ported, source)
    folder.start(config, manifest(config))
    try:
        folder.save(dataclasses.replace(start, phase="joint", step=config.phases.joint.steps))
        folder.wait()
    finally:
        folder.release()


def train(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Run, or go on with, the experiment of a config in a folder.

    Raises:
      UserError: the user must change something.
    """
    folder = Workdir(workdir)
    try:
        starts.settle(config, folder)
        run = Run(config, folder)
        with run.interrupts:
            run.check()
            folder.start(config, manifest(config))
            if run.data.drawn and is_main():
                write_json(folder.path / "split.json", run.data.drawn)
            run.go()
            barrier("the run is over")
    except BaseException as error:
        folder.finish_writing()
        if not isinstance(error, Interrupted):  # when interrupted, all processes stop together
            leave_processes(error)
        raise
    finally:
        folder.release()
