"""One optimiser phase: steps, metrics, checkpoints and scores on the way, from wherever it is."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tensorboardX

from protoseg_jax import losses, models
from protoseg_jax.devices import is_main, stack_metrics
from protoseg_jax.errors import UserError
from protoseg_jax.evaluation.report import percent
from protoseg_jax.program import Interrupted
from protoseg_jax.progress import Progress, say
from protoseg_jax.run.checkpoints import Checkpoint
from protoseg_jax.run.experiment import Experiment
from protoseg_jax.run.live import Clock, Live
from protoseg_jax.run.phases import Phase
from protoseg_jax.training import optimizer as optimizers
from protoseg_jax.training import step as steps


def run(
    live: Live,
    phase: Phase,
    start: Checkpoint,
    first_batch: int,
    validate: Callable[[Checkpoint], float | None],
) -> Checkpoint:
    """The phase from `start` (the end of the phase before, or a place inside this one).

    Args:
      live: the run.
      phase: the phase.
      start: where to go on.
      first_batch: the data position of the phase's step 0.
      validate: validation mIoU of a place inside the phase.

    Raises:
      UserError: the loss is not finite.
      Interrupted: asked to stop, and saved.
    """
    experiment, config, pool = live.experiment, live.experiment.config, live.experiment.pool
    clock, rules = Clock(start, phase.name), models.decay(config.model)
    params, frozen_variables = start.arrays["params"], start.arrays["frozen"]
    state, begun = steps.init_state(params, phase, rules), 0
    if clock.resumed:
        moments = [start.arrays["optimizer"][str(n)] for n in range(len(start.arrays["optimizer"]))]
        moments = jax.tree.structure(state.moments).unflatten(moments)
        state, begun = state.replace(step=np.int32(start.step), moments=moments), start.step
    _, frozen = steps.split(params, phase)
    constants = {"frozen": frozen_variables} if frozen_variables else {}
    state, frozen, constants = map(pool.replicate, (state, frozen, constants))
    step = pool.map(_make_step(experiment, phase, start, rules), donate_argnums=(0,))
    board = tensorboardX.SummaryWriter(
        str(live.workdir.path / "tensorboard"),
        purge_step=first_batch + begun + 1,
        write_to_disk=is_main(),
    )

    def checkpoint(number: int) -> Checkpoint:
        local = pool.first(state)
        arrays = {"params": {**params, **local.trainable}, "frozen": frozen_variables}
        finished = number == phase.steps
        if not finished:  # the next phase starts with fresh moments
            leaves = jax.tree.leaves(local.moments)
            arrays["optimizer"] = {str(n): x for n, x in enumerate(leaves)}
        return clock.checkpoint(number, arrays, finished=finished)

    pending: list[dict[str, jax.Array]] = []
    batches = pool.prefetch(live.batches(first_batch + begun))
    window = time.monotonic()
    with Progress(phase.name, phase.steps, begun) as progress:
        for number in range(begun + 1, phase.steps + 1):
            state, metrics = step(state, frozen, constants, next(batches))
            pending.append(metrics)
            last = number == phase.steps
            saves = config.checkpoint_every and number % config.checkpoint_every == 0
            scores = config.eval_every and number % config.eval_every == 0 and not last
            logs = last or number % config.log_every == 0
            # With several processes all must stop at the same step: they agree where they log.
            stop = live.asked_to_stop() if not last and (logs or pool.processes == 1) else 0
            if not (logs or saves or scores or stop):
                continue
            means = stack_metrics(pending)
            rate = len(pending) * config.batch_size / (time.monotonic() - window)
            _log(live, board, phase, number, first_batch, means, rate)
            progress.update(len(pending), means["loss"], rate)
            pending = []
            if not math.isfinite(means["loss"]):
                raise UserError(
                    f"the loss is {means['loss']} at step {number} of phase {phase.name}; "
                    f"lower its phases.{phase.name}.learning_rates, or look at the data; "
                    f"the last good checkpoint is kept in {live.workdir.checkpoints.path}"
                )
            if not last and (stop or saves or scores):
                now = checkpoint(number)
            if not last and (stop or saves):
                live.workdir.checkpoints.save(now)
            if stop:
                raise Interrupted(stop)
            if scores:
                miou = validate(now)
                say(f"{phase.name} step {number}: validation mIoU {percent(miou, '{:.2f} %')}")
                board.add_scalar("validation/miou", miou, first_batch + number)
            window = time.monotonic()
    board.close()
    return checkpoint(phase.steps)


def _make_step(experiment: Experiment, phase: Phase, start: Checkpoint, rules: Any) -> Callable:
    config, inference = experiment.config, experiment.inference(start.prototypes)
    terms = losses.terms(
        config.loss, inference.classes, inference.num_classes, experiment.class_weights()
    )
    return steps.make_step(
        inference,
        phase,
        terms,
        rules,
        accumulate=config.accumulate,
        feature_sizes=inference.feature_sizes(tuple(config.crop_size)),
    )


def _log(live, board, phase, number, first_batch, means, rate) -> None:
    """One line of metrics.jsonl and the same on TensorBoard."""
    fastest = max(phase.learning_rates.values())
    means = {
        **means,
        "learning_rate": float(optimizers.schedule(phase, fastest)(number - 1)),
        "images_per_second": rate,
    }
    line = {"phase": phase.name, "step": number, "time": time.time(), **means}
    live.workdir.append_metrics(line)
    for key, value in means.items():
        board.add_scalar(f"train/{key}", value, first_batch + number)
