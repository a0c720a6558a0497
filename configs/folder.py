"""ProtoSeg on your own images: a folder with images/, masks/ and classes.txt.

python train.py --config=configs/folder.py[:ROW] --config.data.dir=PATH

The default is a frozen EfficientNet-Lite0 with ImageNet weights, which fifty images are enough for;
what it says of each image and of 8 crops of it is computed once. `:scratch` is a ResNet from
scratch, for thousands of images that ImageNet has nothing like.
"""

from protoseg_jax.config import ConfigDict, default, require_row

ROWS = ("frozen", "scratch")


def get_config(row: str = "frozen") -> ConfigDict:
    require_row(row, ROWS)
    c = default()
    c.batch_size = c.eval_batch_size = 8
    c.data.name = "folder"
    # Photographs of any size are trained on as they are evaluated, nearly whole.
    c.augment.update({"scale": (0.8, 1.5), "scale_of": "evaluation"})
    (_scratch if row == "scratch" else _lite0)(c)
    c.log_every = 10
    c.eval_every = 500
    c.checkpoint_every = 250
    return c


def _lite0(c: ConfigDict) -> None:
    c.crop_size = c.eval_size = (384, 384)
    c.augment.views = 8
    c.model.update({"backbone": "efficientnet", "depth": 0, "output_stride": 32})
    c.model.width = 128
    c.model.prototype_init = "patches"
    c.pretrained.path = "efficientnet-lite0"
    new = {"decoder": 2e-3, "prototypes": 1e-2}
    head = {"learning_rates": {"head": 1e-2}, "schedule": "poly"}
    c.phases.warmup = {"steps": 0, "learning_rates": new, "schedule": "constant"}
    c.phases.joint = {"steps": 1000, "learning_rates": new, "schedule": "poly"}
    c.phases.finetune.update({"steps": 50, **head})
    c.phases.finetune_pruned.update({"steps": 100, **head})


def _scratch(c: ConfigDict) -> None:
    c.crop_size = (193, 193)
    c.eval_size = (257, 257)
    c.model.update({"depth": 26, "width": 32, "norm": "group", "aspp_rates": (1, 3, 6, 9)})
    c.model.update({"stride_in": "3x3", "preprocessing": "imagenet"})
    new = {"aspp": 1e-3, "prototypes": 1e-3}
    c.phases.warmup.update({"steps": 100, "learning_rates": new})
    c.phases.joint.update({"steps": 4000, "learning_rates": {"backbone": 1e-3, **new}})
    c.phases.finetune.update({"steps": 200, "learning_rates": {"head": 1e-3}})
    c.phases.finetune_pruned.update({"steps": 200, "learning_rates": {"head": 1e-3}})
