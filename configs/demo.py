"""A ProtoSeg in minutes on a laptop: the embedded `parts` data set, trained from scratch."""

from protoseg_jax.config import ConfigDict, default


def get_config() -> ConfigDict:
    c = default()
    c.batch_size = 8
    c.crop_size = c.eval_size = (128, 128)
    c.eval_batch_size = 16
    c.data.name = "parts"
    c.augment.scale = (0.8, 1.2)

    c.model.update({"depth": 14, "width": 16, "norm": "group", "aspp_rates": (1, 2, 3)})
    c.model.update({"stride_in": "3x3", "preprocessing": "imagenet"})
    c.model.update({"features": 32, "prototypes_per_class": 8})

    # A high rate on the ASPP would saturate the sigmoid before the features have learnt anything.
    new = {"aspp": 3e-4, "prototypes": 2e-3}
    c.phases.warmup.update({"steps": 30, "learning_rates": new})
    c.phases.joint.update({"steps": 1650, "learning_rates": {"backbone": 2e-3, **new}})
    c.phases.finetune.update({"steps": 60, "learning_rates": {"head": 1e-3}})
    c.phases.finetune_pruned.update({"steps": 60, "learning_rates": {"head": 1e-3}})

    c.log_every = 10
    c.eval_every = c.checkpoint_every = 500
    return c
