"""Kinds of data that look right and are not: what an older checkout made of each, and this one.

    python -m benchmarks.data_traps [--before=CHECKOUT] [--out=FILE.md]

Each kind is a small data set for `folder` in its plain form, and then with a trap in it. It is
prepared by this package, without and with the setting that decides it, and by the older one in a
process of its own. What is accepted is compared with the prepared plain form.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import cv2
import numpy as np
from PIL import Image

from benchmarks import machine
from protoseg_jax import config as configs
from protoseg_jax.data import prepare
from protoseg_jax.errors import UserError, one_line
from protoseg_jax.run.experiment import Experiment
from protoseg_jax.training import run

SIDE = 24
SPLITS = {"train": ("im0", "im1", "im2"), "validation": ("im3", "im4")}

Folder = pathlib.Path


def make_plain(root: Folder) -> None:
    """Five square images of a bright shape on dark ground, unlike any turned copy of themselves."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    (root / "classes.txt").write_text("ground\nobject\n")
    for split, names in SPLITS.items():
        (root / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            label = np.zeros((SIDE, SIDE), np.uint8)
            label[2:8, 3 : rng.integers(14, 22)] = 1
            label[2 : rng.integers(14, 22), 3:9] = 1
            grey = np.where(label == 1, 200, 60) + rng.integers(0, 56, label.shape)
            grey[0, 0] = 255
            Image.fromarray(np.repeat(grey[..., None], 3, 2).astype(np.uint8)).save(
                root / "images" / f"{name}.png"
            )
            Image.fromarray(label).save(root / "masks" / f"{name}.png")


# -- the traps -----------------------------------------------------------------------------------


def _each(root: Folder, what: str, change: Callable[[np.ndarray, int], np.ndarray]) -> None:
    """Write every image, or mask, anew, by its array and number."""
    for number, path in enumerate(sorted((root / what).iterdir())):
        array = change(np.array(Image.open(path)), number)
        cv2.imwrite(str(path), array[..., ::-1] if array.ndim == 3 else array)


def tag(path: Folder, orientation: int) -> None:
    """Write an image anew with an EXIF orientation, its stored pixels the same."""
    image = Image.open(path)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)


def _stored_turned(root: Folder) -> None:
    """The first image, stored such that orientation 6 shows it as its mask is."""
    path = root / "images" / "im0.png"
    Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path)
    tag(path, 6)


def _twelve_bits(array: np.ndarray, _: int = 0) -> np.ndarray:
    """8 bits as 12 of 16."""
    return np.round(array * (4095 / 255)).astype(np.uint16)


def _alpha(root: Folder) -> None:
    """The ground of the first image transparent, the colour below it white."""
    path = root / "images" / "im0.png"
    image, label = np.array(Image.open(path)), np.array(Image.open(root / "masks" / "im0.png"))
    image[label == 0] = 255
    Image.fromarray(np.dstack([image, 255 * label])).save(path)


def _animated(root: Folder) -> None:
    """The first image as that for viewers without animations, the next two as its frames."""
    first, *others = [Image.open(root / "images" / f"im{n}.png").copy() for n in range(3)]
    path = root / "images" / "im0.png"
    first.save(path, save_all=True, append_images=others, default_image=True)


def _twin(root: Folder) -> None:
    """An image of training, with its mask, under another name in validation."""
    for name in ("images", "masks"):
        (root / name / "im3.png").write_bytes((root / name / "im0.png").read_bytes())


def _lists(**lists: str) -> Callable[[Folder], None]:
    def spoil(root: Folder) -> None:
        for split, names in lists.items():
            (root / f"{split}.txt").write_text("\n".join(names.split()) + "\n")

    return spoil


def _classes(encoding: str) -> Callable[[Folder], object]:
    return lambda root: (root / "classes.txt").write_bytes("ground\nobject\n".encode(encoding))


def _palettes(root: Folder) -> None:
    colours = [0, 0, 0, 255, 0, 0], [0, 0, 0, 0, 0, 255]
    for number, path in enumerate(sorted((root / "masks").iterdir())):
        mask = Image.fromarray(np.array(Image.open(path)))
        mask.putpalette(colours[number % 2])
        mask.save(path)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of data.

    Attributes:
      name: in the table.
      spoil: sets the trap in a plain folder.
      settings: of `data`, that decide it.
      check: whether what a run checks before it starts is told too.
    """

    name: str
    spoil: Callable[[Folder], object]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    check: bool = False


KINDS = (
    Kind(
        "two classes, masks of 0 and 255",
        lambda root: _each(root, "masks", lambda a, _: 255 * a),
        {"values": (0, 255)},
        check=True,
    ),
    Kind(
        "EXIF orientation 3, mask as stored",
        lambda root: tag(root / "images" / "im0.png", 3),
        {"exif": "ignore"},
    ),
    Kind(
        "EXIF orientation 6 on a square image, mask as stored",
        lambda root: tag(root / "images" / "im0.png", 6),
        {"exif": "ignore"},
    ),
    Kind(
        "EXIF orientation 6 on a square image, mask as shown",
        _stored_turned,
        {"exif": "apply"},
    ),
    Kind(
        "grey images, 12 bits in 16",
        lambda root: _each(root, "images", lambda a, _: _twelve_bits(a[..., 0])),
        {"white": 4095},
    ),
    Kind(
        "RGB images, 12 bits in 16",
        lambda root: _each(root, "images", _twelve_bits),
        {"white": 4095},
    ),
    Kind("an image with transparency", _alpha),
    Kind("an animated PNG, mask of the still picture", _animated),
    Kind("an image in train.txt and validation.txt", _lists(validation="im3 im4 im0")),
    Kind("the same pixels in both, under two names", _twin),
    Kind("a name twice in train.txt", _lists(train="im0 im1 im2 im1")),
    Kind("a byte-order mark in classes.txt", _classes("utf-8-sig")),
    Kind("classes.txt in UTF-16", _classes("utf-16")),
    Kind("palettes that differ between masks", _palettes),
)


# -- preparing -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Outcome:
    """What became of a folder; told by strings and arrays, so that it can cross processes.

    Attributes:
      line: of the refusal, or of the exception behind a traceback; None if it was accepted.
      warnings: lines that were said.
      classes: names.
      examples: (split, image id, image, label) of each.
    """

    line: str | None = None
    warnings: list[str] = dataclasses.field(default_factory=list)
    classes: tuple[str, ...] = ()
    examples: list[tuple[str, str, np.ndarray, np.ndarray]] = dataclasses.field(
        default_factory=list
    )


def outcome(root: Folder, cache: Folder, settings: Mapping[str, Any], check: bool) -> Outcome:
    """Prepare a folder, by whichever checkout this process has imported."""
    config = configs.load("folder:scratch")
    config.model.update({"depth": 14, "width": 8})
    config.data.update({"dir": str(root), "cache": str(cache), **settings})
    said, found = io.StringIO(), Outcome()
    try:
        with contextlib.redirect_stderr(said):
            data = prepare.open_data(config)
            if check:
                run.check(Experiment(config), new=False)
    except UserError as error:
        found.line = str(error)
    except Exception as error:  # what a user sees as a traceback
        found.line = f"traceback: {type(error).__name__}: {one_line(error)}"
    else:
        found.classes = data.labels.names
        for split in data.splits:
            source = data.source(split)
            for e in (source[n] for n in range(len(source))):
                found.examples.append((split, e["image_id"], e["image"], e["label"]))
    found.warnings = [x for x in said.getvalue().splitlines() if x.startswith("warning: ")]
    return found


def before(checkout: Folder, scratch: Folder, kinds: tuple[Kind, ...]) -> list[Outcome]:
    """What an older checkout makes of each kind, whose folders lie in `scratch`."""
    # Started by its path, this file finds whatever package PYTHONPATH names.
    line = [sys.executable, str(pathlib.Path(__file__).resolve()), f"--worker={scratch}"]
    line += [f"--only={KINDS.index(kind)}" for kind in kinds]
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "JAX_PLATFORMS": "cpu"}
    subprocess.run(line, env=environment, check=True, cwd=scratch)
    return pickle.loads((scratch / "before.pickle").read_bytes())


def worker(scratch: Folder, numbers: list[int]) -> None:
    """The other side of `before`."""
    found = [
        outcome(folder_of(scratch, KINDS[n]), scratch / "older", {}, KINDS[n].check)
        for n in numbers
    ]
    (scratch / "before.pickle").write_bytes(pickle.dumps([vars(x) for x in found]))


def folder_of(scratch: Folder, kind: Kind) -> Folder:
    """Where a kind's trap lies."""
    return scratch / f"kind{KINDS.index(kind)}"


# -- the table -----------------------------------------------------------------------------------


def differences(found: Outcome, plain: Outcome) -> Iterator[str]:
    """How what was accepted differs from the plain form, and leaks, in words."""
    if found.classes != plain.classes:
        yield f"classes {', '.join(map(ascii, found.classes))}"
    truth = {name: (image, label) for _, name, image, label in plain.examples}
    which: dict[str, list[str]] = {}
    for _, name, image, label in found.examples:
        for what in _wrong(name, image, label, truth):
            which.setdefault(what, []).append(name)
    for what, names in which.items():
        yield f"{'every image' if len(names) == len(truth) else ' and '.join(names)}: {what}"
    trained = [
        (name, image.tobytes()) for split, name, image, _ in found.examples if split == "train"
    ]
    scored = [image.tobytes() for split, _, image, _ in found.examples if split == "validation"]
    leaked = sum(pixels in [p for _, p in trained] for pixels in scored)
    if leaked:
        yield f"{leaked} of {len(scored)} validation images in training too"
    names = [name for name, _ in trained]
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield f"{name} trains {names.count(name)} times an epoch"


def _wrong(
    name: str,
    image: np.ndarray,
    label: np.ndarray,
    truth: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> Iterator[str]:
    """How an example differs from that of the same name."""
    true_image, true_label = truth[name]
    for turn, mirror in ((t, m) for m in (False, True) for t in range(4)):
        if np.array_equal(image, _turned(true_image, turn, mirror)):
            wrong = (label != _turned(true_label, turn, mirror)).mean()
            if turn or mirror:
                yield f"turned{', its mask not' if wrong else ' with its mask'}"
            if wrong:
                yield f"{100 * wrong:.0f} % of the labels on the wrong pixel"
            return
    for other, (picture, _) in truth.items():
        if np.array_equal(image, picture):
            yield f"{other}'s pixels"
            return
    if image.max() < true_image.max():
        yield f"largest value {image.max()} instead of {true_image.max()}"
    else:
        yield f"{100 * (image != true_image).any(-1).mean():.0f} % of the pixels are others"


def _turned(array: np.ndarray, turn: int, mirror: bool) -> np.ndarray:
    return np.rot90(array[:, ::-1] if mirror else array, turn)


def tell(found: Outcome, plain: Outcome) -> str:
    """A cell: the line that was said, or what was prepared."""
    if found.line:
        return f"{'' if found.line.startswith('traceback') else 'refused: '}`{found.line}`"
    told = [f"`{line}`" for line in found.warnings]
    return "accepted; " + "; ".join([*differences(found, plain), *told] or ["as the plain form"])


def rows(scratch: Folder, checkout: Folder | None, kinds: tuple[Kind, ...]) -> Iterator[str]:
    """The table's rows."""
    make_plain(scratch / "plain")
    plain = outcome(scratch / "plain", scratch / "cache", {}, False)
    for kind in kinds:
        make_plain(folder_of(scratch, kind))
        kind.spoil(folder_of(scratch, kind))
    older = before(checkout, scratch, kinds) if checkout else [None] * len(kinds)
    for kind, old in zip(kinds, older, strict=True):
        folder, cache = folder_of(scratch, kind), scratch / "cache"
        now = tell(outcome(folder, cache, {}, kind.check), plain)
        if kind.settings:
            given = ", ".join(
                f"--config.data.{key}={','.join(map(str, v)) if isinstance(v, tuple) else v}"
                for key, v in kind.settings.items()
            )
            decided = outcome(folder, cache, kind.settings, kind.check)
            now += f"<br>with `{given}`: {tell(decided, plain)}"
        cells = [kind.name, tell(Outcome(**old), plain) if old else "–", now]
        yield f"| {' | '.join(cells)} |".replace(f"{folder}/", "").replace(f"{scratch}/", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--worker", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--only", type=int, action="append", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.only)
        return
    option = " --before=CHECKOUT" if arguments.before else ""
    lines = [
        "# Data that look right and are not",
        "",
        f"`python -m benchmarks.data_traps{option}`, {machine.describe()} "
        f"OpenCV {cv2.__version__}. Five images of {SIDE}×{SIDE}, three of them for training.",
        "",
        "| kind of data | before | now |",
        "| --- | --- | --- |",
    ]
    with tempfile.TemporaryDirectory() as folder:
        lines += rows(pathlib.Path(folder), arguments.before, KINDS)
    machine.report(lines, arguments.out)


if __name__ == "__main__":
    main()
