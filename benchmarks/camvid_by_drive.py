"""CamVid with one drive of its training split held out, to choose settings on.

    python -m benchmarks.camvid_by_drive --data=DIR --out=NEW [--hold=0006R0]

CamVid's frames are of few drives, and neighbouring ones look alike: validation's are of a drive
that trains too. NEW has links to DIR's files in the SegNet layout: the training frames of that
drive are its `val`, all others its `train`; validation and test are not in it.
"""

import argparse
import pathlib
import sys

from protoseg_jax.data import pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, required=True, help="the SegNet layout")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a new folder")
    parser.add_argument("--hold", default="0006R0", help="a drive: how its frames' names begin")
    arguments = parser.parse_args()
    data, out = arguments.data.expanduser().resolve(), arguments.out
    if out.exists():
        sys.exit(f"{out} is there already; name a new folder")
    images, _ = pairs.images_in(data / "train")
    split = {"val": [n for n in images if n.startswith(arguments.hold)]}
    split["train"] = [n for n in images if not n.startswith(arguments.hold)]
    if not all(split.values()):
        drives = ", ".join(sorted({name.split("_")[0] for name in images}))
        sys.exit(f"--hold={arguments.hold} leaves nothing on one side; the drives are {drives}")
    for name, stems in split.items():
        for part in (name, f"{name}annot"):
            (out / part).mkdir(parents=True)
        for stem in stems:
            (out / name / images[stem].name).symlink_to(images[stem])
            mask = data / "trainannot" / f"{stem}.png"
            (out / f"{name}annot" / mask.name).symlink_to(mask)
        print(f"{name}: {len(stems)}")


if __name__ == "__main__":
    main()
