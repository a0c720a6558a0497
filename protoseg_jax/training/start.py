"""Where a run starts: random weights, and on top of them PyTorch's or those of another run.

Prototypes start uniformly at random (METHOD) or, with `model.prototype_init = "patches"`, on
training points.
"""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flax
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from protoseg_jax import models
from protoseg_jax.data import builders, preprocessing
from protoseg_jax.errors import UserError
from protoseg_jax.models import port_torch
from protoseg_jax.models.prototypes import class_connections, equal_blocks
from protoseg_jax.progress import Progress, say
from protoseg_jax.prototypes import patch_search
from protoseg_jax.training import phases as phases_lib
from protoseg_jax.workdir import Checkpoint, Workdir

if TYPE_CHECKING:
    from protoseg_jax.training.run import Run

PROTOTYPE_INITS = ("uniform", "patches")


def settle(config: ml_collections.ConfigDict, workdir: Workdir | None = None) -> None:
    """Replace "auto" in `model.stride_in` and `model.preprocessing`, in place.

    They follow the weights (METHOD): those of `pretrained.path`; without weights torchvision's.
    With preprocessing "data" mean and deviation are measured. A run that goes on keeps what it was
    started with.

    Raises:
      UserError: the weights are missing or none.
    """
    model = config.model
    if workdir and (workdir.path / "config.json").is_file():
        follow(config, workdir.config().model)
    path = config.pretrained.path
    if "auto" in (model.get("stride_in"), model.preprocessing):
        if path and Path(path).is_dir():
            follow(config, _other_run(path).config().model)
        else:
            origin = port_torch.load(path).origin if path else "torchvision"
            follow(config, port_torch.ORIGINS[origin])
    if model.preprocessing == "data" and not model.mean:
        training = builders.from_config(config).source(config.data.train_split)
        preprocessing.measure(model, training)


def follow(
    config: ml_collections.ConfigDict, settled: port_torch.Origin | ml_collections.ConfigDict
) -> None:
    """Take over what is settled elsewhere for every key that is still open ("auto")."""
    for key in ("stride_in", "preprocessing", "mean", "std"):
        value = getattr(settled, key, None)
        if value and config.model.get(key, ()) in ("auto", ()):
            with config.model.unlocked():  # mean and std need not be among its keys
                config.model[key] = tuple(value) if isinstance(value, list) else value


def initial(run: "Run") -> Checkpoint:
    """The run before its first phase: random weights, prototypes in [0, 1)^D; on top of them
    the weights of `pretrained.path`.

    Raises:
      UserError: those weights are not this config's network's.
    """
    path = run.config.pretrained.path
    if path and Path(path).is_dir():
        return with_run(run, path)
    if path:
        return with_weights(run, port_torch.load(path), path)
    if run.config.model.get("norm") == "frozen_batch":
        say(
            "warning: model.norm is 'frozen_batch' without pretrained.path: its BatchNorms are "
            "the identity and stay so; set --config.pretrained.path to ImageNet weights"
        )
    return random(run, classes_at_start(run))


def classes_at_start(run: "Run") -> np.ndarray:
    """c(j) at the start, [M]: equally many of each class, none of one held out."""
    count = 0 if run.black_box else run.num_classes * run.config.model.prototypes_per_class
    classes = equal_blocks(count, run.num_classes)
    return classes if run.held_out is None else classes[classes != run.held_out]


def random(run: "Run", prototype_classes: np.ndarray) -> Checkpoint:
    """Random weights for prototypes of these classes [M]."""
    prototypes = [{"index": j, "class": int(c)} for j, c in enumerate(prototype_classes)]
    inference = run.inference(prototypes)
    images = jnp.zeros((1, *run.config.crop_size, 3), jnp.uint8)
    variables = jax.jit(
        lambda key: inference.model.init(key, inference.preprocessing.normalise(images))
    )(jax.random.key(run.config.seed))
    arrays = {
        "params": jax.device_get(variables["params"]),
        "frozen": jax.device_get(dict(variables).get("frozen", {})),
    }
    if prototypes:  # the model itself only knows equally many a class
        kernel = class_connections(prototype_classes, run.num_classes)
        arrays["params"]["head"] = {"kernel": np.asarray(kernel)}
    return Checkpoint("", 0, True, arrays, prototypes)


def with_weights(run: "Run", ported: port_torch.Ported, path: str) -> Checkpoint:
    """Random weights, with ported ones in their place.

    Raises:
      UserError: the weights are not this config's network's.
    """
    model = run.config.model
    if model.backbone != "resnet":
        raise UserError(
            f"weights {path} are a {ported.origin} ResNet-{ported.depth}, but model.backbone "
            f"is {model.backbone!r}; leave pretrained.path out"
        )
    trained = dataclasses.asdict(port_torch.ORIGINS[ported.origin])
    _warn_of_others(model, trained, f"weights {path} ({ported.origin}) were")
    if ported.prototype_classes is not None and run.black_box:
        raise UserError(f"weights {path} are a ProtoSeg; model.head='linear' has no prototypes")
    if ported.prototype_classes is not None and run.prototype_init != "uniform":
        raise UserError(
            f"weights {path} are a ProtoSeg, whose prototypes would be lost; set "
            "--config.model.prototype_init=uniform"
        )
    classes = ported.prototype_classes
    start = random(run, classes_at_start(run) if classes is None else classes)
    for collection in ("params", "frozen"):
        ours, theirs = start.arrays[collection], getattr(ported, collection)
        for group, tree in theirs.items():
            if _shapes(ours.get(group, {})) != _shapes(tree):
                raise UserError(
                    f"the {group} of weights {path} ({ported.origin} ResNet-{ported.depth}) "
                    f"does not fit model.depth={model.depth}, model.width={model.width}, "
                    f"model.norm={model.norm!r}, model.features={model.features} and "
                    f"{run.num_classes} classes; use the config of that network"
                )
            ours[group] = tree
    return start


def with_run(run: "Run", path: str) -> Checkpoint:
    """Random weights, with another run's network in their place: a black box becomes a ProtoSeg.

    Taken are backbone and decoder after that run's last finished phase. Tensors of the decoder that
    differ in their last axis alone, the channels of the result (C in a black box, D in a ProtoSeg),
    stay random, as do prototypes and last layer.

    Raises:
      UserError: the folder is no run, has not finished a phase or holds another network; or it was
        trained on images that validate here.
    """
    other = _other_run(path)
    config, model = other.config(), run.config.model
    _refuse_leak(run, other, config)
    phase = other.finished([p.name for p in phases_lib.from_config(config)])[-1]
    keys = [k for k in ("stride_in", "preprocessing") if k in config.model and k in model]
    trained = {k: config.model[k] for k in keys}
    _warn_of_others(model, trained, f"run {path} was")
    start, theirs = random(run, classes_at_start(run)), other.restore(phase).arrays
    backbone, decoder = models.groups(model)
    new = []
    for collection, group in itertools.product(("params", "frozen"), (backbone, decoder)):
        ours = _flat(start.arrays[collection].get(group, {}))
        given = _flat(theirs[collection].get(group, {}))
        for key in sorted(ours.keys() | given.keys()):
            here, there = np.shape(ours.get(key)), np.shape(given.get(key))
            if here == there:
                continue
            name = f"{group}/{'/'.join(key)}"
            if not (group == decoder and here and there and here[:-1] == there[:-1]):
                raise UserError(
                    f"{name} of run {path} does not fit this config's network; "
                    "name a run whose model is the same but for its head"
                )
            given[key] = ours[key]
            new.append(name)
        if given:
            start.arrays[collection][group] = flax.traverse_util.unflatten_dict(given)
    new += [] if run.black_box else ["prototypes", "head"]
    say(f"starting from {path} after its phase {phase}; new: {', '.join(new) or 'nothing'}")
    return start


def on_patches(run: "Run", start: Checkpoint) -> Checkpoint:
    """`model.prototype_init = "patches"`: prototypes start on random training points.

    Each takes the features that the network has for one point of its class, no two of a class
    from one image; those for which there are not enough images keep their random vector. From
    scratch the network is still random then, but uniform vectors are far from all that it says
    (‖z − p‖² is about 8 for D = 64), where eq. 1 is nearly flat, and at a low rate they are reached
    late.
    """
    classes = run.classes_of(start.prototypes)
    k, split = int(np.bincount(classes).max()), run.config.data.projection_split
    table = patch_search.empty(run.num_classes, k, run.config.model.features)
    total, stride = len(run.examples(split)), run.eval_batch_size * run.pool.processes
    with Progress("prototypes", total, 0, unit="image") as progress:
        table = patch_search.search(
            run.pool,
            patch_search.make_sample_step(
                run.inference(start.prototypes), run.num_classes, k=k, seed=run.config.seed
            ),
            start.variables,
            run.eval_batches(split),
            table,
            lambda _: progress.update(min(stride, total - progress.done)),
        )
    place = np.array([(classes[:j] == c).sum() for j, c in enumerate(classes)])
    found = np.isfinite(table.squared_distance[classes, place])[:, None]
    vectors = start.arrays["params"]["prototypes"]["vectors"]
    vectors = np.where(found, table.feature[classes, place], vectors)
    params = {**start.arrays["params"], "prototypes": {"vectors": vectors}}
    return dataclasses.replace(start, arrays={**start.arrays, "params": params})


def _other_run(path: str) -> Workdir:
    if not (Path(path) / "config.json").is_file():
        raise UserError(
            f"pretrained.path={path!r} is a folder that holds no run (no config.json); name one "
            "that train.py wrote, or a weights file"
        )
    return Workdir(path)


def _refuse_leak(run: "Run", other: Workdir, config: ml_collections.ConfigDict) -> None:
    """What is to be unseen by this run must not have been seen by that one: a class that is held
    out; images that validate, where splits are drawn at random."""
    held_out = run.config.data.get("held_out")
    if held_out and held_out != config.data.get("held_out"):
        raise UserError(
            f"run {other.path} was not trained with data.held_out={held_out}, so its network may "
            "know that class; name one that was"
        )
    split = other.path / "split.json"
    if not (run.data.drawn and split.is_file() and config.data.name == run.config.data.name):
        return
    both = set(json.loads(split.read_text())["train"]) & set(run.data.drawn["validation"])
    if not both:
        return
    where = [Path(c.data.dir).expanduser().resolve() for c in (config, run.config)]
    what = f"{len(both)} of the images that run {other.path} was trained on validate here"
    if where[0] == where[1]:
        raise UserError(f"{what}; use its seed ({config.seed})")
    say(f"warning: {what}, by their names; if they are the same images, scores are too good")


def _warn_of_others(model: ml_collections.ConfigDict, trained: dict[str, Any], whose: str) -> None:
    for key, wanted in trained.items():
        if model[key] != wanted:  # allowed: the released code does so with torchvision's
            say(f"warning: model.{key} is {model[key]!r}, but {whose} trained with {wanted!r}")


def _flat(tree: dict[str, Any]) -> dict[tuple[str, ...], Any]:
    return flax.traverse_util.flatten_dict(tree)


def _shapes(tree: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {"/".join(k): x.shape for k, x in _flat(tree).items()}
