"""What the pixels of a mask mean: one table for every data set, and its file, `classes.txt`.

```
road<TAB>0, 7, #804080       a class: its name, and where masks are not numbered as the lines are, a
car<TAB>26, #00008e          tab and the mask values (0–65535) and colours that mean it
void<TAB>255, #000000        no class: pixels without a label
```

Without any tab the first line is the mask value 0, the second 1, and so on. `transparent` stands
for pixels whose alpha is 0. Class numbers are those of the lines, void's left out.
"""

import dataclasses
import difflib
import functools
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Int16, UInt8, UInt16

from protoseg_jax import decoding
from protoseg_jax.data.labels import VOID, Colour, LabelSet, generic
from protoseg_jax.data.reading import colours_used, text_in
from protoseg_jax.errors import Fault, UserError

TRANSPARENT = "transparent"
_UNKNOWN = -1
_COLOUR = re.compile(r"#[0-9a-f]{6}", re.IGNORECASE)
_NO_TAB = re.compile(r"#[0-9a-f]{6}\b|\s{2,}\d+(\s*,\s*\d+)*$", re.IGNORECASE)
# Lines that end, and that begin, with numbers.
_NUMBERED = (re.compile(r"(.*\S)[\s,;:=]+\d+"), re.compile(r"\d+[\s,;:=]+(\S.*)"))
_NAMED = 3  # colours that a message counts

_ADVICE = (
    "correct the mask, or write the {what} after a tab on the line of its class, or of void, in "
    "classes.txt"
)
_BLURRED = "mask that looks antialiased"
_SHARP = (
    "draw or export masks without antialiasing, and resize them by nearest neighbour (edges that "
    "are blurred hold values that are no class)"
)


@dataclasses.dataclass(frozen=True)
class MaskTable:
    """The label of each mask value and colour.

    Attributes:
      names: of the classes 0..C−1.
      values: mask value, 0–65535 → class number or VOID.
      colours: 0xRRGGBB → class number or VOID.
      transparent: class number or VOID of pixels whose alpha is 0; None: there are none.
      advice: what to do about a mask that it does not fit; "{what}" is value or colour.
    """

    names: tuple[str, ...]
    values: Mapping[int, int] = dataclasses.field(default_factory=dict)
    colours: Mapping[int, int] = dataclasses.field(default_factory=dict)
    transparent: int | None = None
    advice: str = "correct the mask"

    @property
    def is_plain(self) -> bool:
        """Whether masks hold the classes' own numbers."""
        own = {value: label for value, label in self.values.items() if label != VOID}
        others = self.colours or self.transparent is not None
        return own == {n: n for n in range(len(self.names))} and not others

    def labels(
        self, mask: decoding.Mask, where: object
    ) -> tuple[UInt8[np.ndarray, "h w"], dict[str, int]]:
        """(the class of each pixel of a mask, and VOID; pixels by the value or colour they have).

        Grey and indexed masks go by their values; by the grey, or the palette's colour, where the
        table has colours alone. Masks in colour go by colours; by values if every pixel is grey and
        the table has no colours.

        Raises:
          Fault: a value or colour is in no line, or pixels are partly transparent; `where` names
            the mask.
        """
        mask = self._without_idle_alpha(mask)
        self._check_palette(mask, where)
        if mask.values.ndim == 3:
            meanings = self._of_rgb(mask.values, mask.opacity, where)
        elif self.values:
            meanings = self._of_values(mask, where)
        else:
            meanings = self._of_rgb(_in_colour(mask, where), mask.opacity, where)
        if mask.opacity is not None:
            meanings = self._clear(meanings, mask.opacity, where)
        names, labels = zip(*self._meanings, strict=True)
        counts = np.bincount(meanings.ravel(), minlength=len(names)).tolist()
        found = {name: count for name, count in zip(names, counts, strict=True) if count}
        return np.array(labels, np.uint8)[meanings], found

    @functools.cached_property
    def _meanings(self) -> list[tuple[str, int]]:
        """(value, colour or "transparent" as text; label): what a table below gives numbers of."""
        meanings = [(str(value), label) for value, label in self.values.items()]
        meanings += [(f"#{code:06x}", label) for code, label in self.colours.items()]
        return [*meanings, (TRANSPARENT, self.transparent or 0)]

    def _without_idle_alpha(self, mask: decoding.Mask) -> decoding.Mask:
        """An index means what it does, transparent or not, unless the table says otherwise."""
        idle = mask.palette and self.values and self.transparent is None
        return mask._replace(opacity=None) if idle else mask

    def _check_palette(self, mask: decoding.Mask, where: object) -> None:
        """Refuse an index of a class whose palette has the colour of another class."""
        if not (mask.palette and self.values and self.colours):
            return
        for value, colour in colours_used(mask).items():
            code = int.from_bytes(colour, "big")
            shown, meant = self.colours.get(code, VOID), self.values.get(value, VOID)
            if VOID not in (shown, meant) and shown != meant:
                raise Fault(
                    "palette that contradicts the classes",
                    f"mask {where} shows its value {value} in the colour #{code:06x}, and classes "
                    "have these the other way",
                    "leave out the values or the colours in classes.txt, whichever is not meant",
                )

    def _of_values(self, mask: decoding.Mask, where: object) -> Int16[np.ndarray, "h w"]:
        values, table = mask.values, self._by_value
        if mask.bits == 1 and 1 not in self.values and self.values.get(255, VOID) != VOID:
            values = np.where(values, 255, 0)  # white
        found = table[values]
        strange = _visible(found == _UNKNOWN, mask.opacity)
        if strange.any():
            raise self._fault("value", values, strange, where)
        return found

    def _of_rgb(
        self, rgb: UInt8[np.ndarray, "h w 3"], opacity: np.ndarray | None, where: object
    ) -> Int16[np.ndarray, "h w"]:
        grey = (rgb == rgb[..., :1]).all()
        if not self.colours and grey:
            return self._of_values(decoding.Mask(rgb[..., 0], opacity=opacity), where)
        codes = _codes(rgb)
        if not self.colours:
            codes = codes[_visible(np.ones(codes.shape, bool), opacity)]
            raise Fault(
                "mask in colour",
                f"mask {where} is in colour ({_counted(codes)}), and classes have no colours",
                self.advice.format(what="colour"),
            )
        found = self._by_colour[codes]
        strange = _visible(found == _UNKNOWN, opacity)
        if strange.any():
            raise self._fault("colour", codes, strange, where)
        return found

    def _clear(
        self, meanings: np.ndarray, opacity: UInt8[np.ndarray, "h w"], where: object
    ) -> Int16[np.ndarray, "h w"]:
        """Meanings, and that of the transparent pixels."""
        partly = int(((opacity > 0) & (opacity < 255)).sum())
        if partly:
            raise Fault(
                _BLURRED,
                f"mask {where} has {partly} pixels that are partly transparent",
                "save it without antialiasing",
            )
        clear = opacity == 0
        if clear.any() and self.transparent is None:
            raise Fault(
                "mask with transparent pixels",
                f"mask {where} has {int(clear.sum())} transparent pixels, whose class is not known",
                self.advice.format(what=f"word {TRANSPARENT}"),
            )
        return np.where(clear, np.int16(len(self._meanings) - 1), meanings)

    @functools.cached_property
    def _by_value(self) -> Int16[np.ndarray, " 65536"]:
        return _table(self.values, 2**16, 0)

    @functools.cached_property
    def _by_colour(self) -> Int16[np.ndarray, " 16777216"]:
        return _table(self.colours, 2**24, len(self.values))

    def _strange_value(self, value: int) -> tuple[str, str]:
        """(a value as it is written, why it is strange)."""
        of_classes = [v for v, label in self.values.items() if label != VOID]
        of_void = [v for v, label in self.values.items() if label == VOID]
        known = f"neither a class ({_ranges(of_classes)}) nor void ({_ranges(of_void)})"
        return str(value), known

    def _strange_colour(self, code: int) -> tuple[str, str]:
        """(a colour as it is written, why it is strange)."""
        nearest, distance = self.nearest(code)
        label = self.colours[nearest]
        name = "void" if label == VOID else repr(self.names[label])
        known = f"no class's (the nearest is #{nearest:06x} of {name}, {distance:.0f} away)"
        return f"#{code:06x}", known

    def _fault(self, what: str, values: np.ndarray, strange: np.ndarray, where: object) -> Fault:
        """That a mask holds values, or colours, that are in no line."""
        counted = _most(values[strange])
        most, count = counted[0]
        told = {"value": self._strange_value, "colour": self._strange_colour}[what]
        shown, known = told(most)
        fact = (
            f"mask {where} holds the {what} {shown} ({count} pixels)"
            f"{_and_more(counted[1:], what)}, which is {known}"
        )
        if _looks_blurred(counted, values, strange):
            return Fault(_BLURRED, fact, _SHARP)
        return Fault(f"mask {what} that is no class", fact, self.advice.format(what=what))

    def nearest(self, code: int) -> tuple[int, float]:
        """(the colour of the table that is nearest to another, their distance in RGB)."""
        known = np.array(list(self.colours), np.int64)
        distances = np.linalg.norm(_channels(known) - _channels(np.array([code])), axis=1)
        best = int(distances.argmin())
        return int(known[best]), float(distances[best])


def numbered(
    names: Sequence[str],
    values: Iterable[int | Collection[int]] | None = None,
    void: Collection[int] = (VOID,),
    advice: str = "correct the mask",
) -> MaskTable:
    """A table of values alone.

    Args:
      names: of the classes.
      values: each class's, one or several; by default its number.
      void: those without a class, unless a class has them.
      advice: see `MaskTable`.
    """
    table = dict.fromkeys(void, VOID)
    for label, own in enumerate(range(len(names)) if values is None else values):
        table.update(dict.fromkeys([own] if isinstance(own, int) else own, label))
    return MaskTable(tuple(names), dict(sorted(table.items())), advice=advice)


def coloured(table: MaskTable, colours: Sequence[Colour], void: Collection[Colour]) -> MaskTable:
    """A table with a colour for each class too, and those without a class."""
    codes = {_code(colour): VOID for colour in void}
    codes.update({_code(colour): label for label, colour in enumerate(colours)})
    return dataclasses.replace(table, colours=codes)


def read_classes(path: Path, void: int = VOID) -> tuple[LabelSet, MaskTable]:
    """The classes that a `classes.txt` names, and what the pixels of masks mean.

    Where every class has a colour, these are the colours that it is shown in.

    Args:
      path: the file.
      void: the mask value without a class, where no line says any and no class has it.

    Raises:
      UserError: it is not there, names fewer than two classes or more than 255, a class, value or
        colour twice, or is of another form.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; write one class name a line, class 0 first")
    text = unicodedata.normalize("NFC", text_in(path))
    rows = [(n, row.rstrip(" \r")) for n, row in enumerate(text.splitlines(), 1) if row.strip()]
    _check_form([row for _, row in rows], path)
    lines = [_Line.of(row, path, n) for n, row in rows]
    named = [line for line in lines if not line.void]
    names = [line.name for line in named]
    if len(names) < 2:
        raise UserError(f"{path} must name at least two classes, one a line")
    for number, name in enumerate(names):
        if name in names[:number]:
            raise UserError(f"{path} names the class {name!r} twice; each may stand once")
    if len(names) > VOID:
        raise UserError(f"{path} names {len(names)} classes; {VOID} is the most")
    if not any(line.tokens for line in lines):
        plain = numbered(names, void=[void], advice=_ADVICE)
        return generic(names), plain
    bare = [line.name for line in lines if not line.tokens]
    if bare:
        raise UserError(
            f"{path} says mask values of some classes, but none of {bare[0]!r}; write a tab and "
            "them after every name, or after none"
        )
    return _with_tokens(path, lines, names, void)


def _check_form(rows: Sequence[str], path: Path) -> None:
    """Refuse what is no list of names, but was meant to say more.

    Raises:
      UserError: a comment, values without tabs, or a colour as three numbers.
    """
    form = "write NAME<tab>VALUE, #rrggbb, … in each line"
    for row in rows:
        if row.startswith("#"):
            raise UserError(f"{path} begins a line with '#': {row!r}; {form}, and no comments")
    if not any("\t" in row for row in rows):
        ends, starts = ([pattern.fullmatch(row) for row in rows] for pattern in _NUMBERED)
        # "class 1", "class 2" are names; "road 1", "car 2" are more.
        several = all(ends) and len({match[1] for match in ends}) > 1
        if rows and (several or all(starts)):
            raise UserError(f"{path} has a number in every line, but no tab: {rows[0]!r}; {form}")
    values = [row.partition("\t")[2].split(",") for row in rows]
    if rows and all(len(of) == 3 and all(v.strip().isdecimal() for v in of) for of in values):
        raise UserError(
            f"{path} gives every class three numbers, as of a colour; write colours as #rrggbb"
        )


def _with_tokens(
    path: Path, lines: Sequence["_Line"], names: list[str], void: int
) -> tuple[LabelSet, MaskTable]:
    owner: dict[int | str, str] = {}
    label_of: dict[int | str, int] = {}
    for line in lines:
        for token in line.tokens:
            if token in owner:
                shown = f"{token}" if isinstance(token, int) else repr(token)
                raise UserError(
                    f"{path} gives {shown} to {owner[token]!r} and to {line.name!r}; it can mean "
                    "one of them"
                )
            owner[token] = line.name
            label_of[token] = VOID if line.void else names.index(line.name)
    values = {token: label for token, label in label_of.items() if isinstance(token, int)}
    colours = {
        int(token[1:], 16): label
        for token, label in label_of.items()
        if isinstance(token, str) and token != TRANSPARENT
    }
    if values and not any(line.void for line in lines):
        values.setdefault(void, VOID)
    table = MaskTable(
        tuple(names),
        dict(sorted(values.items())),
        dict(sorted(colours.items())),
        label_of.get(TRANSPARENT),
        _ADVICE,
    )
    shown = [
        next((int(t[1:], 16) for t in line.tokens if isinstance(t, str) and t[0] == "#"), None)
        for line in lines
        if not line.void
    ]
    if None in shown:
        return generic(names), table
    return LabelSet(tuple(names), tuple(tuple(c.to_bytes(3, "big")) for c in shown)), table


@dataclasses.dataclass(frozen=True)
class _Line:
    """A line of classes.txt: a name, and the values and colours ("#rrggbb") that mean it."""

    name: str
    tokens: tuple[int | str, ...]

    @property
    def void(self) -> bool:
        """Whether it says what has no class; a plain line "void" is a class."""
        return bool(self.tokens) and self.name.lower() == "void"

    @classmethod
    def of(cls, text: str, path: Path, number: int) -> "_Line":
        where = f"{path}, line {number}"
        name, tab, rest = text.partition("\t")
        if not tab and _NO_TAB.search(name):
            raise UserError(
                f"{where}, has no tab: {name!r}; put one between the name and what means it"
            )
        if not name.strip() or (tab and not rest.strip()):
            missing = "name before" if rest.strip() else "value or colour after"
            raise UserError(f"{where}, has no {missing} its tab; write NAME<tab>VALUE, …")
        tokens = [_token(token.strip(), where) for token in rest.split(",")] if tab else []
        return cls(name.strip(), tuple(dict.fromkeys(tokens)))


def _token(text: str, where: str) -> int | str:
    """A mask value, "#rrggbb" or "transparent"."""
    text = text.lower()
    if text == TRANSPARENT or _COLOUR.fullmatch(text):
        return text
    if text.isascii() and text.isdigit() and len(text) <= 5 and int(text) < 2**16:
        return int(text)
    near = difflib.get_close_matches(text, [TRANSPARENT], cutoff=0.7)
    raise UserError(
        f"{where}: {text!r} is neither a mask value (0–65535), a colour (#rrggbb) nor the word "
        f"{TRANSPARENT}" + (f"; {near[0]} is probably meant" if near else "; correct it")
    )


def _table(known: Collection[int], size: int, first: int) -> Int16[np.ndarray, " n"]:
    """Numbers of what is known, from `first` on, among all of a size."""
    table = np.full(size, _UNKNOWN, np.int16)
    if known:
        table[list(known)] = np.arange(first, first + len(known))
    return table


def _in_colour(mask: decoding.Mask, where: object) -> UInt8[np.ndarray, "h w 3"]:
    """A grey or indexed mask's colours."""
    if mask.palette:
        palette = np.zeros((256, 3), np.uint8)
        known = np.frombuffer(mask.palette, np.uint8).reshape(-1, 3)[:256]
        if mask.values.max(initial=0) >= len(known):
            raise Fault(
                "mask with a short palette",
                f"mask {where} holds the index {mask.values.max()}, and its palette has "
                f"{len(known)} colours",
                "save it again",
            )
        palette[: len(known)] = known
        return palette[mask.values]
    values = mask.values
    if mask.bits == 1:
        values = (255 * (values > 0)).astype(np.uint8)
    if values.dtype != np.uint8:
        raise Fault(
            "mask of 16 bits",
            f"mask {where} is grey with 16 bits, and classes have colours alone",
            "give each class its mask values too",
        )
    return np.repeat(values[..., None], 3, 2)


def _visible(where: np.ndarray, opacity: np.ndarray | None) -> np.ndarray:
    """Pixels that are also not transparent."""
    return where if opacity is None else where & (opacity > 0)


def _code(colour: Colour) -> int:
    return int.from_bytes(bytes(colour), "big")


def _codes(rgb: UInt8[np.ndarray, "h w 3"]) -> np.ndarray:
    """0xRRGGBB of each pixel."""
    red, green, blue = (rgb[..., channel].astype(np.uint32) for channel in range(3))
    return red << 16 | green << 8 | blue


def _channels(codes: np.ndarray) -> np.ndarray:
    return np.stack([codes >> shift & 255 for shift in (16, 8, 0)], -1).astype(np.float64)


def _looks_blurred(
    counted: Sequence[tuple[int, int]], values: np.ndarray, strange: np.ndarray
) -> bool:
    """Whether strange values are many, and nowhere areas, as blurred edges are."""
    if len(counted) < 5:
        return False
    values, square = values.astype(np.float32), np.ones((3, 3), np.uint8)  # exact below 2²⁴
    inside = cv2.erode(values, square) == cv2.dilate(values, square)
    return inside[strange].mean() < 0.2


def _most(found: UInt16[np.ndarray, " n"]) -> list[tuple[int, int]]:
    """(value, how often), the most frequent first."""
    values, counts = np.unique(found, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [(int(values[n]), int(counts[n])) for n in order]


def _counted(codes: np.ndarray) -> str:
    found = _most(codes)
    shown = ", ".join(f"#{code:06x} {count} pixels" for code, count in found[:_NAMED])
    return shown + (f", and {len(found) - _NAMED} more" if len(found) > _NAMED else "")


def _and_more(counted: Sequence[tuple[int, int]], what: str) -> str:
    if not counted:
        return ""
    pixels = sum(count for _, count in counted)
    return f" and {len(counted)} more {what}{'s' * (len(counted) > 1)} ({pixels} pixels)"


def _ranges(values: Collection[int]) -> str:
    """Numbers as "0–3, 7"; "none"."""
    parts: list[list[int]] = []
    for value in sorted(values):
        if parts and value == parts[-1][-1] + 1:
            parts[-1][1:] = [value]
        else:
            parts.append([value])
    return ", ".join("–".join(map(str, part)) for part in parts) or "none"
