"""Write a run's explorer page, draw the paper's figures, or remove prototypes.

python explain.py --workdir=DIR [--split=validation] [--images=PATH,…] [--out=DIR/explain]
python explain.py --workdir=DIR --figures=fig2,fig5,… [--compare=DIR2] [--out=DIR/figures]
python explain.py --workdir=DIR --remove=ID,… --to=NEWDIR [--force]
"""

from absl import flags

from protoseg_jax.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.")
_SPLIT = flags.DEFINE_string("split", "validation", "The split whose images are shown.")
_IMAGES = flags.DEFINE_list("images", [], "Images to show instead: paths, separated by commas.")
_OUT = flags.DEFINE_string("out", None, "Folder to write; default DIR/explain, or DIR/figures.")
_FIGURES = flags.DEFINE_list("figures", [], "Figures to draw instead of the page.")
_COMPARE = flags.DEFINE_string("compare", None, "A second run, beside the first in the figures.")
_REMOVE = flags.DEFINE_list("remove", [], "Prototypes that a new run is to be without.")
_TO = flags.DEFINE_string("to", None, "The new run's folder.")
_FORCE = flags.DEFINE_bool("force", False, "Remove a class's last prototype, too.")
_DEVICES = flags.DEFINE_integer("devices", None, "Parts a CPU is split into; default: its cores.")


def main() -> None:
    if _WORKDIR.value is None:
        raise UserError("no --workdir given; name the folder that train.py wrote")
    if bool(_REMOVE.value) != bool(_TO.value):
        raise UserError("--remove=ID,… and --to=NEWDIR go together; give both")
    if _COMPARE.value and not _FIGURES.value:
        raise UserError("--compare=DIR2 is for figures; add --figures=fig2,fig5,…")

    from protoseg_jax import devices
    from protoseg_jax.run.workdir import Workdir

    before = Workdir(_WORKDIR.value).cpu_devices() if _REMOVE.value else None  # it trains
    devices.split_cpu(_DEVICES.value, before=before)
    devices.keep_compiled_programs()
    devices.keep_freed_memory()
    where = _WORKDIR.value, _SPLIT.value, _IMAGES.value, _OUT.value
    if _REMOVE.value:
        from protoseg_jax.training import removal

        removal.remove(_WORKDIR.value, _REMOVE.value, _TO.value, force=_FORCE.value)
    elif _FIGURES.value:
        from protoseg_jax.explain import figures

        for path in figures.draw_figures(*where, _FIGURES.value, _COMPARE.value):
            print(path)
    else:
        from protoseg_jax.explain import page

        print(f"open {page.explain_run(*where)}")
