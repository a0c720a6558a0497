"""The explorer: one self-contained folder whose index.html opens from disk, without a server.

```
index.html · data/run.js · data/NNN.js (an image's numbers) · images/NNN.jpg
prototypes/ID.png (patch and surroundings) · sources/*.jpg (training images) · nearest/ID.jpg
```

Browsers refuse to read files from a page that lies on disk, so numbers travel as scripts. The page
works them out as the API does: it gets an image's features (or similarities, whichever are fewer)
at its points and interpolates. Numbers that would not fit `_IMAGE_BYTES` are kept in 16 bits, and
if they still do not, of every n-th point only: the page says so, and moves from point to point.
"""

import base64
import dataclasses
import itertools
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from jaxtyping import Float, Int, UInt8

from protoseg_jax import decoding, images, models
from protoseg_jax.data.labels import VOID, LabelSet
from protoseg_jax.errors import UserError
from protoseg_jax.evaluation import part_agreement, reach
from protoseg_jax.explain import mistakes
from protoseg_jax.explain.evidence import point_counts
from protoseg_jax.explain.model import Model, Picture
from protoseg_jax.inference import cell_box
from protoseg_jax.models.prototypes import EPSILON
from protoseg_jax.prototypes import search
from protoseg_jax.prototypes.prune import NEIGHBOURS

_IMAGE_BYTES = 560_000  # an image's numbers; 10 such images and 210 prototypes stay below 15 MB
_IMAGE_SIDE, _SOURCE_SIDE, _NEAREST_SIDE = 1024, 240, 64
_TEMPLATE = Path(__file__).with_name("explorer.html")

Nearest = tuple[UInt8[np.ndarray, "h w 3"], int, str]
"""A patch with its surroundings, its class, and the image it is from."""


@dataclasses.dataclass(frozen=True)
class Standing:
    """What a prototype stands for over a split; None where that was not counted.

    Attributes:
      share: of all points, those that it wins.
      reach: of the images with its class, those that it reaches (`evaluation/reach.py`).
      part: its part, by `part_agreement.standing_for`; None where it stands for none.
    """

    share: float | None = None
    reach: float | None = None
    part: tuple[str, float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Shown:
    """An image on the page, or a tile of one.

    Attributes:
      name: what it is called there.
      image: RGB.
      truth: its labels, or None.
      labels: predicted, at the image's own size.
      features: z at its points.
      similarities: eq. 1 at its points.
      regions: from `mistakes.wrong_regions`, with their "causes" instead of "samples".
    """

    name: str
    image: UInt8[np.ndarray, "H W 3"]
    truth: UInt8[np.ndarray, "H W"] | None
    labels: UInt8[np.ndarray, "H W"]
    features: Float[np.ndarray, "h w d"]
    similarities: Float[np.ndarray, "h w m"]
    regions: list[dict[str, Any]]


def explain_run(workdir: str, split: str, paths: Sequence[str], out: str | None) -> Path:
    """Write a run's explorer page.

    Args:
      workdir: the run's folder.
      split: whose images, evenly chosen, are shown, and over which points won are counted.
      paths: of images to show instead.
      out: the page's folder; None for DIR/explain.

    Returns:
      The page.

    Raises:
      UserError: no run there, it has no prototypes, an image cannot be read, or there are neither
        images nor the data set.
    """
    model = Model.load(workdir)
    model.require_prototypes()
    target = Path(out) if out else model.workdir.path / "explain"
    _check_target(target)
    notes: list[str] = []
    kind = models.kind(model.experiment.config.model)
    if kind == "direction":
        notes.append(
            "Explained post hoc: the network was trained without prototypes and is as it was. Its "
            "logits are taken apart, exactly, into what orthogonal directions of its features add, "
            "and a bias. The patch of a direction is where in the training images it adds most to "
            "its class; that it means something is for you to see."
        )
    given = model.pictures(split, paths) if paths else []  # what cannot be read is told at once
    standings, nearest = [Standing()] * len(model.prototypes), [[]] * len(model.prototypes)
    try:
        data = model.experiment.data
    except UserError as error:
        if not paths:
            raise UserError(f"{error}; or name images with --images=PATH,…") from error
        data = None
        notes.append(
            "The data set is not at hand: what prototypes stand for over a split and their nearest "
            "patches are left out."
        )
    if not model.projected:
        notes.append(
            f"This run has come to phase {model.phase}, before projection: its prototypes are "
            "learnt vectors, not yet patches of training images, so there is nothing to show of "
            "where they come from."
        )
    patches = [p for p in model.prototypes if p.class_ >= 0]
    absent = [p.index for p in patches if model.projected and p.source is None]
    if absent:
        which = f"all {kind}s" if len(absent) == len(patches) else len(absent)
        notes.append(f"The training images of {which} are not with the run; their patches are.")
    shown = [x for picture in given or model.pictures(split) for x in _shown(model, picture)]
    if data:
        standings, nearest = _standings(model, split), _nearest(model)
    facts = [f"phase {model.phase}", f"{len(patches)} {kind}s"]
    facts += [f"{len(model.classes)} classes", "your images" if paths else f"{split} images"]
    scores = {entry["phase"]: entry["miou"] for entry in model.workdir.summary()}
    facts += [f"shares counted over {split}"] if data else []
    if scores.get(model.phase) is not None:
        facts.append(f"validation mIoU {100 * scores[model.phase]:.1f} %")
    write(
        target, model, facts=facts, notes=notes, standings=standings, nearest=nearest, shown=shown
    )
    return target / "index.html"


def _check_target(out: Path) -> None:
    """Refuse to replace a folder that is no page, or to write where one cannot."""
    if out.exists() and not (out / "data" / "run.js").exists() and any(out.iterdir()):
        raise UserError(f"{out} holds something that is no explorer page; name another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror}); name another --out"
        ) from error


def _shown(model: Model, picture: Picture) -> list[Shown]:
    """An image, or each of its tiles, as the page wants it."""
    why = model.explain(picture.image)
    labels, found = why.segmentation.labels, []
    for part in why.parts:
        (top, left), (height, width) = part.corner, part.size
        window = slice(top, top + height), slice(left, left + width)
        truth, regions = None if picture.truth is None else picture.truth[window], []
        if truth is not None:
            regions = mistakes.wrong_regions(labels[window], truth, len(model.classes))
        for region in regions:
            seen = part.at_pixels(model.kernel, *region.pop("samples")).similarities
            region["causes"] = mistakes.causes(seen, model.kernel, region["label"], region["truth"])
        name = picture.name + (f" from ({top}, {left})" if len(why.parts) > 1 else "")
        points = part.points.features, part.points.similarities
        found.append(Shown(name, picture.image[window], truth, labels[window], *points, regions))
    return found


def _standings(model: Model, split: str) -> list[Standing]:
    """What each prototype stands for over a split, in one pass."""
    found = point_counts(model, split, (reach, part_agreement))
    shares = (found["won"] / max(found["won"].sum(), 1)).tolist()
    parts = part_agreement.standing_for(found["part_agreement"], len(shares))
    return list(map(Standing, shares, found["reach"]["prototypes"], parts))


def _nearest(model: Model) -> list[list[Nearest]]:
    """Of each prototype the nearest patches in the projection split."""
    experiment, count = model.experiment, len(model.prototypes)
    patches = search.search(
        experiment,
        model.inference,
        model.checkpoint.variables,
        search.of_any_class,
        search.empty(count, NEIGHBOURS, experiment.config.model.features),
        f"training patches nearest to each {models.kind(experiment.config.model)}",
    )
    examples = experiment.examples(experiment.config.data.projection_split)
    slots = np.argwhere(np.isfinite(patches.squared_distance)).tolist()
    found: dict[tuple[int, int], Nearest] = {}
    in_order = sorted(slots, key=lambda slot: patches.image[*slot])  # each image is read once
    for number, group in itertools.groupby(in_order, key=lambda slot: int(patches.image[*slot])):
        example = examples[number]
        for j, k in group:
            place = int(patches.row[j, k]), int(patches.col[j, k])
            box = cell_box(*place, model.inference.feature_size, example["image"].shape[:2])
            crop, _ = images.crop_with_context(example["image"], box)
            found[j, k] = crop, int(patches.label[j, k]), example["image_id"]
    return [[found[j, k] for k in range(NEIGHBOURS) if (j, k) in found] for j in range(count)]


def write(
    out: Path,
    model: Model,
    *,
    facts: Sequence[str],
    notes: Sequence[str],
    standings: Sequence[Standing],
    nearest: Sequence[Sequence[Nearest]],
    shown: Sequence[Shown],
) -> None:
    """Write the page's folder; one that is there is replaced when the new one is whole.

    Args:
      out: the folder.
      model: the run.
      facts: short ones about the run, for the head of the page.
      notes: what a reader must know (not yet projected, data not at hand …).
      standings: of each prototype.
      nearest: of each prototype, the nearest training patches.
      shown: what can be looked at.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        temporary.chmod(0o755)
        notes, classes = list(notes), model.classes
        config = model.experiment.config.model
        kind = models.kind(config)
        for number, image in enumerate(shown):
            numbers = _numbers(image)
            _script(temporary, f"{number:03d}", f"image({number},", numbers)
            picture = images.encode(images.shrink(image.image, _IMAGE_SIDE), ".jpg", 88)
            _write(temporary / "images" / f"{number:03d}.jpg", picture)
            if numbers["step"] > 1:
                points, step = "×".join(map(str, numbers["points"])), numbers["step"]
                notes.append(
                    f"{points} points an image are too many for this page: it has one in {step} "
                    "in each direction, the layers show those, and the cursor moves from one to "
                    "the next. "
                    + (
                        "The numbers at them are of features in 65,536 steps."
                        if kind == "direction"
                        else "The numbers at them are exact."
                    )
                )
        similarity = "linear" if kind == "direction" else config.similarity
        viridis = 255 * matplotlib.colormaps["viridis"](np.linspace(0, 1, 64))[:, :3]
        record = {
            "title": model.workdir.path.name,
            "facts": list(facts),
            "notes": list(dict.fromkeys(notes)),
            "classes": list(classes.names),
            "colours": _css(classes.colours),
            "prototypeColours": _css(_prototype_colours(model.inference.classes, classes)),
            "viridis": _css(np.rint(viridis).astype(int)),
            "void": VOID,
            "epsilon": EPSILON,
            "kind": kind,
            "similarity": similarity,
            "kernel": _base64(model.kernel, "<f4"),
            "vectors": _base64(model.checkpoint.arrays["params"]["prototypes"]["vectors"], "<f4"),
            "prototypes": _prototypes(temporary, model, standings, nearest),
            "images": [{"name": x.name, "size": list(x.image.shape[:2])} for x in shown],
            "confusions": mistakes.confusions(shown, len(classes)),
        }
        _script(temporary, "run", "run(", record)
        shutil.copyfile(_TEMPLATE, temporary / "index.html")
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _numbers(shown: Shown) -> dict[str, Any]:
    """What the page must know of an image when it is looked at, in a form that fits."""
    few = shown.features.shape[-1] <= shown.similarities.shape[-1]
    values = shown.features if few else shown.similarities
    low, top = float(values.min()), float(values.max())
    scale = (top - low) / 65535 or 1.0
    (h, w, channels), form, step = values.shape, "<f4", 1
    if 4 * values.size > _IMAGE_BYTES:
        form = "<u2"
        while 2 * -(-h // step) * -(-w // step) * channels > _IMAGE_BYTES:
            step += 1
    grid = values[step // 2 :: step, step // 2 :: step]
    return {
        "points": [h, w],
        "grid": list(grid.shape[:2]),
        "step": step,
        "features": few,
        "low": low,
        "scale": scale,
        "bits": 8 * np.dtype(form).itemsize,
        "values": _base64(grid if form == "<f4" else np.rint((grid - low) / scale), form),
        "labels": _runs(shown.labels),
        "truth": None if shown.truth is None else _runs(shown.truth),
    }


def _prototypes(
    folder: Path,
    model: Model,
    standings: Sequence[Standing],
    nearest: Sequence[Sequence[Nearest]],
) -> list[dict[str, Any]]:
    """The prototypes' records, and their pictures as files."""
    written: dict[Path, str] = {}
    records = []
    for p, standing, near in zip(model.prototypes, standings, nearest, strict=True):
        record = {"id": p.index, "class": p.class_, "image": p.image_id, **vars(standing)}
        patch, source = p.patch, p.source
        if patch is not None:
            record["patch"] = f"prototypes/{p.index:03d}.png"
            record["patchBox"] = _shares(p.patch_box, patch.shape[:2])
            record["patchSize"] = list(patch.shape[:2])
            _write(folder / record["patch"], images.encode(patch))
        if source is not None:
            if source not in written:
                image = images.shrink(decoding.decode(source.read_bytes()), _SOURCE_SIDE)
                written[source] = f"sources/{len(written):03d}.jpg"
                _write(folder / written[source], images.encode(image, ".jpg", 74))
            record["source"] = written[source]
            record["sourceBox"] = _shares(p.box, p.source_size)
            record["sourceSize"] = list(p.source_size)
        if near:
            side = (_NEAREST_SIDE, _NEAREST_SIDE)
            strip = [cv2.resize(crop, side, interpolation=cv2.INTER_AREA) for crop, *_ in near]
            picture = images.encode(np.concatenate(strip, 1), ".jpg", 82)
            _write(folder / "nearest" / f"{p.index:03d}.jpg", picture)
            record["nearest"] = [[c, image_id] for _, c, image_id in near]
        records.append(record)
    return records


def _prototype_colours(
    prototype_classes: Int[np.ndarray, " m"], classes: LabelSet
) -> Int[np.ndarray, "m 3"]:
    """A colour of each prototype: shades of its class's, so that lightness tells them apart; grey
    of the bias of directions."""
    colours = np.full((len(prototype_classes), 3), 128)
    for c, base in enumerate(np.array(classes.colours, float)):
        (own,) = np.nonzero(prototype_classes == c)
        place = (np.arange(len(own))[:, None] + 0.5) / max(len(own), 1)  # from dark to light
        dark, light = 0.35 * base, base + 0.75 * (255 - base)
        colours[own] = np.rint(dark + place * (light - dark))
    return colours


def _runs(labels: UInt8[np.ndarray, "H W"]) -> list[int]:
    """Run lengths in row-major order: value, count, value, count …"""
    flat = labels.ravel()
    ends = np.append(np.nonzero(np.diff(flat))[0], len(flat) - 1)
    return np.stack([flat[ends], np.diff(ends, prepend=-1)], 1).ravel().tolist()


def _shares(box: list[int], size: tuple[int, int]) -> list[float]:
    """A box as shares of an image's height and width."""
    return [round(x / size[n % 2], 5) for n, x in enumerate(box)]


def _css(colours: Sequence[Sequence[int]]) -> list[str]:
    return ["#" + "".join(f"{int(x):02x}" for x in colour) for colour in colours]


def _base64(values: np.ndarray, form: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, form).tobytes()).decode()


def _script(folder: Path, name: str, call: str, value: dict[str, Any]) -> None:
    """Numbers as a script that hands them to the page."""
    text = json.dumps(value, separators=(",", ":"))
    _write(folder / "data" / f"{name}.js", f"PROTOSEG.{call}{text});\n".encode())


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
