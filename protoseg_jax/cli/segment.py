"""Segment images: files, folders with all below them, patterns ('photos/**/*.jpg').

protoseg segment IMAGE … --workdir=DIR [--out=DIR/segmented] [--phase=NAME]
    [--images=PATH,…] [--overlay] [--probabilities] [--evidence]

Writes OUT/NAME.png, the class of each pixel in the run's colours, under the images' own names, as
`eval.py` does it; the same command goes on where it stopped. An image that fails does not stop the
others: it is told at the end, and the exit code is 2.
"""

from absl import flags

from protoseg_jax.errors import UserError

ARGUMENTS = ("[IMAGE …]",)

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.")
_IMAGES = flags.DEFINE_list("images", [], "Images too: paths, separated by commas.")
_OUT = flags.DEFINE_string("out", None, "Folder to write; default DIR/segmented.")
_PHASE = flags.DEFINE_string("phase", None, "Whose network; default: the last finished one.")
_OVERLAY = flags.DEFINE_bool("overlay", False, "Also the image under its classes' colours.")
_PROBABILITIES = flags.DEFINE_bool("probabilities", False, "Also NAME.probabilities.npz.")
_EVIDENCE = flags.DEFINE_bool("evidence", False, "Also NAME.evidence.npz, of what decided.")
_DEVICES = flags.DEFINE_integer("devices", None, "Parts a CPU is split into; default: its cores.")


def main(*given: str) -> None:
    given = (*given, *_IMAGES.value)
    if not given:
        raise UserError("command line: IMAGE … missing; name files, folders or patterns")
    if _WORKDIR.value is None:
        raise UserError("no --workdir given; name the folder that train.py wrote")

    from protoseg_jax import devices
    from protoseg_jax.explain import segment

    devices.split_cpu(_DEVICES.value)
    devices.keep_compiled_programs()
    devices.keep_freed_memory()
    wanted = (_OVERLAY.value, _PROBABILITIES.value, _EVIDENCE.value)
    kinds = [kind for kind, yes in zip(segment.KINDS, wanted, strict=True) if yes]
    out = _OUT.value or f"{_WORKDIR.value}/segmented"
    count = segment.segment(_WORKDIR.value, given, out, kinds, _PHASE.value)
    print(f"{count} image{'s' * (count != 1)} in {out}")
