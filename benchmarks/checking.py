"""`protoseg check` on a data set with one fault of each kind planted, and on the clean one.

    python -m benchmarks.checking [--images=1000] [--side=640] [--out=FILE.md]

Both are made here. Told are the faults that were planted, what was said of each, what was found
beside them, and the time.
"""

import argparse
import dataclasses
import io
import pathlib
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image

from benchmarks import machine
from protoseg_jax import config as configs
from protoseg_jax.data import check

NAMES = ("ground", "thing", "other", "rare")
_VALIDATES = 5  # one in so many

Folder = pathlib.Path


def make(root: Folder, count: int, side: int) -> None:
    """Images of blobs on a ground, `side` wide, of three heights, in the layout of `folder`."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n")
    stems = [f"im{n:03d}" for n in range(count)]
    first = count - count // _VALIDATES
    (root / "train.txt").write_text("\n".join(stems[:first]) + "\n")
    (root / "validation.txt").write_text("\n".join(stems[first:]) + "\n")
    for n, stem in enumerate(stems):
        height = side * (2 + n % 3) // 4
        label = np.zeros((height, side), np.uint8)
        for value in (1, 2):
            y, x = rng.integers(0, (height, side))
            cv2.circle(label, (int(x), int(y)), side // 5, value, -1)
        if n in (0, count - 1):
            label[: side // 8, : side // 8] = 3
        label[-side // 16 :] = 255
        colours = np.array([[60, 120, 60], [200, 80, 40], [40, 80, 200], [220, 220, 40]])
        noise = cv2.resize(rng.integers(0, 50, (8, 8, 3)).astype(np.uint8), (side, height))
        pixels = (colours[label % 255] + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{stem}.jpg", quality=90)
        Image.fromarray(label).save(root / "masks" / f"{stem}.png")


@dataclasses.dataclass(frozen=True)
class Planted:
    """A fault: its kind, a name that must be told with it, and whether nobody can train with it."""

    kind: str
    name: str
    fatal: bool = True


def plant(root: Folder) -> list[Planted]:
    """Spoil a folder that `make` made; one fault of each kind, each on a pair of its own."""
    planted = []
    for number, (kind, spoil) in enumerate(PAIRS.items(), 1):
        stem = f"im{number:03d}"
        spoil(root, stem)
        planted.append(Planted(kind, stem, kind not in DOUBTFUL))
    for kind, (name, spoil) in OTHERS.items():
        spoil(root)
        planted.append(Planted(kind, name, kind not in DOUBTFUL))
    return planted


# -- faults of a pair ----------------------------------------------------------------------------

Spoil = Callable[[Folder, str], object]


def _anew(what: str, suffix: str) -> Callable[[Callable[[np.ndarray], np.ndarray | bytes]], Spoil]:
    """What writes a pair's file anew from its pixels: bytes, or an array as PNG, under its name."""

    def changed(change: Callable[[np.ndarray], np.ndarray | bytes]) -> Spoil:
        def spoil(root: Folder, stem: str) -> None:
            path = root / what / f"{stem}{suffix}"
            made = change(np.array(Image.open(path)))
            path.write_bytes(made if isinstance(made, bytes) else _png(made))

        return spoil

    return changed


_image, _mask = _anew("images", ".jpg"), _anew("masks", ".png")


def _png(array: np.ndarray) -> bytes:
    order = {3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}.get(array.ndim == 3 and array.shape[2])
    return cv2.imencode(".png", array if order is None else cv2.cvtColor(array, order))[1].tobytes()


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _with_alpha(array: np.ndarray) -> np.ndarray:
    return np.dstack([array, np.where(array[..., 0] > 99, 255, 0).astype(np.uint8)])


def _turned(array: np.ndarray) -> bytes:
    image = Image.fromarray(array)
    exif = image.getexif()
    exif[0x0112] = 6
    return _saved(image, "JPEG", exif=exif)


def _moving(array: np.ndarray) -> bytes:
    frames = [Image.fromarray(array), Image.fromarray(255 - array)]
    return _saved(frames[0], "PNG", save_all=True, append_images=frames[1:])


def _huge(array: np.ndarray) -> bytes:
    """A PNG whose header says 20,000 × 20,000 pixels."""
    data = bytearray(_png(array))
    data[16:24] = struct.pack(">II", 20000, 20000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def _blurred(mask: np.ndarray) -> np.ndarray:
    """Things in white on black, with soft edges."""
    return cv2.GaussianBlur((255 * (mask == 1)).astype(np.uint8), (5, 5), 0)


def _outlined(mask: np.ndarray) -> np.ndarray:
    """All classes but the ground as lines, one pixel wide."""
    lines = np.zeros_like(mask)
    for value in (1, 2, 3):
        lines[4 * value, :] = value
    return lines


def _alpha(mask: np.ndarray) -> np.ndarray:
    return np.dstack([mask, mask, mask, np.where(mask == 1, 0, 255).astype(np.uint8)])


PAIRS: dict[str, Spoil] = {
    "empty image": _image(lambda a: b""),
    "image that does not decode": _image(lambda a: _saved(Image.fromarray(a), "JPEG")[:-400]),
    "image of 16 bits": _image(lambda a: a.astype(np.uint16) * 16),
    "image of another kind of numbers": _image(
        lambda a: cv2.imencode(".tiff", a.astype(np.float32))[1].tobytes()
    ),
    "transparent image": _image(_with_alpha),
    "image of several pictures": _image(_moving),
    "image that is too large": _image(_huge),
    "file that is stored turned": _image(_turned),
    "image that is nearly constant": _image(lambda a: np.full_like(a, 127)),
    "empty mask": _mask(lambda m: b""),
    "file that does not decode": _mask(lambda m: _png(m)[:-30]),
    "file of several pictures": _mask(_moving),
    "mask with lossy compression": _mask(lambda m: _saved(Image.fromarray(m), "JPEG")),
    "mask of another mode": _mask(lambda m: _saved(Image.fromarray(m.astype(np.float32)), "TIFF")),
    "mask of other numbers": _mask(
        lambda m: _saved(Image.fromarray(m.astype(np.int32) - 1), "TIFF")
    ),
    "mask in colour": _mask(lambda m: np.dstack([m, 0 * m, m])),
    "mask with transparent pixels": _mask(_alpha),
    "mask value that is no class": _mask(lambda m: np.where(m == 1, 7, m).astype(np.uint8)),
    "mask that looks antialiased": _mask(_blurred),
    "mask of another size than its image": _mask(lambda m: m[:-1]),
    "mask that is all void": _mask(lambda m: np.full_like(m, 255)),
    "image without a mask": lambda root, stem: (root / "masks" / f"{stem}.png").unlink(),
    "mask of thin lines": _mask(_outlined),
}

# -- faults of the whole -------------------------------------------------------------------------


def _list(root: Folder, line: str, split: str = "train") -> None:
    with (root / f"{split}.txt").open("a") as file:
        file.write(f"{line}\n")


def _pair(root: Folder, source: str, name: str) -> None:
    """A pair's files under another name too."""
    for folder, suffix in (("images", ".jpg"), ("masks", ".png")):
        path = root / folder / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((root / folder / f"{source}{suffix}").read_bytes())


def _namesakes(root: Folder) -> None:
    for folder in ("p", "q"):
        _pair(root, "im000", f"{folder}/namesake")
        _list(root, f"{folder}/namesake")
    _list(root, "namesake")


def _twin(root: Folder) -> None:
    _pair(root, "im039", "twin")
    _list(root, "twin", "validation")


def _palettes(root: Folder) -> None:
    for stem, colours in (("im040", (0, 0, 0, 255, 0, 0)), ("im041", (0, 0, 0, 0, 0, 255))):
        path = root / "masks" / f"{stem}.png"
        mask = Image.fromarray(np.array(Image.open(path)) % 2)
        mask.putpalette(colours)
        mask.save(path)


def _never(root: Folder) -> None:
    with (root / "classes.txt").open("a") as file:
        file.write("never\n")


def _no_rare(root: Folder) -> None:
    path = root / "masks" / f"{(root / 'validation.txt').read_text().split()[-1]}.png"
    mask = np.array(Image.open(path))
    Image.fromarray(np.where(mask == 3, 0, mask)).save(path)


def _unlisted(root: Folder) -> None:
    _pair(root, "im000", "unlisted")
    path = root / "images" / "unlisted.jpg"
    path.write_bytes(_saved(Image.open(path).transpose(Image.Transpose.ROTATE_180), "JPEG"))


# kind: (a name that must be told with it, what plants it). That of the last image comes first, as
# later ones add to the lists.
OTHERS: dict[str, tuple[str, Callable[[Folder], object]]] = {
    "class that cannot be scored": ("'rare'", _no_rare),
    "class that cannot be learnt": ("'never'", _never),
    "broken link": ("link.jpg", lambda r: (r / "images" / "link.jpg").symlink_to(r / "gone.jpg")),
    "two files of one name": (
        "im000.png",
        lambda r: (r / "images" / "im000.png").write_bytes(
            (r / "masks" / "im000.png").read_bytes()
        ),
    ),
    "list entry without an image": ("'nobody'", lambda r: _list(r, "nobody")),
    "list entry that several images have": ("'namesake'", _namesakes),
    "image that trains and is scored": ("'twin'", _twin),
    "image listed twice": ("'im000'", lambda r: _list(r, "images/im000.jpg")),
    "mask without an image": (
        "alone.png",
        lambda r: (r / "masks" / "alone.png").write_bytes((r / "masks" / "im000.png").read_bytes()),
    ),
    "image in no list": ("unlisted.jpg", _unlisted),
    "palettes that differ": ("im041.png", _palettes),
}
DOUBTFUL = {"image that is nearly constant", "mask that is all void", "mask of thin lines"}
DOUBTFUL |= {"mask without an image", "image in no list", "palettes that differ"}
DOUBTFUL |= {"class that cannot be scored"}


def timed(root: Folder) -> tuple[check.Report, float]:
    """A folder's report, and the seconds that it took."""
    config = configs.load("folder")
    config.data.dir = str(root)
    start = time.perf_counter()
    return check.check(config), time.perf_counter() - start


def rows(planted: list[Planted], report: check.Report) -> list[str]:
    """A row for each planted fault, and one for what else was said."""
    findings, lines = report.findings, []
    for fault in planted:
        of = (findings.faults if fault.fatal else findings.doubts).get(fault.kind)
        told = [fact for fact in of.facts if fault.name in fact] if of else []
        text = f"`{told[0]}` → {' / '.join(of.remedies)}" if told else "**not found**"
        count = "" if not of or of.count == 1 else f" ({of.count} of this kind)"
        lines.append(f"| {fault.kind}{count} | {'fault' if fault.fatal else 'warning'} | {text} |")
    known = {fault.kind for fault in planted}
    other = [f"{k} ({x.count})" for k, x in {**findings.faults, **findings.doubts}.items()
             if k not in known]  # fmt: skip
    return [*lines, f"| nothing else was planted | | {', '.join(other) or 'nothing else found'} |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--side", type=int, default=640)
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = pathlib.Path(scratch) / "own"
        make(root, arguments.images, arguments.side)
        report, clean = timed(root)
        found = report.findings
        quiet = not found.faults and not found.doubts
        planted = plant(root)
        report, spoilt = timed(root)
        table = [row.replace(scratch, "…").replace("own/", "") for row in rows(planted, report)]
    size = f"{arguments.images} images, {arguments.side} wide"
    line = " ".join(["python -m benchmarks.checking", *sys.argv[1:]])
    head = [
        "# `protoseg check`: one fault of each kind",
        "",
        f"`{line}`, {machine.describe()}",
        "",
        f"{size}, three heights, JPEG with PNG masks. The clean set: {clean:.1f} s, "
        + ("nothing said." if quiet else "FALSE ALARMS: " + "; ".join(found.lines())),
        f"With {len(planted)} faults: {spoilt:.1f} s.",
        "",
        "| planted | | said |",
        "| --- | --- | --- |",
    ]
    machine.report([*head, *table], arguments.out)


if __name__ == "__main__":
    main()
