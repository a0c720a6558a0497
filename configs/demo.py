"""A ProtoSeg in minutes on a laptop: the embedded `parts` data set.

python train.py --config=configs/demo.py[:ROW]

The default has a frozen EfficientNet-Lite0 with ImageNet weights, which sees images at twice their
size, and in place of the diversity loss the assignment loss, by which prototypes come to stand for
parts. `:scratch` trains a small ResNet from nothing with that loss, `:paper` by the paper's recipe;
`:lite0_paper` is the default's network with the paper's losses.
"""

from protoseg_jax.config import ConfigDict, default, require_row

ROWS = ("lite0", "lite0_paper", "scratch", "paper")


def get_config(row: str = "lite0") -> ConfigDict:
    require_row(row, ROWS)
    c = default()
    c.batch_size = 8
    c.eval_batch_size = 16
    c.data.name = "parts"
    c.model.update({"features": 32, "prototypes_per_class": 8})
    (_lite0 if row.startswith("lite0") else _scratch)(c)
    if row == "lite0":  # by the map at stride 16
        _parts(c, anchors=1, steps=120)
    if row == "scratch":  # by the only map, ResNet's last, which learns the classes before
        c.pretrained.blackbox, c.phases.joint.steps = 1600, 1500
        c.model.prototype_init = "patches"
        _parts(c, anchors=0, steps=60)
    c.log_every = 10
    c.eval_every = c.checkpoint_every = 500
    return c


def _lite0(c: ConfigDict) -> None:
    c.crop_size = c.eval_size = (256, 256)  # twice 128 × 128; scores are at the labels' own size
    c.augment.update({"scale": (1.6, 2.4), "views": 6})
    c.model.update({"backbone": "efficientnet", "depth": 0, "output_stride": 32})
    c.model.prototype_init = "patches"
    c.pretrained.path = "efficientnet-lite0"
    new = {"decoder": 2e-3, "prototypes": 1e-2}
    c.phases.warmup = {"steps": 0, "learning_rates": new, "schedule": "constant"}
    rates = {"backbone": 0.0, **new}  # frozen; more needs augment.views=0
    c.phases.joint = {"steps": 1000, "learning_rates": rates, "schedule": "poly"}
    c.phases.finetune.update({"steps": 60, "learning_rates": {"head": 1e-2}})
    c.phases.finetune_pruned.update({"steps": 60, "learning_rates": {"head": 1e-2}})


def _scratch(c: ConfigDict) -> None:
    c.crop_size = c.eval_size = (128, 128)
    c.augment.scale = (0.8, 1.2)
    c.model.update({"depth": 14, "width": 16, "norm": "group", "aspp_rates": (1, 2, 3)})
    c.model.update({"stride_in": "3x3", "preprocessing": "imagenet"})
    # A high rate on the ASPP would saturate the sigmoid before the features have learnt anything.
    new = {"aspp": 3e-4, "prototypes": 2e-3}
    c.phases.warmup.update({"steps": 30, "learning_rates": new})
    c.phases.joint.update({"steps": 1650, "learning_rates": {"backbone": 2e-3, **new}})
    c.phases.finetune.update({"steps": 60, "learning_rates": {"head": 1e-3}})
    c.phases.finetune_pruned.update({"steps": 60, "learning_rates": {"head": 1e-3}})


def _parts(c: ConfigDict, anchors: int, steps: int) -> None:
    """A class's points are divided by one of the backbone's maps, once anchors have settled in it
    for so many steps."""
    c.loss.update({"diversity": 0.0, "assignment": 0.3, "assignment_tau": 0.5})
    c.model.anchors = anchors
    rates = {"prototypes": 3e-2}
    c.phases.warmup = {"steps": steps, "learning_rates": rates, "schedule": "constant"}
