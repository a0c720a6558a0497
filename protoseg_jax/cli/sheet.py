"""Draw training examples of a config as it augments them: scaled with the crop's box, and cut.

protoseg sheet --config=configs/demo.py [--out=augmented.png]
"""

from absl import flags
from ml_collections import config_flags

from protoseg_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", help_string="The experiment: configs/NAME.py.")
_OUT = flags.DEFINE_string("out", "augmented.png", "PNG to write.")


def main() -> None:
    from protoseg_jax import config as configs
    from protoseg_jax import images
    from protoseg_jax.data import augment
    from protoseg_jax.files import write_atomically
    from protoseg_jax.run.experiment import Experiment
    from protoseg_jax.training import start

    if _CONFIG.value is None:
        raise UserError("no --config given; try --config=configs/demo.py")
    config = configs.complete(_CONFIG.value.to_dict())
    start.settle(config)
    experiment = Experiment(config)
    picture = augment.sheet(
        experiment.source(config.data.train_split),
        experiment.augmentation,
        experiment.labels,
        seed=config.seed,
    )
    try:
        write_atomically(_OUT.value, images.encode(picture))
    except PermissionError as error:
        raise UserError(f"{_OUT.value} cannot be written ({error.strerror})") from error
