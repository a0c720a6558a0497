"""Pairs of image and mask files: how they are found, and how one is read."""

import dataclasses
import difflib
import functools
import os
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from protoseg_jax import decoding
from protoseg_jax.data.labels import VOID
from protoseg_jax.data.masks import MaskTable
from protoseg_jax.data.prepare import Example, file_stamp
from protoseg_jax.data.reading import Reading, colours_used
from protoseg_jax.errors import Fault, UserError, reason

_COMPARED = 5  # slips of lists that are compared with all names
_LEFT_ALONE = ("__MACOSX",)  # that a Mac puts into archives; and what begins with a dot


def files_below(folder: Path) -> Iterator[Path]:
    """Image files (`decoding.SUFFIXES`) and links to such, broken ones too, in the order of names.

    Hidden files and folders are left alone; links to folders are followed, once.

    Raises:
      UserError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"folder {error.filename} cannot be read ({reason(error)})") from error

    seen = set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if _is_seen(name))
        for name in sorted(names):
            path = Path(place, name)
            if _is_seen(name) and path.suffix.lower() in decoding.SUFFIXES:
                yield path


def _is_seen(name: str) -> bool:
    return not name.startswith(".") and name not in _LEFT_ALONE


def key(name: str | os.PathLike) -> str:
    """What a file is called by: its path with slashes, in Unicode's composed form (NFC)."""
    return unicodedata.normalize("NFC", os.fspath(name).replace("\\", "/"))


def _name(path: Path, folder: Path) -> str:
    return key(path.relative_to(folder).with_suffix(""))


def by_name(
    paths: Iterable[Path], folder: Path, ending: str = ""
) -> tuple[dict[str, Path], list[Fault]]:
    """Files by their `key` below a folder without suffix, and what is wrong with them.

    Args:
      paths: below the folder.
      folder: theirs.
      ending: of the names, taken off; files without it are left out.
    """
    found: dict[str, Path] = {}
    faults: list[Fault] = []
    for path in paths:
        name = _name(path, folder)
        if not name.endswith(ending):
            continue
        name = name[: len(name) - len(ending)]
        if not _is_text(name):
            faults.append(
                Fault("name that is not UTF-8", f"{ascii(os.fspath(path))} is no text", "rename it")
            )
        elif not os.path.exists(path):
            faults.append(
                Fault(
                    "broken link",
                    f"{path} is a link to {os.readlink(path)}, which is not there"
                    if path.is_symlink()
                    else f"{path} cannot be read",
                    "remove it, or bring back what it links to",
                )
            )
        elif not path.is_file():
            continue  # a socket, say
        elif name in found:
            faults.append(
                Fault(
                    "two files of one name",
                    f"{found[name]} and {path} have the same name",
                    "remove or rename one of them",
                )
            )
        else:
            found[name] = path
    return found, faults


def images_in(folder: Path) -> tuple[dict[str, Path], list[Fault]]:
    """As `by_name`, all images of a folder."""
    return by_name(files_below(folder), folder)


def mask_ending(text: str) -> str:
    """`data.mask_suffix` as the ending of a name without suffix: "_mask" of "_mask.png"."""
    stem = next((text[: -len(s)] for s in decoding.SUFFIXES if text.lower().endswith(s)), text)
    return key(stem)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Images of a folder and masks of another.

    Attributes:
      folder, mask_folder: theirs.
      images, masks: files by name (see `key`).
      faults: what is wrong with files (see `by_name`).
      ending: of the masks' names.
      others: names of the masks with and without that ending, as they are.
    """

    folder: Path
    mask_folder: Path
    images: dict[str, Path]
    masks: dict[str, Path]
    faults: tuple[Fault, ...]
    ending: str = ""
    others: frozenset[str] = frozenset()

    @classmethod
    def of(cls, folder: Path, mask_folder: Path, ending: str = "") -> "Pairs":
        """What lies in two folders, which may be one where masks have an ending."""
        pictures, faults = images_in(folder)
        # JPEGs among them, to be refused with the reason instead of being overlooked.
        paths = list(files_below(mask_folder))
        masks, wrong = by_name(paths, mask_folder, ending)
        others = frozenset(_name(path, mask_folder) for path in paths)
        if os.path.samefile(folder, mask_folder):
            pictures = {n: path for n, path in pictures.items() if not n.endswith(ending)}
            wrong = []  # told of the images
        else:  # masks may lie in the images' folder
            pictures = {
                n: path for n, path in pictures.items() if not path.is_relative_to(mask_folder)
            }
        return cls(folder, mask_folder, pictures, masks, (*faults, *wrong), ending, others)

    @property
    def stamps(self) -> list[Any]:
        """For a fingerprint: which files there are, as they are now."""
        return [*map(file_stamp, (*self.images.values(), *self.masks.values())), self.ending]

    def read(self, name: str, table: MaskTable, reading: Reading) -> Example:
        """A pair by its name; see `read_pair`."""
        if name not in self.masks:
            raise self._missing(name)
        return read_pair(name, self.images[name], self.masks[name], table, reading)

    def _missing(self, name: str) -> Fault:
        """That an image has no mask."""
        wanted = self.mask_folder / f"{name}{self.ending}.png"
        fact = f"image {self.images[name]} has no mask {wanted}"
        if self._other_ending and name + self._other_ending in self.others:
            fact += f", but {self.mask_folder / (name + self._other_ending)} is there"
            remedy = f"set --config.data.mask_suffix={self._other_ending}"
            return Fault("image without a mask", fact, remedy)
        if same := self._masks_by_last_part.get(name.rpartition("/")[2]):
            fact += f", but {same} is there"
            return Fault("image without a mask", fact, "give both the same folders and name")
        return Fault("image without a mask", fact, "add it or remove the image")

    def doubts(self) -> list[tuple[str, str, str]]:
        """(kind, fact, remedy) of masks without an image."""
        return [
            ("mask without an image", f"mask {path} has no image", "add the image, or remove it")
            for name, path in self.masks.items()
            if name not in self.images and not self._is_of(name)
        ]

    @functools.cached_property
    def _masks_by_last_part(self) -> dict[str, Path]:
        return {name.rpartition("/")[2]: path for name, path in self.masks.items()}

    @functools.cached_property
    def _other_ending(self) -> str:
        """What masks' names have behind their images', where another is told, or none."""
        for name in self.images:
            if name not in self.masks:
                longer = [n for n in self.others if n.startswith(name) and n not in self.images]
                ending = min(longer, key=len, default=name)[len(name) :]
                return "" if ending.isdigit() else ending  # another's number
        return ""

    def _is_of(self, mask: str) -> bool:
        """Whether a mask is of an image, but for another ending."""
        mask, ending = mask + self.ending, self._other_ending
        return bool(ending) and mask.endswith(ending) and mask[: -len(ending)] in self.images


class Names:
    """Finds the image that a line of a list means: with or without folder and suffix.

    Args:
      known: the images' names (see `key`).
      folder: the name of theirs.
    """

    def __init__(self, known: Collection[str], folder: str):
        self._known, self._folder = set(known), key(folder) + "/"
        self._last: dict[str, list[str]] = {}
        self._compared = 0  # slips, for which the nearest name was looked for
        for name in known:
            self._last.setdefault(name.rpartition("/")[2], []).append(name)

    def find(self, line: str, where: object) -> str | Fault:
        """The name, or what is wrong with the line of the list `where`."""
        text = key(line.strip()).removeprefix("./")
        bare, suffix = os.path.splitext(text)
        forms = [text, bare] if suffix.lower() in decoding.SUFFIXES else [text]
        for form in forms:
            for name in (form, form.removeprefix(self._folder), form.partition(self._folder)[2]):
                if name in self._known:
                    return name
        for form in forms:
            same = self._last.get(form.rpartition("/")[2], [])
            if "/" not in form and len(same) == 1:
                return same[0]
            if "/" not in form and same:
                return Fault(
                    "list entry that several images have",
                    f"{where} names {line!r}, and {', '.join(same[:3])} are called so",
                    "write its folder too",
                )
        self._compared += 1
        few = self._compared <= _COMPARED
        near = difflib.get_close_matches(forms[-1], self._known, 1, 0.6) if few else ()
        return Fault(
            "list entry without an image",
            f"{where} names {line!r}, but {self._folder} has no such image"
            + (f" (the nearest is {near[0]!r})" if near else ""),
            "correct the list, or add the image",
        )


def read_pair(
    name: str, image: Path, mask: Path | None, table: MaskTable, reading: Reading
) -> Example:
    """An image with its mask, checked.

    Args:
      name: becomes the image's id.
      image: its file.
      mask: that of its mask; None for an image without labels, all of which is void.
      table: what the mask means.
      reading: how both are read.

    Raises:
      Fault: a file does not decode, needs a setting, has another size, or a strange value.
    """
    data, pixels = reading.image(read(image, "image"), image)
    size = pixels.shape[:2]
    if not mask:
        return Example(name, data, np.full(size, VOID, np.uint8), pixels=pixels)
    found = reading.mask(read(mask, "mask"), mask)
    shape = found.values.shape[:2]
    if shape != size:
        advice = "make them equal"
        if shape == size[::-1] and decoding.header(image.read_bytes()).orientation > 4:
            other = {"apply": "ignore", "ignore": "apply"}[reading.exif]
            advice = (
                f"with data.exif={reading.exif} they do not fit, so set --config.data.exif={other}"
            )
        raise Fault(
            "mask of another size than its image",
            f"image {image} is {size[0]}×{size[1]} but its mask {mask} is {shape[0]}×{shape[1]} "
            "(height×width)",
            advice,
        )
    label, values = table.labels(found, mask)
    colours = colours_used(found) if table.values else {}
    return Example(name, data, label, None, pixels, os.fspath(mask), colours, values)


def read(path: Path, what: str) -> bytes:
    """A file's bytes.

    Raises:
      Fault: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise Fault(
            f"{what} that cannot be read",
            f"{what} {path} cannot be read ({error.strerror})",
            "look at its permissions",
        ) from error
