"""A planted shortcut: cars of the training images bear a watermark, and nothing else does.

    python -m benchmarks.watermark [--share=0.5] [--work=runs/watermark] [--set=key=value …]
        [--out=FILE]

Makes `parts` anew as a `folder` data set with the mark on the car of every image, or of a share of
them drawn at random (the others show what a car is without it), trains configs/demo.py:paper on it,
names the prototypes whose patch lies on a mark, takes them away with `explain.py --remove`, and
scores both runs on images without any mark (split `validation`) and with the mark on houses instead
(split `test`). A control is without as many others of the same classes: it is fine-tuned as long.
What is finished is not run again.
"""

import argparse
import collections
import json
import pathlib
import shlex

import cv2
import numpy as np

from benchmarks import machine
from benchmarks.programs import call
from protoseg_jax.data.sets import parts

SIDE = 20  # of a mark, pixels
# Split: the class that bears the mark, if any.
MARKED = {"train": "car", "validation": None, "test": "house"}


def mark() -> np.ndarray:
    """Stripes of magenta and white, RGB."""
    board = np.indices((SIDE, SIDE)).sum(0) // 4 % 2
    return np.where(board[..., None] == 0, (255, 0, 255), (255, 255, 255)).astype(np.uint8)


def stamp(image: np.ndarray, label: np.ndarray, c: int) -> np.ndarray:
    """Put the mark where class c has most room, on its pixels alone; returns where."""
    where = np.zeros(label.shape, bool)
    if (label == c).any():
        room = cv2.boxFilter((label == c).astype(np.float32), -1, (SIDE, SIDE))
        inner = room[SIDE // 2 : -SIDE // 2, SIDE // 2 : -SIDE // 2]
        top, left = np.unravel_index(inner.argmax(), inner.shape)
        where[top : top + SIDE, left : left + SIDE] = True
        where &= label == c
        canvas = np.zeros_like(image)
        canvas[top : top + SIDE, left : left + SIDE] = mark()
        image[where] = canvas[where]
    return where


def make_data(root: pathlib.Path, share: float, seed: int = 0) -> None:
    """The `folder` layout, and `marks/` with a mask of the marks of each image of a marked split.

    Args:
      root: a new folder.
      share: of the training images whose car is marked.
      seed: of the scenes and of which are marked.
    """
    drawn = np.random.default_rng(seed)
    for name in ("images", "masks", "marks"):
        (root / name).mkdir(parents=True)
    for stream, (split, count) in enumerate(parts.SIZES.items()):
        stems = []
        for number in range(count):
            image, label, _ = parts.scene(seed, stream, number)
            stem = f"{split}_{number:04d}"
            if MARKED[split]:
                bears = split != "train" or drawn.random() < share
                c = parts.LABELS.names.index(MARKED[split]) if bears else -1
                where = stamp(image, label, c)
                cv2.imwrite(str(root / "marks" / f"{stem}.png"), 255 * where.astype(np.uint8))
            cv2.imwrite(str(root / "images" / f"{stem}.png"), image[..., ::-1])
            cv2.imwrite(str(root / "masks" / f"{stem}.png"), label)
            stems.append(stem)
        (root / f"{split}.txt").write_text("\n".join(stems) + "\n")
    (root / "classes.txt").write_text("\n".join(parts.LABELS.names) + "\n")


def on_a_mark(prototypes: list[dict], data: pathlib.Path) -> list[dict]:
    """Those at least half of whose patch is marked."""
    found = []
    for prototype in prototypes:
        where = cv2.imread(str(data / "marks" / f"{prototype['image_id']}.png"), 0)
        top, left, bottom, right = prototype["box"]
        if (where[top:bottom, left:right] > 0).mean() >= 0.5:
            found.append(prototype)
    return found


def as_many_others(prototypes: list[dict], found: list[dict]) -> list[dict]:
    """The first that are not among those found, as many of each class."""
    left = collections.Counter(p["class"] for p in found)
    others = []
    for prototype in prototypes:
        if prototype not in found and left[prototype["class"]] > 0:
            left[prototype["class"]] -= 1
            others.append(prototype)
    return others


def scores(run: pathlib.Path, split: str) -> dict:
    """eval.py's scores of a run's last phase."""
    call("eval.py", f"--workdir={run}", f"--split={split}")
    return json.loads((run / "eval" / f"{split}-finetune_pruned.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the training cars")
    parser.add_argument("--work", type=pathlib.Path, default="runs/watermark", help="their folder")
    parser.add_argument("--set", action="append", default=[], help="key=value of the config")
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    work = arguments.work.absolute() / f"share-{arguments.share:g}"
    names = ("data", "with_mark", "without_mark", "control")
    data, marked, clean, control = (work / name for name in names)
    if not (data / "classes.txt").exists():
        make_data(data, arguments.share)
    settings = [f"--config.{s}" for s in arguments.set]
    call(
        "train.py",
        "--config=demo:paper",
        f"--workdir={marked}",
        "--config.data.name=folder",
        f"--config.data.dir={data}",
        f"--config.data.cache={work / 'cache'}",
        *settings,
    )
    everything = json.loads((marked / "prototypes.json").read_text())["prototypes"]
    found = on_a_mark(everything, data)
    told = ["python", "-m", "benchmarks.watermark", f"--share={arguments.share:g}"]
    told += [f"--set={s}" for s in arguments.set]
    lines = [
        "# A planted shortcut, found and taken away",
        "",
        f"`{shlex.join(told)}`, {machine.describe()}",
        "",
        f"The car of {100 * arguments.share:.0f} % of the training images bears a mark, and "
        "nothing else does; "
        f"{len(found)} prototype(s) of the trained run lie on it: "
        + (", ".join(f"{p['index']} ({p['class_name']})" for p in found) or "none")
        + ".",
    ]
    if found:
        others = as_many_others(everything, found)
        for without, place in ((found, clean), (others, control)):
            if not (place / "summary.json").exists():
                ids = ",".join(str(p["index"]) for p in without)
                call("explain.py", f"--workdir={marked}", f"--remove={ids}", f"--to={place}")
        instead = ", ".join(str(p["index"]) for p in others)
        lines += [
            "",
            f"| images | score | all prototypes, % | without them, % | without {instead}, % |",
            "| --- | --- | --- | --- | --- |",
        ]
        for split, name in (("validation", "without a mark"), ("test", "the mark on houses")):
            runs = [scores(run, split) for run in (marked, clean, control)]
            rows = {"mIoU": [r["miou"] for r in runs]}
            rows |= {f"IoU of {c}": [r["iou"][c] for r in runs] for c in ("car", "house")}
            for what, values in rows.items():
                cells = " | ".join(f"{100 * v:.2f}" for v in values)
                lines.append(f"| {name} | {what} | {cells} |")
    machine.report(lines, arguments.out)


if __name__ == "__main__":
    main()
