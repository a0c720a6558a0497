"""ProtoSeg on CamVid's streets (SegNet layout), sized for a CPU.

python train.py --config=configs/camvid.py[:ROW] --config.data.dir=PATH

The default: frozen EfficientNet-Lite0 with ImageNet weights, at the size that is scored; what it
says of 4 crops of each image is computed once. `:parts` has the assignment loss in place of the
diversity loss; `:trained` trains the backbone too, after 300 steps.
`:scratch` is a U-Net from scratch on images at half their size.
"""

from protoseg_jax.config import ConfigDict, default, require_row

ROWS = ("frozen", "parts", "trained", "scratch")


def get_config(row: str = "frozen") -> ConfigDict:
    require_row(row, ROWS)
    c = default()
    c.batch_size = c.eval_batch_size = 8
    c.data.name = "camvid"
    c.model.prototype_init = "patches"
    c.loss.class_balance = 0.5  # rare classes count more
    (_scratch if row == "scratch" else _lite0)(c)
    if row == "parts":  # a class's points are divided by the map at stride 16
        c.loss.update({"diversity": 0.0, "assignment": 0.3, "assignment_tau": 0.5})
        c.model.anchors = 1
        rates = {"prototypes": 3e-2}
        c.phases.warmup = {"steps": 120, "learning_rates": rates, "schedule": "constant"}
    if row == "trained":
        c.augment.views = 0
        c.phases.warmup.steps, c.phases.joint.steps = 300, 600
        c.phases.joint.learning_rates.update({"backbone": 2e-4, "decoder": 5e-4})
    c.log_every = 10
    c.eval_every = 300
    c.checkpoint_every = 250
    return c


def _lite0(c: ConfigDict) -> None:
    c.crop_size = c.eval_size = (360, 480)
    c.augment.update({"scale": (0.8, 1.5), "views": 4})
    c.model.update({"backbone": "efficientnet", "depth": 0, "output_stride": 32})
    c.model.width = 128
    c.pretrained.path = "efficientnet-lite0"
    rates = {"decoder": 2e-3, "prototypes": 1e-2}
    head = {"learning_rates": {"head": 1e-2}, "schedule": "poly"}
    c.phases.warmup = {"steps": 0, "learning_rates": rates, "schedule": "constant"}
    c.phases.joint = {"steps": 1000, "learning_rates": rates, "schedule": "poly"}
    c.phases.finetune.update({"steps": 50, **head})
    c.phases.finetune_pruned.update({"steps": 100, **head})


def _scratch(c: ConfigDict) -> None:
    """U-Net up to a quarter of the evaluated size: trained from scratch it learns these streets
    faster than a DeepLab of equal cost."""
    c.crop_size = c.eval_size = (180, 240)  # half of 360 × 480; scores are at the labels' own size
    # Around the half at which images are evaluated, so that things have the size they will have.
    c.augment.scale = (0.4, 0.8)
    c.model.update({"backbone": "unet", "depth": 4, "width": 16, "output_stride": 4})
    c.model.update({"stride_in": "3x3", "preprocessing": "imagenet"})
    rates = {"backbone": 1e-3, "decoder": 1e-3, "prototypes": 1e-2, "head": 0.0}
    head = {"learning_rates": {"head": 3e-2}, "schedule": "poly"}
    c.phases.warmup = {"steps": 0, "learning_rates": rates, "schedule": "constant"}
    c.phases.joint = {"steps": 700, "learning_rates": rates, "schedule": "poly"}
    c.phases.finetune.update({"steps": 30, **head})
    c.phases.finetune_pruned.update({"steps": 70, **head})
