"""See why: a run's explorer page and figures; or a run without some of its prototypes.

python explain.py --workdir=DIR [--split=validation] [--images=PATH,…] [--out=DIR/explain]
    [--figures=fig2,fig5,fig6,fig7,fig8] [--compare=DIR2]
python explain.py --workdir=DIR --remove=ID,… --to=NEWDIR [--force]
"""

from absl import flags

from protoseg_jax import devices, errors, explaining

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.")
_SPLIT = flags.DEFINE_string("split", "validation", "train, validation or test.")
_IMAGES = flags.DEFINE_list("images", [], "Images to explain instead of the split's.")
_OUT = flags.DEFINE_string("out", None, "Folder to write; default DIR/explain.")
_FIGURES = flags.DEFINE_list("figures", [], "The paper's figures to draw instead of the page.")
_COMPARE = flags.DEFINE_string("compare", None, "A second run, beside the first in the figures.")
_REMOVE = flags.DEFINE_list("remove", [], "Prototypes that a new run is to be without.")
_TO = flags.DEFINE_string("to", None, "The new run's folder.")
_FORCE = flags.DEFINE_bool("force", False, "Remove a class's last prototype, too.")


def main() -> None:
    if _WORKDIR.value is None:
        raise errors.UserError("no --workdir given; name the folder that train.py wrote")
    if bool(_REMOVE.value) != bool(_TO.value):
        raise errors.UserError("--remove=ID,… and --to=NEWDIR go together; give both")
    if _COMPARE.value and not _FIGURES.value:
        raise errors.UserError("--compare=DIR2 is for figures; add --figures=fig2,fig5,…")
    devices.keep_compiled_programs()
    where = _WORKDIR.value, _SPLIT.value, _IMAGES.value, _OUT.value
    if _REMOVE.value:
        explaining.remove(_WORKDIR.value, _REMOVE.value, _TO.value, force=_FORCE.value)
    elif _FIGURES.value:
        for path in explaining.draw_figures(*where, _FIGURES.value, _COMPARE.value):
            print(path)
    else:
        print(f"open {explaining.explain_run(*where)}")


if __name__ == "__main__":
    errors.run(main)
