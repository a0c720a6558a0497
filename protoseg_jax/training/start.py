"""Where a run starts: random weights, and on top of them PyTorch's or those of another run.

Prototypes start uniformly at random or, with `model.prototype_init = "patches"`, on
training points.
"""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from protoseg_jax import models
from protoseg_jax.data import prepare
from protoseg_jax.data.source import statistics
from protoseg_jax.errors import UserError
from protoseg_jax.files import read_json
from protoseg_jax.models import readers, weights
from protoseg_jax.models.directions import NO_CLASS
from protoseg_jax.models.prototypes import class_connections, equal_blocks
from protoseg_jax.progress import say
from protoseg_jax.prototypes import search
from protoseg_jax.run import phases as phases_lib
from protoseg_jax.run import prototypes as records
from protoseg_jax.run.checkpoints import Checkpoint
from protoseg_jax.run.experiment import Experiment
from protoseg_jax.run.workdir import Workdir, flat

_FROM_SCRATCH = weights.Origin("3x3", "imagenet")  # of a network that no foreign weights are of
PROTOTYPE_INITS = ("uniform", "patches")


def settle(config: ml_collections.ConfigDict, workdir: Workdir | None = None) -> None:
    """Replace "auto" in `model.stride_in` and `model.preprocessing`, in place.

    They follow the weights: those of `pretrained.path`; without weights the backbone's own first.
    With preprocessing "data" mean and deviation are measured. A run that goes on keeps what it was
    started with.

    Raises:
      UserError: the weights are missing or none.
    """
    model, path, network = config.model, config.pretrained.path, models.network(config.model)
    if workdir and workdir.holds_run:
        follow(config, workdir.config().model)
    if "auto" in (model.stride_in, model.preprocessing):
        if path and _is_run(path):
            follow(config, _other_run(path).config().model)
        elif path:
            origin = weights.load(path, network).origin
            follow(config, network.ORIGINS[origin])
        else:
            follow(config, next(iter(getattr(network, "ORIGINS", {}).values()), _FROM_SCRATCH))
    if model.preprocessing == "data" and not model.mean:
        training = prepare.open_data(config).source(config.data.train_split)
        model.mean, model.std = map(tuple, statistics(training))


def follow(
    config: ml_collections.ConfigDict, settled: weights.Origin | ml_collections.ConfigDict
) -> None:
    """Take over what is settled elsewhere for every key that is still open ("auto")."""
    for key in ("stride_in", "preprocessing", "mean", "std"):
        value = getattr(settled, key, None)
        if value and config.model[key] in ("auto", ()):
            config.model[key] = tuple(value) if isinstance(value, list) else value


def initial(experiment: Experiment) -> Checkpoint:
    """The run before its first phase: random weights, prototypes in [0, 1)^D; on top of them
    the weights of `pretrained.path`.

    Raises:
      UserError: those weights are not this config's network's.
    """
    path = experiment.config.pretrained.path
    if experiment.config.model.head == "directions":
        return taken_apart(experiment, path)
    if path and _is_run(path):
        return with_run(experiment, path)
    if path:
        network = models.network(experiment.config.model)
        return with_weights(experiment, weights.load(path, network), path)
    start = random(experiment, classes_at_start(experiment))
    if start.arrays["frozen"]:
        say(
            "warning: model.norm is 'frozen_batch' without pretrained.path: its BatchNorms are "
            "the identity and stay so; set --config.pretrained.path to ImageNet weights"
        )
    return start


def classes_at_start(experiment: Experiment) -> np.ndarray:
    """c(j) at the start, [M]: equally many of each class, none of one held out."""
    if experiment.config.model.head == "directions":
        return np.full(experiment.config.model.features + 1, NO_CLASS)
    count = experiment.num_classes * experiment.config.model.prototypes_per_class
    classes = equal_blocks(0 if experiment.black_box else count, experiment.num_classes)
    return classes if experiment.held_out is None else classes[classes != experiment.held_out]


def random(experiment: Experiment, classes: np.ndarray) -> Checkpoint:
    """Random weights for prototypes of these classes [M]."""
    prototypes = records.new(classes)
    inference = experiment.inference(prototypes)
    images = jnp.zeros((1, *experiment.config.crop_size, 3), jnp.uint8)
    variables = jax.jit(
        lambda key: inference.model.init(key, inference.preprocessing.normalise(images))
    )(jax.random.key(experiment.config.seed))
    arrays = {
        "params": jax.device_get(variables["params"]),
        "frozen": jax.device_get(dict(variables).get("frozen", {})),
    }
    if prototypes:  # the model itself only knows equally many a class
        kernel = class_connections(classes, experiment.num_classes)
        arrays["params"]["head"] = {"kernel": np.asarray(kernel)}
    return Checkpoint("", 0, True, arrays, prototypes)


def with_weights(experiment: Experiment, ported: weights.Ported, path: str) -> Checkpoint:
    """Random weights, with ported ones in their place.

    Raises:
      UserError: the weights are not this config's network's.
    """
    model = experiment.config.model
    trained = dataclasses.asdict(models.network(model).ORIGINS[ported.origin])
    _warn_of_others(model, trained, f"weights {path} ({ported.origin}) were")
    classes = ported.prototype_classes
    if classes is not None and experiment.black_box:
        raise UserError(f"weights {path} are a ProtoSeg; model.head='linear' has no prototypes")
    if classes is not None and model.prototype_init != "uniform":
        raise UserError(
            f"weights {path} are a ProtoSeg, whose prototypes would be lost; set "
            "--config.model.prototype_init=uniform"
        )
    start = random(experiment, classes_at_start(experiment) if classes is None else classes)
    for collection in ("params", "frozen"):
        ours, theirs = start.arrays[collection], getattr(ported, collection)
        needed = models.groups(model)[:1] if classes is None else ours
        for group in {**dict.fromkeys(g for g in needed if g != "anchors"), **theirs}:
            tree = theirs.get(group, {})
            if group == models.groups(model)[0]:
                tree = {name: x for name, x in tree.items() if models.uses(model, name)}
            if _shapes(ours.get(group, {})) != _shapes(tree):
                raise UserError(
                    f"the {group} of weights {path} ({ported.origin}, depth {ported.depth}) "
                    f"does not fit model.depth={model.depth}, model.width={model.width}, "
                    f"model.norm={model.norm!r}, model.features={model.features} and "
                    f"{experiment.num_classes} classes; use the config of that network"
                )
            if tree:
                ours[group] = tree
    return start


def with_run(experiment: Experiment, path: str) -> Checkpoint:
    """Random weights, with another run's network in their place: a black box becomes a ProtoSeg.

    Taken are backbone and decoder after that run's last finished phase. Tensors of the decoder that
    differ in their last axis alone, the channels of the result (C in a black box, D in a ProtoSeg),
    stay random, as do prototypes and last layer.

    Raises:
      UserError: the folder is no run, has not finished a phase or holds another network; or it was
        trained on images that validate here.
    """
    other = _other_run(path)
    config, model = other.config(), experiment.config.model
    _refuse_leak(experiment, other, config)
    phase = _last(other, config)
    trained = {key: config.model[key] for key in ("stride_in", "preprocessing")}
    _warn_of_others(model, trained, f"run {path} was")
    start = random(experiment, classes_at_start(experiment))
    theirs = other.checkpoints.restore(phase).arrays
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
    behind = ("prototypes", "anchors", "head")
    new += [group for group in behind if group in start.arrays["params"]]
    say(f"starting from {path} after its phase {phase}; new: {', '.join(new) or 'nothing'}")
    return start


def taken_apart(experiment: Experiment, path: str | None) -> Checkpoint:
    """A trained linear network as it is, its last layer written as a sum over the features.

    Raises:
      UserError: the folder holds no such run; or one of another network, or that was trained on
        images that validate here.
    """
    if not path or not _is_run(path):
        raise UserError(
            "model.head='directions' explains a trained network; set --config.pretrained.path to "
            f"the folder of a run with model.head='linear', not {path!r}"
        )
    other = _other_run(path)
    config = other.config()
    if config.model.head != "linear":
        raise UserError(
            f"run {path} has model.head={config.model.head!r}, which explains itself; "
            "model.head='directions' is for a run with model.head='linear'"
        )
    if not models.twin_has_head(config.model):
        raise UserError(
            f"run {path} is of model.backbone={config.model.backbone!r}, whose decoder says the "
            "classes' logits itself: no last layer sums over features there; name a black box of "
            "model.backbone='efficientnet'"
        )
    _refuse_leak(experiment, other, config)
    here, there = (flat(json.loads(c.to_json())) for c in (experiment.config, config))
    changed = [key for key, x in there.items() if _decides(key) and x != here.get(key)]
    if changed:
        raise UserError(
            f"run {path} has another {', '.join(changed)}, with which its network says something "
            "else; use its config, with --config.model.head=directions"
        )
    theirs = other.checkpoints.restore(_last(other, config)).arrays
    start = random(experiment, classes_at_start(experiment))
    head = theirs["params"]["head"]
    count = experiment.config.model.features
    own = {
        "prototypes": {"vectors": np.eye(count + 1, count, dtype=np.float32)},
        "head": {"kernel": np.concatenate([head["kernel"], head["bias"][None]])},
    }
    arrays = {"params": {**theirs["params"], **own}, "frozen": theirs["frozen"]}
    if any(_shapes(arrays[name]) != _shapes(start.arrays[name]) for name in arrays):
        raise UserError(
            f"the network of run {path} does not fit this config's; use its config, with "
            "--config.model.head=directions"
        )
    say(f"explaining {path} after its phase {_last(other, config)}; its network stays as it is")
    return dataclasses.replace(start, arrays=arrays)


def _decides(key: str) -> bool:
    """Whether a key of a config decides what a trained black box says of an image."""
    section, _, name = key.rpartition(".")
    ours = ("head", "directions", "prototypes_per_class", "prototype_init", "activation")
    ours += ("similarity", "anchors", "remat")
    if section == "model":
        return name not in ours
    return key in ("compute_dtype", "eval_size", "eval_overlap")


def on_patches(experiment: Experiment, start: Checkpoint) -> Checkpoint:
    """`model.prototype_init = "patches"`: prototypes start on random training points.

    Each takes the features that the network has for one point of its class, no two of a class
    from one image; those for which there are not enough images keep their random vector. From
    scratch the network is still random then, but uniform vectors are far from all that it says
    (‖z − p‖² is about 8 for D = 64), where eq. 1 is nearly flat, and at a low rate they are reached
    late.
    """
    classes, config = records.classes_of(start.prototypes), experiment.config
    table = search.empty(
        experiment.num_classes, int(np.bincount(classes).max()), config.model.features
    )
    rule = search.at_random(experiment.num_classes, config.seed)
    inference = experiment.inference(start.prototypes)
    table = search.search(experiment, inference, start.variables, rule, table, "prototypes")
    place = np.array([(classes[:j] == c).sum() for j, c in enumerate(classes)])
    found = np.isfinite(table.squared_distance[classes, place])[:, None]
    vectors = start.arrays["params"]["prototypes"]["vectors"]
    vectors = np.where(found, table.feature[classes, place], vectors)
    params = {**start.arrays["params"], "prototypes": {"vectors": vectors}}
    return dataclasses.replace(start, arrays={**start.arrays, "params": params})


def _last(other: Workdir, config: ml_collections.ConfigDict) -> str:
    """A run's last finished phase."""
    names = [phase.name for phase in phases_lib.from_config(config)]
    return other.checkpoints.finished(names)[-1]


def _is_run(path: str) -> bool:
    """Whether a path is of another run, and not of weights, which may be a folder, too."""
    return Path(path).is_dir() and not readers.is_weights(path)


def _other_run(path: str) -> Workdir:
    if not Workdir(path).holds_run:
        raise UserError(
            f"pretrained.path={path!r} is a folder that holds no run (no config.json); name one "
            "that train.py wrote, or a weights file"
        )
    return Workdir(path)


def _refuse_leak(experiment: Experiment, other: Workdir, config: ml_collections.ConfigDict) -> None:
    """What is to be unseen by this run must not have been seen by that one: a class that is held
    out; images that validate, where splits are drawn at random."""
    data, here = experiment.data, experiment.config.data
    if here.held_out and here.held_out != config.data.held_out:
        raise UserError(
            f"run {other.path} was not trained with data.held_out={here.held_out}, so its network "
            "may know that class; name one that was"
        )
    split = read_json(other.path / "split.json")
    if not (data.drawn and split and config.data.name == here.name):
        return
    both = set(split["train"]) & set(data.drawn["validation"])
    if not both:
        return
    where = [Path(d.dir).expanduser().resolve() for d in (config.data, here)]
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
    network = models.network(config.model)
    ported = weights.load(source, network)
    if ported.prototype_classes is None:
        raise UserError(
            f"{source} holds {ported.origin} weights, and only a trained ProtoSeg makes a run's "
            "folder; write an .npz and set --config.pretrained.path to it"
        )
    folder = Workdir(workdir)
    if folder.holds_run:
        raise UserError(f"{workdir} holds a run already; name another folder")
    follow(config, network.ORIGINS[ported.origin])
    start = with_weights(Experiment(config), ported, source)
    folder.start(config)
    try:
        steps = config.phases.joint.steps
        folder.checkpoints.save(dataclasses.replace(start, phase="joint", step=steps))
        folder.checkpoints.wait()
    finally:
        folder.release()
