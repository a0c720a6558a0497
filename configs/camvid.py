"""ProtoSeg on CamVid's streets (SegNet layout), from scratch, sized for a CPU.

python train.py --config=configs/camvid.py --config.data.dir=PATH

U-Net up to a quarter of the evaluated size: trained from scratch it learns these streets faster
than a DeepLab of equal cost.
"""

from protoseg_jax.config import ConfigDict, default


def get_config() -> ConfigDict:
    c = default()
    c.batch_size = c.eval_batch_size = 8
    c.crop_size = c.eval_size = (180, 240)  # half of 360 × 480; scores are at the labels' own size
    c.data.name = "camvid"
    # Around the half at which images are evaluated, so that things have the size they will have.
    c.augment.scale = (0.4, 0.8)

    c.model.update({"backbone": "unet", "depth": 4, "width": 16, "output_stride": 4})
    c.model.update({"stride_in": "3x3", "preprocessing": "imagenet"})
    c.model.prototype_init = "patches"
    c.loss.class_balance = 0.5  # rare classes count more

    rates = {"backbone": 1e-3, "decoder": 1e-3, "prototypes": 1e-2, "head": 0.0}
    head = {"learning_rates": {"head": 3e-2}, "schedule": "poly"}
    c.phases.warmup = {"steps": 0, "learning_rates": rates, "schedule": "constant"}
    c.phases.joint = {"steps": 700, "learning_rates": rates, "schedule": "poly"}
    c.phases.finetune.update({"steps": 30, **head})
    c.phases.finetune_pruned.update({"steps": 70, **head})

    c.log_every = 10
    c.eval_every = 300
    c.checkpoint_every = 250
    return c
