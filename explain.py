"""See why: the explorer page of a run.

python explain.py --workdir=DIR [--split=validation] [--images=PATH,…] [--out=DIR/explain]
"""

from absl import flags

from protoseg_jax import devices, errors, explaining

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.")
_SPLIT = flags.DEFINE_string("split", "validation", "train, validation or test.")
_IMAGES = flags.DEFINE_list("images", [], "Images to explain instead of the split's.")
_OUT = flags.DEFINE_string("out", None, "Folder to write; default DIR/explain.")


def main() -> None:
    if _WORKDIR.value is None:
        raise errors.UserError("no --workdir given; name the folder that train.py wrote")
    devices.keep_compiled_programs()
    page = explaining.explain_run(_WORKDIR.value, _SPLIT.value, _IMAGES.value, _OUT.value)
    print(f"open {page}")


if __name__ == "__main__":
    errors.run(main)
