"""An experiment of whose parts the package knows nothing: all are found by their dotted paths."""

from protoseg_jax.config import default


def get_config():
    c = default()
    c.batch_size = c.eval_batch_size = 4
    c.crop_size, c.eval_size = (32, 32), (40, 40)
    c.data.name = "toy.squares"
    c.model.update({"backbone": "toy.net", "width": 8, "features": 4, "prototypes_per_class": 2})
    c.model.preprocessing = "imagenet"
    c.loss.terms = (*c.loss.terms, "toy.pull")
    c.loss.pull = 0.1
    c.measures = (*c.measures, "toy.brightness")
    rates = {"trunk": 3e-3, "neck": 3e-3, "prototypes": 3e-3}
    c.phases.warmup.steps = 0
    c.phases.joint = {"steps": 40, "learning_rates": rates, "schedule": "poly"}
    c.phases.finetune.steps = c.phases.finetune_pruned.steps = 3
    c.log_every, c.eval_every, c.checkpoint_every = 1, 20, 5
    return c
