"""Score a run: print the per-class table and write DIR/eval/SPLIT-PHASE.json.

python eval.py --workdir=DIR [--split=validation] [--phase=NAME] [--predictions=OUT]
    [--interpretability [--measures=NAME,…]] [--flips]
"""

from absl import flags

from protoseg_jax.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.")
_SPLIT = flags.DEFINE_string("split", "validation", "train, validation or test.")
_PHASE = flags.DEFINE_string("phase", None, "The phase to score; default: the last finished one.")
_PREDICTIONS = flags.DEFINE_string("predictions", None, "Folder to write label PNGs to.")
_INTERPRETABILITY = flags.DEFINE_bool("interpretability", False, "Measure the explanations too.")
_MEASURES = flags.DEFINE_list("measures", [], "Which; default: those of the run's config.")
_FLIPS = flags.DEFINE_bool("flips", False, "Average class probabilities over mirror images.")
_DEVICES = flags.DEFINE_integer("devices", None, "Parts a CPU is split into; default: its cores.")


def main() -> None:
    if _WORKDIR.value is None:
        raise UserError("no --workdir given; name the folder that train.py wrote")
    if _MEASURES.value and not _INTERPRETABILITY.value:
        raise UserError("--measures=… says which; add --interpretability")

    from protoseg_jax import devices
    from protoseg_jax.evaluation import score

    devices.split_cpu(_DEVICES.value)
    devices.keep_compiled_programs()
    devices.keep_freed_memory()
    score.score_run(
        _WORKDIR.value,
        _SPLIT.value,
        _PHASE.value,
        _PREDICTIONS.value,
        flips=_FLIPS.value,
        interpretability=_INTERPRETABILITY.value,
        measures=_MEASURES.value,
    )
