"""Port PyTorch weights: to an .npz, or, of a trained ProtoSeg, to a run's folder.

python -m protoseg_jax.cli.port SRC DST.npz [--config=CONFIG]
python -m protoseg_jax.cli.port SRC WORKDIR --config=CONFIG [--config.key=value …]

SRC is a file, an index of several, or a folder of Hugging Face's: `models/readers.py` lists them.

The second form writes a run whose joint phase is finished, for eval.py and for train.py, which goes
on with projection: a state dict does not say where its prototypes come from. The config also says
which network the weights are of, by default a ResNet.
"""

import sys
from pathlib import Path

from ml_collections import config_flags

from protoseg_jax import program
from protoseg_jax.errors import UserError

ARGUMENTS = ("SRC", "DST")
_CONFIG = config_flags.DEFINE_config_file("config", help_string="The run's config.")


def main(source: str, target: str) -> None:
    from protoseg_jax import config as configs
    from protoseg_jax import models
    from protoseg_jax.models import weights
    from protoseg_jax.training import start

    config = configs.complete(_CONFIG.value.to_dict()) if _CONFIG.value else configs.default()
    if Path(target).suffix == ".npz":
        weights.save(weights.load(source, models.network(config.model)), target)
    elif _CONFIG.value is None:
        raise UserError(f"{target} is no .npz; to write a run's folder, give its --config too")
    else:
        start.write_ported(config, source, target)
    print(f"{source} → {target}")


if __name__ == "__main__":
    program.run(sys.modules["__main__"], sys.argv)
