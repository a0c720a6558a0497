"""Every key that a config has, once: its meaning and its default.

The defaults are section 4's recipe for DeepLabv2 with ResNet-101. An experiment in `configs/` is
what it changes of them. Values that may be absent are placeholders, so that they can be set on the
command line; groups of phases (`learning_rates`) are data, to which a config adds freely.
"""

import importlib.util
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, config_dict

from protoseg_jax.errors import UserError, one_line

_PACKAGE = Path(__file__).resolve().parent
# Where the ready configs lie, installed or in a checkout.
_READY = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def default() -> ConfigDict:
    """A config with every key."""

    def text() -> config_dict.FieldReference:
        return config_dict.placeholder(str)

    c = ConfigDict()
    c.seed = 0  # of weights, order, augmentation, and splits that are drawn
    c.batch_size = 10  # global: over all devices and micro-batches
    c.accumulate = 1  # micro-batches that a device's part of the batch is split into
    c.compute_dtype = "float32"  # or "bfloat16"; parameters and distances are float32
    c.crop_size = (321, 321)  # (height, width) of a training crop
    c.eval_size = (513, 513)  # that every image is brought to, its aspect ignored
    c.eval_overlap = config_dict.placeholder(int)  # or tiles that overlap so much
    c.eval_batch_size = 8  # rounded up to the devices

    c.data = ConfigDict()
    c.data.name = text()  # a file of data/sets, or a dotted path
    c.data.dir = text()  # the folder with its files
    c.data.cache = "data_cache"  # the folder of prepared data sets
    c.data.workers = 0  # worker processes that read images; 0: threads
    c.data.train_split = "train"
    c.data.projection_split = "train"  # where prototypes' patches come from
    c.data.split = text()  # "authors": the one of the paper's authors ("isbi_em"); None: drawn
    c.data.held_out = text()  # a class to be void, for the novelty test
    # Of the data set "folder", whose classes.txt may say what else masks mean:
    c.data.images = "images"  # folder of the images, below data.dir
    c.data.masks = "masks"  # and of the masks
    c.data.mask_suffix = ""  # that a mask's name has behind its image's: "_mask"
    c.data.void = 255  # mask value without a class
    # Of every data set with files, and of pictures given to be explained:
    c.data.exif = text()  # "apply": masks fit images as shown; "ignore": as stored; None: undecided
    c.data.white = config_dict.placeholder(int)  # the value that is white in 16-bit images

    c.augment = ConfigDict()
    c.augment.scale = (0.5, 1.5)  # smallest and largest
    c.augment.scale_of = "image"  # scale 1 is its own size; "evaluation": as evaluation sees it
    c.augment.turns = False  # by quarters, for images without an up and a down
    c.augment.elastic = 0.0  # deviation of the displacements, in pixels of the crop; 0: none
    c.augment.views = 0  # crops of each image that a frozen backbone sees, once; 0: always new ones

    c.model = ConfigDict()
    c.model.backbone = "resnet"  # "unet" or "efficientnet": a file of models, or a dotted path
    c.model.depth = 101  # layers of the ResNet; halvings of the U-Net; n of EfficientNet-Lite n
    c.model.width = 64  # channels of the first stage; EfficientNet: of the decoder's sum
    c.model.norm = "frozen_batch"  # ResNet: or "group", to train from scratch
    c.model.stride_in = "auto"  # ResNet: "3x3" or "1x1", which convolution strides; as the weights
    c.model.output_stride = 8  # pixels a point of the map; EfficientNet: of the coarsest, at most
    c.model.stages = (3, 5, 7)  # EfficientNet: rows of its table whose maps the decoder gets
    # Number of the backbone's map (0, …; −1: its last) by which the assignment loss divides points.
    c.model.anchors = config_dict.placeholder(int)
    c.model.aspp_rates = (6, 12, 18, 24)  # ResNet: dilation of each branch
    # "linear": the black-box twin, trained at the same budget; "directions": such a twin, whose
    # folder is pretrained.path, explained post hoc.
    c.model.head = "prototypes"
    c.model.directions = "trained"  # of head "directions"; "identity" or "random" to compare
    c.model.features = 64  # D
    c.model.prototypes_per_class = 10
    c.model.prototype_init = "uniform"  # or "patches", random training points
    c.model.activation = "sigmoid"  # before the prototypes; "none" to compare
    c.model.similarity = "log"  # eq. 1; "negative_distance" to compare
    c.model.preprocessing = "auto"  # as the weights; of models/preprocessing; "data": measured
    c.model.mean = ()  # of preprocessing "data", RGB in 0-255, measured when a run starts
    c.model.std = ()
    c.model.msc = ()  # scales of smaller copies of the image: (0.5, 0.75) on Pascal
    c.model.remat = False  # True: less memory, about a third more work

    c.pretrained = ConfigDict()
    c.pretrained.path = text()  # weights of PyTorch, or another run's folder
    # Joint steps of a black box that is trained before all else, in DIR/blackbox, to start from.
    c.pretrained.blackbox = 0

    c.loss = ConfigDict()
    # Files of losses, or dotted paths. One of the points whose λ is 0 is not computed.
    c.loss.terms = ("cross_entropy", "diversity", "l1", "assignment")
    c.loss.diversity = 0.25  # λ_J of eq. 7
    c.loss.assignment = 0.0  # λ_A of the assignment loss, which the paper has not
    c.loss.assignment_even = 1.0  # η in (0, 1]: how equal prototypes' shares of their class are
    c.loss.assignment_tau = 0.1  # τ: of the distances that are trained
    c.loss.assignment_epsilon = 0.05  # ε: of the assignment
    c.loss.assignment_anchors = 0.05  # ε_t: of that by anchors, with model.anchors
    c.loss.diversity_reduction = "present"  # mean over what is present; "all_classes": eq. 6's 1/C
    c.loss.l1 = 1e-4  # λ_L1 of eq. 8
    c.loss.class_balance = 0.0  # cross-entropy's weights (median / pixels)^so much

    # Rates at the start by parameter group (without one, or with 0, it is frozen); "poly" decays.
    new = {"aspp": 2.5e-4, "prototypes": 2.5e-4}
    finetune = {"steps": 2_000, "learning_rates": {"head": 1e-5}, "schedule": "constant"}
    c.phases = ConfigDict()
    turn = {"steps": 1000, "learning_rates": {"prototypes": 1e-2}}
    c.phases.directions = {**turn, "schedule": "poly"}  # of head "directions", its only phase
    # The paper's number; of the released code's 3,000 some 2,000 count.
    c.phases.warmup = {"steps": 30_000, "learning_rates": new, "schedule": "constant"}
    c.phases.joint = {
        "steps": 30_000,
        "learning_rates": {"backbone": 2.5e-5, **new},
        "schedule": "poly",
    }
    c.phases.projection = {"steps": 1}  # 0 leaves a phase out
    c.phases.finetune = finetune
    c.phases.pruning = {"steps": 1}
    c.phases.finetune_pruned = finetune

    # What eval.py --interpretability measures: files of evaluation, or dotted paths.
    c.measures = ("utilisation", "reach", "sparsity", "faithfulness", "bypass")
    c.measures += ("part_agreement", "consistency", "stability", "novelty")
    c.log_every = 50  # steps
    c.eval_every = 5_000  # validation inside a phase; 0: never
    c.checkpoint_every = 1_000  # 0: at the end of a phase alone
    return c


def find(value: str) -> str:
    """`PATH[:ROW]` of what names a config: that, or `NAME[:ROW]` of a ready one.

    Raises:
      UserError: there is no such file.
    """
    path, colon, row = value.partition(":")
    ready = [path, *(folder / f"{path}.py" for folder in _READY if path.isidentifier())]
    found = next((p for p in map(Path, ready) if p.is_file()), None)
    if found is None:
        names = {p.stem for folder in _READY for p in folder.glob("*.py")} - {"common"}
        raise UserError(
            f"config file {path!r} does not exist; configs/ holds the ready ones: "
            f"{', '.join(sorted(names))}"
        )
    return f"{found}{colon}{row}"


def load(value: str) -> ConfigDict:
    """A config by its file or name, as `--config=VALUE` does, for programs and notebooks.

    Raises:
      UserError: there is no such file.
      ValueError: it has no such row.
    """
    path, _, row = find(value).partition(":")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*[row] if row else [])


def require_row(row: str, rows: tuple[str, ...]) -> None:
    """Refuse a `--config=FILE:ROW` that the file does not have."""
    if row not in rows:
        raise ValueError(f"there is no row {row!r}, but {', '.join(rows)}")


# Where a key that a stored config lacks must not take its default.
_BEFORE = {"model": {"stride_in": "3x3"}}
_TERMS_BEFORE = ("cross_entropy", "diversity", "l1")


def complete(stored: dict[str, Any]) -> ConfigDict:
    """A stored config with every key; one that it lacks takes the value that keeps its behaviour.

    That is the default, but for `_BEFORE` and for phases: one that it lacks has no steps, but that
    of directions, which no other run goes through.

    Raises:
      UserError: a value is of another type than its key's.
    """
    config, phases = default(), stored.get("phases", {})
    if "parts" in stored.get("measures", ()):  # a default that is gone; measures make no run
        stored = {k: v for k, v in stored.items() if k != "measures"}
    stored = {key: dict(x) if isinstance(x, dict) else x for key, x in stored.items()}
    loss, model = stored.get("loss", {}), stored.get("model", {})
    if "assignment" not in loss and tuple(loss.get("terms", ())) == _TERMS_BEFORE:
        loss["terms"] = (*_TERMS_BEFORE, "assignment")
    if not stored.get("data", {}).get("mask_values"):  # which are in classes.txt now
        stored.get("data", {}).pop("mask_values", None)
    if model.get("backbone") == "efficientnet" and "views" not in stored.get("augment", {}):
        model["width"] = model.get("features", config.model.features)  # its decoder had no width
    absent = {name: {"steps": 0} for name in config.phases if name not in phases}
    absent["directions"] = config.phases.directions.to_dict()
    try:
        for part in (_BEFORE, {k: v for k, v in stored.items() if k != "phases"}):
            config.update(ConfigDict(part))
        config.phases = ConfigDict({**absent, **phases})
        for phase in config.phases.values():
            phase.steps = int(phase.steps)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the config holds a value of another type: {one_line(error)}") from error
    return config


def unknown_keys(config: ConfigDict) -> list[str]:
    """Keys that `default` lacks: those of an extension, or misspelt ones."""
    known, sections = default(), {"": config, **{k: v for k, v in config.items() if k != "phases"}}
    return [
        f"{name}.{key}".lstrip(".")
        for name, section in sections.items()
        if isinstance(section, ConfigDict)
        for key in section
        if key not in (known[name] if name else known)
    ]
