"""What is wrong or doubtful in a data set, found while its examples pass by, told all at once."""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from protoseg_jax.data.labels import VOID, LabelSet
from protoseg_jax.errors import Fault, UserError

SCORED = ("validation", "test")  # all other splits train, or are where prototypes come from
_SHOWN = 5  # facts of a kind
_FLAT = 2.0  # grey levels of deviation under which an image is nearly constant
_FEW = 30  # pixels of a class under which its shape says nothing


@dataclasses.dataclass
class Kind:
    """All faults, or all doubts, of one kind.

    Attributes:
      name: of the kind.
      count: how many there are.
      facts: of the first few.
      remedies: of these, each once.
    """

    name: str
    count: int = 0
    facts: list[str] = dataclasses.field(default_factory=list)
    remedies: list[str] = dataclasses.field(default_factory=list)

    def lines(self, title: str) -> list[str]:
        """For a person: what, which, and what to do."""
        shown = [f"  {fact}" for fact in self.facts]
        more = [f"  … and {self.count - len(self.facts)} more"] if self.count > len(shown) else []
        remedies = [f"  → {remedy}" for remedy in self.remedies]
        return [f"{title}: {self.name} ({self.count})", *shown, *more, *remedies]


@dataclasses.dataclass
class Split:
    """What a split holds.

    Attributes:
      images: that were read whole.
      smallest, largest: (height, width) of the images, by pixels.
      pixels, images_with: of each label 0–255, void's among them.
    """

    images: int = 0
    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None
    pixels: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(256, np.int64))
    images_with: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(256, np.int64))


class Findings:
    """Looks at every example of a data set, in order.

    Args:
      labels: the classes.
      official: whether the splits are a benchmark's, which nobody can mend: pixels that two of them
        share are then a doubt, not a fault.

    Attributes:
      faults, doubts: by kind; nobody can train with the former.
      first: the first fault.
      splits: what each holds.
      values: pixels by mask value or colour.
    """

    def __init__(self, labels: LabelSet, official: bool = False):
        self._labels, self._leaks = labels, Leaks()
        self._official, self._palettes = official, Palettes()
        self.faults: dict[str, Kind] = {}
        self.doubts: dict[str, Kind] = {}
        self.first: UserError | None = None
        self.splits: dict[str, Split] = {}
        self.values: collections.Counter[str] = collections.Counter()

    @property
    def count(self) -> int:
        """How many faults there are."""
        return sum(kind.count for kind in self.faults.values())

    def fault(self, error: UserError) -> None:
        """Take in what makes the data unfit for training."""
        self.first = self.first or error
        _keep(self.faults, error)

    def doubt(self, name: str, fact: str, remedy: str) -> None:
        """Take in what is probably wrong, and only a person can tell."""
        _keep(self.doubts, Fault(name, fact, remedy))

    def add(self, split: str, example: Any) -> None:
        """Take in an example with its pixels (see `prepare.Example`)."""
        rgb, label = example.pixels, example.label
        for error, certain in self._leaks.add(split, example.image_id, rgb):
            if certain or not self._official:
                self.fault(error)
            else:
                self.doubt(error.kind, error.fact, error.remedy)
        for error in self._palettes.add(example.mask, example.colours):
            self.doubt(error.kind, error.fact, error.remedy)
        self.values.update(example.values)
        of = self.splits.setdefault(split, Split())
        counts = np.bincount(label.ravel(), minlength=256)
        of.images += 1
        of.pixels += counts
        of.images_with += counts > 0
        size = rgb.shape[:2]
        of.smallest = min(of.smallest or size, size, key=np.prod)
        of.largest = max(of.largest or size, size, key=np.prod)
        self._look(example, counts)

    def _look(self, example: Any, counts: np.ndarray) -> None:
        """What an example looks like."""
        rgb, label, mask = example.pixels, example.label, example.mask
        if mask and counts[VOID] == label.size:
            self.doubt(
                "mask that is all void",
                f"mask {mask} has no pixel of a class",
                "draw it, or leave the image out; or say in classes.txt what its values mean",
            )
        thin = _thin(label, counts)
        if len(thin) >= 3:
            names = ", ".join(repr(self._labels.names[c]) for c in thin[:3])
            self.doubt(
                "mask of thin lines",
                f"mask {mask or 'of ' + repr(example.image_id)} has {len(thin)} classes as lines "
                f"one or two pixels wide ({names} …)",
                "look at it: edges that antialiasing has blurred look so; draw or export masks "
                "without it, and resize them by nearest neighbour",
            )
        step = max(1, min(rgb.shape[:2]) // 64)
        deviation = cv2.meanStdDev(np.ascontiguousarray(rgb[::step, ::step]))[1]
        if min(rgb.shape[:2]) > 1 and deviation.max() < _FLAT:
            self.doubt(
                "image that is nearly constant",
                f"image {example.image_id!r} deviates by {deviation.max():.1f} from one colour",
                "look at it; leave it out, or write it again",
            )

    def finish(self, trains: str | None = None, void: int | None = None) -> None:
        """Look for classes that a split lacks, when all examples have passed.

        Args:
          trains: the split that must have every class, if it is to be looked at.
          void: see `absent_classes`.
        """
        if trains is not None and trains not in self.splits and not self.count:
            names = ", ".join(self.splits) or "none"
            fact = f"split {trains!r}, which trains, does not exist; there are: {names}"
            self.fault(Fault("split that does not exist", fact, "set --config.data.train_split"))
        size = len(self._labels)
        for split, of in self.splits.items():
            pixels = of.pixels[:size]
            absent = [
                name for name, count in zip(self._labels.names, pixels, strict=True) if not count
            ]
            if not absent:
                continue
            if split == trains:
                self.fault(absent_classes(absent, split, pixels, int(of.pixels[VOID]), void))
            elif split in SCORED and pixels.any():  # benchmarks keep their test labels
                fact = f"split {split!r} has no pixel of {', '.join(map(repr, absent))}"
                remedy = "add images of it, or read the scores without it"
                self.doubt("class that cannot be scored", fact, remedy)

    def lines(self) -> list[str]:
        """All of it for a person, faults first."""
        kinds = [("error", kind) for kind in self.faults.values()]
        kinds += [("warning", kind) for kind in self.doubts.values()]
        return [line for title, kind in kinds for line in kind.lines(title)]

    def refuse(self, name: str, say: Callable[[str], object]) -> None:
        """Raise what is wrong, if anything is.

        Args:
          name: of the data set.
          say: where the faults are told that the message has no room for.

        Raises:
          UserError: the only fault, or how many there are and the first.
        """
        if self.count > 1:
            for kind in self.faults.values():
                for line in kind.lines("error"):
                    say(line)
            raise UserError(
                f"{self.count} faults in data set {name!r}, listed above; the first: {self.first}"
            ) from self.first
        if self.first:
            raise self.first


def _keep(kinds: dict[str, Kind], error: UserError) -> None:
    name = getattr(error, "kind", "fault of another kind")
    fact, _, remedy = str(error).rpartition("; ")
    if isinstance(error, Fault):
        fact, remedy = error.fact, error.remedy
    kind = kinds.setdefault(name, Kind(name))
    kind.count += 1
    if len(kind.facts) < _SHOWN:
        kind.facts.append(fact or remedy)
        if remedy not in kind.remedies:
            kind.remedies.append(remedy)


def _thin(label: UInt8[np.ndarray, "h w"], counts: np.ndarray) -> list[int]:
    """Classes with pixels, none of which has its 3×3 neighbours of the same class."""
    present = [c for c in np.flatnonzero(counts[:VOID] >= _FEW).tolist()]
    if len(present) < 4:  # whose edges might be blurred into others
        return []
    square = np.ones((3, 3), np.uint8)
    inner = cv2.erode(label, square) == cv2.dilate(label, square)
    whole = np.bincount(label[inner], minlength=256)
    return [c for c in present if not whole[c]]


def absent_classes(
    absent: Sequence[str], split: str, pixels: np.ndarray, of_void: int, void: int | None
) -> Fault:
    """That there is nothing to learn some classes from.

    Args:
      absent: their names.
      split: where they are absent.
      pixels: of each class there.
      of_void: pixels without a class.
      void: the mask value without a class that might be meant as one; None: there is none.
    """
    what = f"no pixel of class {', '.join(map(repr, absent))} in split {split!r}"
    if void is not None and pixels[0] and of_void and not pixels[1:].any():
        return Fault(
            "class that cannot be learnt",
            f"{what}, whose masks hold 0 and {void} alone, and {void} means no label",
            f"where {void} is a class, write a tab and its mask value after each name in "
            f"classes.txt: 0 after the first, {void} after {absent[0]!r}",
        )
    remedy = "add images of it, or remove it from the classes"
    return Fault(
        "class that cannot be learnt", f"{what}, so there is nothing to learn it from", remedy
    )


class Leaks:
    """What would make scores too good: an image that trains and is also scored."""

    def __init__(self):
        self._names: set[tuple[str, str]] = set()
        # Of splits that are not scored, and of those that are: name or digest → (split, name).
        self._seen: tuple[dict[str | bytes, tuple[str, str]], ...] = {}, {}

    def add(
        self, split: str, name: str, pixels: UInt8[np.ndarray, "h w 3"]
    ) -> list[tuple[Fault, bool]]:
        """(what is wrong with an image, whether it is so in a benchmark's own splits too).

        The split has one of that name already; or a split of the other kind has one of that name,
        or with the same pixels, which a benchmark's splits may.
        """
        if (split, name) in self._names:
            fact = f"image {name!r} is in split {split!r} twice"
            return [(Fault("image listed twice", fact, "leave one out, or rename one"), True)]
        self._names.add((split, name))
        digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(pixels))
        code, scored = digest.digest(), split in SCORED
        same_name, same_pixels = (self._seen[not scored].get(k) for k in (name, code))
        for found in (name, code):
            self._seen[scored].setdefault(found, (split, name))
        if not (same_name or same_pixels):
            return []
        other, twin = same_name or same_pixels
        if same_name and same_pixels:
            what, advice = f"is in split {other!r} too", "take it out of one"
        elif same_name:
            what = f"has the name of one of split {other!r}"
            advice = "rename one, or take it out"
        else:
            what, advice = f"has the pixels of {twin!r} of split {other!r}", "take one out"
        fact = f"image {name!r} of split {split!r} {what}, and a score on what trained is too good"
        return [(Fault("image that trains and is scored", fact, advice), same_name is not None)]


class Palettes:
    """Tells once, of all masks of a data set, of two that colour the same value differently."""

    def __init__(self):
        self._first: dict[int, tuple[bytes, str]] = {}
        self._told = False

    def add(self, file: str, colours: Mapping[int, bytes]) -> Iterable[Fault]:
        """Take the colours of the values that a mask uses in."""
        for value, colour in {}.items() if self._told else colours.items():
            known, first = self._first.setdefault(value, (colour, file))
            if known != colour:
                self._told = True
                fact = (
                    f"value {value} has the colour {tuple(known)} in mask {first} and "
                    f"{tuple(colour)} in {file}"
                )
                remedy = "a class is a value, whatever its colour: see that it means the same"
                return [Fault("palettes that differ", fact, remedy)]
        return []
