"""Table 4: U-Net with prototypes on the EM segmentation challenge (ISBI 2012).

python train.py --config=configs/isbi_em.py --config.data.dir=DIR

The paper's details are in a supplement that we do not have; this starts from a follow-up's recipe:
no warm-up, Adam at 1e-4 with polynomial decay, weight decay 5e-4, batch 2 of whole sections, 10⁴
joint steps and 10⁴ of each fine-tuning, 64 features, 20 prototypes. `seed` also draws which 20
sections train and which 10 validate.

`:authors` is what the history of the authors' repository holds: their ten sections, their rule of
the error (`eval.py --interpretability`), 20 prototypes a class, crops of half to one and a half
times the size; ours has GroupNorm, weight decay, and none of their two slips (docs/method.md).
`:cpu` is a narrower net on sections at half their size, for two CPU cores; its prototypes start on
training patches. `:lite0` has a frozen EfficientNet-Lite0 with ImageNet weights.
"""

from protoseg_jax.config import ConfigDict, default, require_row

ROWS = ("paper", "authors", "cpu", "lite0")


def get_config(row: str = "paper") -> ConfigDict:
    require_row(row, ROWS)
    c = default()
    c.batch_size = c.eval_batch_size = 2
    c.crop_size = c.eval_size = (512, 512)
    c.data.name = "isbi_em"
    c.augment.update({"scale": (0.8, 1.2), "turns": True, "elastic": 10.0})
    c.model.update({"backbone": "unet", "depth": 4, "width": 64, "output_stride": 1})
    c.model.update({"stride_in": "3x3", "preprocessing": "data"})

    rates = {"backbone": 1e-4, "decoder": 1e-4, "prototypes": 1e-4, "head": 0.0}
    c.phases.warmup = {"steps": 0, "learning_rates": rates, "schedule": "constant"}
    c.phases.joint = {"steps": 10_000, "learning_rates": rates, "schedule": "poly"}
    c.phases.finetune.steps = c.phases.finetune_pruned.steps = 10_000

    c.log_every = 10
    c.eval_every = 1000
    c.checkpoint_every = 500
    if row == "authors":
        c.data.split = "authors"
        c.augment.update({"scale": (0.5, 1.5), "turns": False, "elastic": 0.0})
        c.model.prototypes_per_class = 20
        c.measures += ("thresholds",)
    if row == "cpu":
        _cpu(c)
    if row == "lite0":
        _lite0(c)
    return c


def _lite0(c: ConfigDict) -> None:
    c.batch_size = 4
    c.augment.update({"elastic": 0.0, "views": 8})
    # Rows 1 to 3 have strides 2, 4 and 8: a membrane is a few pixels wide.
    c.model.update({"backbone": "efficientnet", "depth": 0, "output_stride": 32, "width": 64})
    c.model.update({"stages": (1, 2, 3, 5), "features": 32, "prototype_init": "patches"})
    c.model.update({"stride_in": "auto", "preprocessing": "auto"})
    c.pretrained.path = "efficientnet-lite0"
    rates = {"decoder": 2e-3, "prototypes": 1e-2}
    c.phases.joint = {"steps": 400, "learning_rates": rates, "schedule": "poly"}
    c.phases.warmup.learning_rates = rates
    head = {"steps": 50, "learning_rates": {"head": 1e-2}, "schedule": "poly"}
    c.phases.finetune.update(head)
    c.phases.finetune_pruned.update(head)
    c.eval_every = 0


def _cpu(c: ConfigDict) -> None:
    c.batch_size = 4
    c.crop_size = (128, 128)
    c.eval_size = (256, 256)  # half of 512 × 512; scores are at the labels' own size
    c.augment.update({"scale": (0.4, 0.6), "elastic": 2.7})
    c.model.update({"width": 16, "prototype_init": "patches"})
    c.phases.joint.steps = 1800
    c.phases.joint.learning_rates.update({"backbone": 2e-3, "decoder": 2e-3, "prototypes": 1e-2})
    head = {"steps": 100, "learning_rates": {"head": 3e-2}, "schedule": "poly"}
    c.phases.finetune.update(head)
    c.phases.finetune_pruned.update(head)
    c.eval_every = 0
