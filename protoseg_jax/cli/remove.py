"""Write a new run without some of a run's prototypes, its last layer fine-tuned.

protoseg remove --workdir=DIR --to=NEWDIR [--force] ID …

IDs are those of prototypes.json ("index"). The old run is only read.
"""

from absl import flags

from protoseg_jax.errors import UserError

ARGUMENTS = ("ID …",)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.")
_TO = flags.DEFINE_string("to", None, "The new run's folder.")
_FORCE = flags.DEFINE_bool("force", False, "Remove a class's last prototype, too.")
_DEVICES = flags.DEFINE_integer(
    "devices", None, "Parts a CPU is split into; default: as the old run."
)


def main(*ids: str) -> None:
    if _WORKDIR.value is None or _TO.value is None:
        raise UserError("--workdir=DIR and --to=NEWDIR go together; give both")

    from protoseg_jax import devices
    from protoseg_jax.run.workdir import Workdir
    from protoseg_jax.training import removal

    devices.split_cpu(_DEVICES.value, before=Workdir(_WORKDIR.value).cpu_devices())
    devices.keep_compiled_programs()
    devices.keep_freed_memory()
    removal.remove(_WORKDIR.value, ids, _TO.value, force=_FORCE.value)
