"""Everything that is wrong or doubtful in a data set at once, and a sheet of its masks."""

import collections
import concurrent.futures
import dataclasses
import itertools
import os
from collections.abc import Iterator

import cv2
import ml_collections
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from protoseg_jax.data import prepare
from protoseg_jax.data.findings import Findings
from protoseg_jax.data.labels import VOID, LabelSet
from protoseg_jax.data.reading import Reading
from protoseg_jax.errors import UserError, printable
from protoseg_jax.images import resize_labels, shrink
from protoseg_jax.progress import Progress

_AHEAD = 8  # examples that are read while one is looked at
_SHEET = 40  # examples on it, at most
_COLUMNS, _CELL, _CAPTION = 5, 256, 18
_VALUES = 24  # mask values that are told
_STRENGTH = 0.55  # of a mask's colours over its image


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
      findings: all of it.
      lines: for a person.
      sheet: some examples under their masks, RGB; None where there are none.
    """

    findings: Findings
    lines: list[str]
    sheet: UInt8[np.ndarray, "h w 3"] | None


def check(config: ml_collections.ConfigDict) -> Report:
    """Look at every file of a config's data set, and prepare nothing.

    Raises:
      UserError: the data set cannot be opened at all.
    """
    dataset = prepare.open_files(config)
    findings, cells = prepare.findings_of(dataset), []
    total = sum(map(len, dataset.splits.values()))
    shown = {n * total // _SHEET for n in range(_SHEET)}
    with Progress(f"checking {dataset.name}", total, 0, "image", brief=True) as progress:
        for number, (split, found) in enumerate(_examples(dataset, Reading.of(config))):
            if isinstance(found, UserError):
                findings.fault(found)
            else:
                findings.add(split, found)
                if number in shown:
                    cells.append(_cell(f"{split}: {found.image_id}", found, dataset.labels))
            progress.update(1)
    findings.finish(config.data.train_split, dataset.void)
    sheet = _sheet(cells, dataset.labels) if cells else None
    lines = [*_summary(dataset, findings), *findings.lines()]
    return Report(findings, [printable(line) for line in lines], sheet)


def _examples(
    dataset: prepare.DataSet, reading: Reading
) -> Iterator[tuple[str, prepare.Example | UserError]]:
    """(split, example or what is wrong with it) of all, in order, read by several threads."""

    def read(split: str, item: object) -> tuple[str, prepare.Example | UserError]:
        try:
            return split, prepare.read(dataset, split, item, reading)
        except UserError as error:
            return split, error

    items = iter([(split, item) for split, of in dataset.splits.items() for item in of])
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = collections.deque(pool.submit(read, *x) for x in itertools.islice(items, _AHEAD))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(read, *item) for item in itertools.islice(items, 1))


# -- in words ------------------------------------------------------------------------------------


def _summary(dataset: prepare.DataSet, findings: Findings) -> list[str]:
    """What the splits hold, as tables."""
    splits = findings.splits
    images = sum(split.images for split in splits.values())
    lines = [f"{dataset.name}: {images} images with masks that can be read", ""]
    if not images:
        return lines
    rows = [["split", "images", "smallest", "largest", "labelled"]]
    for name, split in splits.items():
        sizes = [f"{h}×{w}" for h, w in (split.smallest, split.largest)]
        labelled = 1 - split.pixels[VOID] / max(split.pixels.sum(), 1)
        rows.append([name, str(split.images), *sizes, f"{100 * labelled:.0f} %"])
    lines += [*_table(rows), ""]
    heads = [head for name in splits for head in (f"{name} pixels", "images")]
    rows = [["class", *heads]]
    for label, name in [*enumerate(dataset.labels.names), (VOID, "(void)")]:
        cells = []
        for split in splits.values():
            share = split.pixels[label] / max(split.pixels.sum(), 1)
            cells += [_percent(share), str(split.images_with[label])]
        rows.append([name, *cells])
    lines += [*_table(rows), ""]
    if findings.values:
        total = sum(findings.values.values())
        told = [f"{v} {_percent(n / total)}" for v, n in findings.values.most_common(_VALUES)]
        more = f", and {len(findings.values) - _VALUES} more" * (len(findings.values) > _VALUES)
        lines += [f"mask values: {', '.join(told)}{more}", ""]
    return lines


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if not 0 < share < 1e-3 else "< 0.1 %"


def _table(rows: list[list[str]]) -> list[str]:
    """Columns of equal width, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if n else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


# -- as a picture --------------------------------------------------------------------------------


def _cell(caption: str, example: prepare.Example, labels: LabelSet) -> Image.Image:
    """An image under the colours of its mask, void left clear, with a caption."""
    image = shrink(example.pixels, _CELL)
    label = resize_labels(example.label, image.shape[:2])
    mixed = cv2.addWeighted(image, 1 - _STRENGTH, labels.paint(label), _STRENGTH, 0)
    mixed[label == VOID] = image[label == VOID]
    cell = Image.new("RGB", (_CELL, image.shape[0] + _CAPTION), "white")
    cell.paste(Image.fromarray(mixed), (0, _CAPTION))
    font = ImageFont.load_default(11)
    while font.getlength(caption) > _CELL and len(caption) > 4:
        caption = f"…{caption[2:]}"
    ImageDraw.Draw(cell).text((1, 1), caption, "black", font)
    return cell


def _sheet(cells: list[Image.Image], labels: LabelSet) -> UInt8[np.ndarray, "h w 3"]:
    """All cells in rows, and the classes' colours below."""
    gap = 6
    rows = [cells[n : n + _COLUMNS] for n in range(0, len(cells), _COLUMNS)]
    width = (_CELL + gap) * max(map(len, rows)) + gap
    legend = Image.fromarray(labels.legend(width))
    heights = [max(cell.height for cell in row) + gap for row in rows]
    size = max(width, legend.width), sum(heights) + legend.height + gap
    picture = Image.new("RGB", size, "white")
    top = gap
    for row, height in zip(rows, heights, strict=True):
        for n, cell in enumerate(row):
            picture.paste(cell, (gap + n * (_CELL + gap), top))
        top += height
    picture.paste(legend, (0, top))
    return np.array(picture)
