"""Score a run.

python eval.py --workdir=DIR [--split=validation] [--phase=NAME] [--predictions=OUT]
    [--interpretability] [--flips]
"""

from absl import flags

from protoseg_jax import devices, errors
from protoseg_jax.training import scoring

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.")
_SPLIT = flags.DEFINE_string("split", "validation", "train, validation or test.")
_PHASE = flags.DEFINE_string("phase", None, "The phase to score; default: the last finished one.")
_PREDICTIONS = flags.DEFINE_string("predictions", None, "Folder to write label PNGs to.")
_INTERPRETABILITY = flags.DEFINE_bool("interpretability", False, "Measure the explanations too.")
_FLIPS = flags.DEFINE_bool("flips", False, "Average class probabilities over mirror images.")


def main() -> None:
    if _WORKDIR.value is None:
        raise errors.UserError("no --workdir given; name the folder that train.py wrote")
    devices.keep_compiled_programs()
    scoring.score_run(
        _WORKDIR.value,
        _SPLIT.value,
        _PHASE.value,
        _PREDICTIONS.value,
        flips=_FLIPS.value,
        interpretability=_INTERPRETABILITY.value,
    )


if __name__ == "__main__":
    errors.run(main)
