"""Train a ProtoSeg, or go on where a run stopped.

python train.py --config=configs/demo.py[:ROW] [--workdir=DIR] [--smoke] [--devices=N]
    [--config.key=value …]
"""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from protoseg_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", help_string="The experiment: configs/NAME.py.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's folder; default runs/NAME[-ROW][-smoke]."
)
_DEVICES = flags.DEFINE_integer(
    "devices", None, "Parts a CPU is split into; default: its cores, as far as the batch divides."
)
_SMOKE = flags.DEFINE_bool("smoke", False, "Try every phase with three steps each.")


def main() -> None:
    if _CONFIG.value is None:
        raise UserError("no --config given; try --config=configs/demo.py")

    from protoseg_jax import config as configs
    from protoseg_jax import devices
    from protoseg_jax.run import phases
    from protoseg_jax.run.workdir import Workdir
    from protoseg_jax.training import run

    config = configs.complete(_CONFIG.value.to_dict())
    for key in configs.unknown_keys(config):
        print(f"note: {key} is no key of protoseg_jax; an extension must read it", file=sys.stderr)
    path, _, row = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    name = Path(path).stem + (f"-{row}" if row else "")
    if _SMOKE.value:
        phases.smoke(config)
        name += "-smoke"
    workdir = _WORKDIR.value or f"runs/{name}"
    devices.split_cpu(
        _DEVICES.value,
        before=Workdir(workdir).cpu_devices(),
        batch_size=config.batch_size,
        accumulate=config.accumulate,
    )
    devices.start_processes()
    devices.keep_compiled_programs()
    devices.keep_freed_memory()
    run.train(config, workdir)
    if devices.is_main():
        pictures = "" if config.model.head == "linear" else "prototypes/class_*.png show why; "
        print(f"{workdir}: {pictures}next: eval.py or explain.py --workdir={workdir}")
    if _SMOKE.value:
        print("--smoke: every phase has run; after three steps each, its scores mean nothing")
