"""ProtoSeg on your own images: a folder with images/, masks/ and classes.txt.

python train.py --config=configs/folder.py --config.data.dir=PATH
"""

from protoseg_jax.config import ConfigDict, default


def get_config() -> ConfigDict:
    c = default()
    c.batch_size = c.eval_batch_size = 8
    c.crop_size = (193, 193)
    c.eval_size = (257, 257)
    c.data.name = "folder"

    c.model.update({"depth": 26, "width": 32, "norm": "group", "aspp_rates": (1, 3, 6, 9)})
    c.model.update({"stride_in": "3x3", "preprocessing": "imagenet"})

    new = {"aspp": 1e-3, "prototypes": 1e-3}
    c.phases.warmup.update({"steps": 100, "learning_rates": new})
    c.phases.joint.update({"steps": 4000, "learning_rates": {"backbone": 1e-3, **new}})
    c.phases.finetune.update({"steps": 200, "learning_rates": {"head": 1e-3}})
    c.phases.finetune_pruned.update({"steps": 200, "learning_rates": {"head": 1e-3}})

    c.log_every = 10
    c.eval_every = 500
    c.checkpoint_every = 250
    return c
