"""Everything that is wrong or doubtful in a data folder, at once, each with what mends it.

protoseg check DIR [--name=folder] [--config=configs/NAME.py] [--config.data.KEY=VALUE …]
    [--sheet=OUT.png]

Counts, sizes, classes by split, mask values; faults with their files, and doubts that only a person
can settle. --sheet draws images under their masks, where labels on the wrong place are seen at a
glance. The exit code is 0 where one can train on the data, else 2. Nothing is prepared.
"""

from absl import flags
from ml_collections import config_flags

from protoseg_jax import config as configs
from protoseg_jax.errors import UserError

ARGUMENTS = ("DIR",)
CONFIG = "folder"

_CONFIG = config_flags.DEFINE_config_file("config", help_string="The experiment: configs/NAME.py.")
_NAME = flags.DEFINE_string("name", None, "The data set: folder, camvid, voc, cityscapes, isbi_em.")
_SHEET = flags.DEFINE_string("sheet", None, "PNG to draw images under their masks into.")


def main(folder: str) -> None:
    from protoseg_jax import images
    from protoseg_jax.data import check
    from protoseg_jax.files import write_atomically

    config = configs.complete(_CONFIG.value.to_dict())
    config.data.dir = folder
    config.data.name = _NAME.value or config.data.name
    report = check.check(config)
    print("\n".join(report.lines))
    if _SHEET.value and report.sheet is None:
        print(f"no {_SHEET.value}: there is no image with its mask yet")
    elif _SHEET.value:
        try:
            write_atomically(_SHEET.value, images.encode(report.sheet))
        except OSError as error:
            raise UserError(f"{_SHEET.value} cannot be written ({error.strerror})") from error
        print(f"look at {_SHEET.value}")
    findings = report.findings
    if findings.count:
        raise UserError(
            f"{_counted(findings.count, 'fault')} in {folder}, listed above; mend "
            f"{'it' if findings.count == 1 else 'them'}, then check again"
        )
    doubts = sum(kind.count for kind in findings.doubts.values())
    print(f"{_counted(doubts, 'warning')}, no fault" if doubts else "nothing wrong was found")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
