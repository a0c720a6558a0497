"""Kinds of data that look right and are not: what an older checkout made of each, and this one.

    python -m benchmarks.data_traps [--forms] [--before=CHECKOUT] [--out=FILE.md]

Each kind is a small data set for `folder` in its plain form, and then with a trap in it, or with
`--forms` stored in another way in which people have their data. It is prepared by this package,
without and with the setting or the line that decides it, and by the older one in a process of its
own. What is accepted is compared with the prepared plain form.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import tempfile
import unicodedata
import zlib
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
      classes: a classes.txt that decides it.
    """

    name: str
    spoil: Callable[[Folder], object]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    check: bool = False
    classes: str = ""


KINDS = (
    Kind(
        "two classes, masks of 0 and 255",
        lambda root: _each(root, "masks", lambda a, _: 255 * a),
        check=True,
        classes="ground\t0\nobject\t255\n",
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


# -- other forms ---------------------------------------------------------------------------------

_COLOURS = np.array([[0, 0, 0], [128, 64, 0]], np.uint8)
_IN_COLOUR = "ground\t#000000\nobject\t#804000\n"


def _masks(change: Callable[[np.ndarray, int], np.ndarray]) -> Callable[[Folder], None]:
    return lambda root: _each(root, "masks", change)


def _saved(what: str, suffix: str, mode: str = "", **options: Any) -> Callable[[Folder], None]:
    """Every image, or mask, anew as a file of another kind and, with `mode`, in another mode."""

    def spoil(root: Folder) -> None:
        for path in sorted((root / what).iterdir()):
            image = Image.open(path)
            image.load()
            path.unlink()
            image = image.convert(mode) if mode else image
            image.save(path.with_suffix(suffix), **options)

    return spoil


def _renamed(what: str, name: Callable[[Folder], str]) -> Callable[[Folder], None]:
    """Every image, or mask, under another name below its folder."""

    def spoil(root: Folder) -> None:
        for path in sorted((root / what).iterdir()):
            target = path.parent / name(path)
            target.parent.mkdir(exist_ok=True)
            path.rename(target)

    return spoil


def _all(*spoils: Callable[[Folder], object]) -> Callable[[Folder], None]:
    def spoil(root: Folder) -> None:
        for one in spoils:
            one(root)

    return spoil


def _unicode(root: Folder) -> None:
    """One name in Unicode's composed form in the folder of images, decomposed in that of masks."""
    for folder, form in (("images", "NFC"), ("masks", "NFD")):
        path = root / folder / "im0.png"
        path.rename(path.with_name(unicodedata.normalize(form, "im0é.png")))
    _lists(train="im0é im1 im2")(root)


def _nested(root: Folder) -> None:
    for what in ("images", "masks"):
        _renamed(what, lambda path: f"day {int(path.stem[-1]) % 2}/{path.name}")(root)


def _under(root: Folder) -> None:
    """The lists of nested images."""
    (root / "train.txt").write_text("day 0/im0\nday 1/im1\nim2\n")
    (root / "validation.txt").write_text("im3\nday 0/im4\n")


def _antialiased(root: Folder) -> None:
    path = root / "masks" / "im0.png"
    mask = Image.open(path).resize((5 * SIDE // 2, 5 * SIDE // 2), Image.Resampling.NEAREST)
    mask.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path)


def _huge(root: Folder) -> None:
    """An image whose header says 20,000 × 20,000 pixels."""
    path = root / "images" / "im0.png"
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 20000, 20000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    path.write_bytes(data)


def _indexed(root: Folder) -> None:
    """Masks in colour as indices of no meaning into a palette."""
    for path in sorted((root / "masks").iterdir()):
        Image.open(path).quantize(8).save(path)


def _clear_ground(root: Folder) -> None:
    for path in sorted((root / "masks").iterdir()):
        label = np.array(Image.open(path))
        Image.fromarray(np.dstack([_COLOURS[label], 255 * label])).save(path)


def _one_off(root: Folder) -> None:
    path = root / "masks" / "im0.png"
    mask = np.array(Image.open(path))
    mask[0, 0] = 127, 64, 0
    Image.fromarray(mask).save(path)


_coloured = _masks(lambda a, _: _COLOURS[a])
FORMS = (
    Kind("binary masks of 0 and 255", _masks(lambda a, _: 255 * a), check=True,
         classes="ground\t0\nobject\t255\n"),
    Kind("binary masks of one bit",
         _all(_masks(lambda a, _: 255 * a), _saved("masks", ".png", "1"))),
    Kind("classes counted from 1", _masks(lambda a, _: a + 1),
         classes="ground\t1\nobject\t2\n"),
    Kind("gaps in the numbers", _masks(lambda a, _: 7 + 26 * a),
         classes="ground\t7\nobject\t33\n"),
    Kind("several ids for one class",
         _masks(lambda a, n: np.where(a, 20 + n, 3).astype(np.uint8)),
         classes="ground\t3\nobject\t20, 21, 22, 23, 24\n"),
    Kind("masks of 16 bits", _masks(lambda a, _: a.astype(np.uint16) * 1000),
         classes="ground\t0\nobject\t1000\n"),
    Kind("masks in colour", _coloured, classes=_IN_COLOUR),
    Kind("masks in colour with alpha", _all(_coloured, _saved("masks", ".png", "RGBA")),
         classes=_IN_COLOUR),
    Kind("the ground transparent", _clear_ground,
         classes="ground\ttransparent\nobject\t#804000\n"),
    Kind("numbers saved as RGB", _masks(lambda a, _: np.dstack([a] * 3))),
    Kind("masks with a palette that says what they mean",
         _all(_coloured, _indexed), classes=_IN_COLOUR),
    Kind("a colour that is in no line", _all(_coloured, _one_off), classes=_IN_COLOUR),
    Kind("a mask whose edges are blurred", _all(_coloured, _antialiased), classes=_IN_COLOUR),
    Kind("masks as TIFF", _saved("masks", ".tif")),
    Kind("masks as BMP", _saved("masks", ".bmp")),
    Kind("masks as WebP, lossless", _saved("masks", ".webp", "RGB", lossless=True)),
    Kind("masks as JPEG", _saved("masks", ".jpg")),
    Kind("JPEGs called .png as masks", _saved("masks", ".png", format="JPEG")),
    Kind("masks called .PNG", _renamed("masks", lambda path: f"{path.stem}.PNG")),
    Kind("images as TIFF", _saved("images", ".TIFF")),
    Kind("images as BMP", _saved("images", ".bmp")),
    Kind("images as WebP, lossless", _saved("images", ".webp", lossless=True)),
    Kind("images with an alpha channel, opaque", _saved("images", ".png", "RGBA")),
    Kind("images grey with alpha, opaque", _saved("images", ".png", "LA")),
    Kind("images as CMYK TIFF", _saved("images", ".tif", "CMYK")),
    Kind("nested folders", _all(_nested, _under)),
    Kind("masks called im0_mask.png", _renamed("masks", lambda p: f"{p.stem}_mask.png"),
         {"mask_suffix": "_mask"}),
    Kind("images and masks in one folder", _all(_renamed("masks", lambda p: f"{p.stem}-gt.png"),
         _renamed("masks", lambda p: f"../images/{p.name}")),
         {"masks": "images", "mask_suffix": "-gt"}),
    Kind("folders of other names", lambda root: [(root / a).rename(root / b) for a, b in
         (("images", "JPEGImages"), ("masks", "labels"))],
         {"images": "JPEGImages", "masks": "labels"}),
    Kind("suffixes in the lists",
         _lists(train="im0.png im1.png im2.png", validation="im3.png im4")),
    Kind("folders in the lists", _lists(train="images/im0.png ./im1 images/im2",
         validation="/home/me/data/images/im3.png im4")),
    Kind("a list entry with a slip", _lists(train="im0 im1 imm2")),
    Kind("hidden files", lambda root: [(root / what / f"._im{n}.png").write_bytes(b"a Mac's")
         for what in ("images", "masks") for n in range(5)]),
    Kind("a name in two Unicode forms", _unicode),
    Kind("a broken link", lambda root: (root / "images" / "im9.png").symlink_to("gone.png")),
    Kind("an image of 0 bytes", lambda root: (root / "images" / "im0.png").write_bytes(b"")),
    Kind("an image of 20,000 × 20,000", _huge),
    Kind("four faults at once", _all(
        lambda root: (root / "images" / "im0.png").write_bytes(b""),
        lambda root: (root / "masks" / "im1.png").unlink(),
        lambda root: (root / "masks" / "im2.png").write_bytes(b"no mask"),
        _lists(validation="im3 im4 nobody"))),
)  # fmt: skip


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
    try:
        config = configs.load("folder:scratch")
    except TypeError:  # an older checkout has that row alone
        config = configs.load("folder")
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
    lines = said.getvalue().splitlines()
    for n, line in enumerate(lines):
        if line.startswith("warning: "):
            fact = lines[n + 1 : n + 2] if "(" in line[-5:] else []
            found.warnings.append(" ".join([line, *map(str.strip, fact)]))
    return found


def before(checkout: Folder, scratch: Folder, kinds: tuple[Kind, ...]) -> list[dict[str, Any]]:
    """What an older checkout makes of each kind, whose folders lie in `scratch`."""
    # Started by its path, this file finds whatever package PYTHONPATH names.
    line = [sys.executable, str(pathlib.Path(__file__).resolve()), f"--worker={scratch}"]
    line += [f"--only={kind.name}" for kind in kinds]
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "JAX_PLATFORMS": "cpu"}
    subprocess.run(line, env=environment, check=True, cwd=scratch)
    return pickle.loads((scratch / "before.pickle").read_bytes())


def worker(scratch: Folder, names: list[str]) -> None:
    """The other side of `before`."""
    kinds = [kind for kind in (*KINDS, *FORMS) if kind.name in names]
    found = [outcome(folder_of(scratch, k), scratch / "older", {}, k.check) for k in kinds]
    (scratch / "before.pickle").write_bytes(pickle.dumps([vars(x) for x in found]))


def folder_of(scratch: Folder, kind: Kind) -> Folder:
    """Where a kind's trap lies."""
    return scratch / f"kind{(*KINDS, *FORMS).index(kind)}"


# -- the table -----------------------------------------------------------------------------------


def differences(found: Outcome, plain: Outcome) -> Iterator[str]:
    """How what was accepted differs from the plain form, and leaks, in words."""
    if found.classes != plain.classes:
        yield f"classes {', '.join(map(ascii, found.classes))}"
    truth = {name: (image, label) for _, name, image, label in plain.examples}
    which: dict[str, list[str]] = {}
    for _, given, image, label in found.examples:
        name = next(known for known in truth if known in given)
        if given != name:
            yield f"{name} is called {given}"
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
        if kind.settings or kind.classes:
            given = [f"--config.data.{key}={value}" for key, value in kind.settings.items()]
            if kind.classes:
                (folder / "classes.txt").write_text(kind.classes)
                given += [line.replace("\t", "⇥") for line in kind.classes.splitlines()]
            decided = outcome(folder, cache, kind.settings, kind.check)
            now += f"<br>with {', '.join(f'`{x}`' for x in given)}: {tell(decided, plain)}"
        cells = [kind.name, tell(Outcome(**old), plain) if old else "–", now]
        yield f"| {' | '.join(cells)} |".replace(f"{folder}/", "").replace(f"{scratch}/", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--worker", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--only", action="append", help=argparse.SUPPRESS)
    parser.add_argument("--forms", action="store_true")
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.only)
        return
    option = " --forms" if arguments.forms else ""
    option += " --before=CHECKOUT" if arguments.before else ""
    title = "Data as people have it" if arguments.forms else "Data that look right and are not"
    lines = [
        f"# {title}",
        "",
        f"`python -m benchmarks.data_traps{option}`, {machine.describe()} "
        f"OpenCV {cv2.__version__}. Five images of {SIDE}×{SIDE}, three of them for training.",
        "",
        "| kind of data | before | now |",
        "| --- | --- | --- |",
    ]
    with tempfile.TemporaryDirectory() as folder:
        kinds = FORMS if arguments.forms else KINDS
        lines += rows(pathlib.Path(folder), arguments.before, kinds)
    machine.report(lines, arguments.out)


if __name__ == "__main__":
    main()
