"""Figures as text: a run's stages, classes, changes and measures; the paper's Tables 1–4 and ours.

For the paper's tables a run counts for the row that its config is (data set, weights, λ_J, head) if
it follows the paper's recipe; what does not is named below them. Several runs of a row give mean ±
sample deviation; rows without a finished run say "not run". All is per cent, on validation unless a
column says test.
"""

import dataclasses
import functools
import json
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from protoseg_jax.errors import UserError
from protoseg_jax.evaluation import measures, overlap, segmentation
from protoseg_jax.files import read_json
from protoseg_jax.models import readers
from protoseg_jax.run.phases import DIRECTIONS
from protoseg_jax.run.workdir import FREE_KEYS, Workdir, flat


def percent(value: float | None, form: str = "{:.2f}") -> str:
    """A fraction in per cent; a dash for None."""
    return "–" if value is None else form.format(100 * value)


def stage_table(summary: list[dict[str, Any]]) -> str:
    """Table 3's form: stage, prototypes, mIoU, error, overlap, time; figures in per cent."""
    rows = [("stage", "prototypes", "mIoU %", "error %", "overlap %", "time")]
    for entry in summary:
        minutes, seconds = divmod(round(entry["seconds"]), 60)
        count = entry["num_prototypes"]
        figures = (percent(entry[k]) for k in ("miou", "pixel_error", "overlap"))
        time = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
        rows.append((entry["phase"], "–" if count is None else str(count), *figures, time))
    return _aligned(rows)


def class_table(scores: dict[str, Any], names: Sequence[str]) -> str:
    """IoU of each class and the pooled figures, in per cent."""
    titles = (*segmentation.TITLES, *overlap.TITLES)
    rows = [("class", "IoU %")]
    rows += [(name, percent(scores["iou"][name])) for name in names]
    rows += [(title, percent(scores[key])) for key, title, _ in titles if key in scores]
    return _aligned(rows)


def change_table(before: dict[str, Any], after: dict[str, Any], names: Sequence[str]) -> str:
    """IoU of each class, mean and pixel accuracy before and after a change, in per cent."""
    values = list(zip(names, before["iou"], after["iou"], strict=True))
    values += [(title, before[key], after[key]) for key, title, _ in segmentation.TITLES[:2]]
    rows = [("class", "before %", "after %", "change")]
    for name, old, new in values:
        change = None if old is None or new is None else new - old
        rows.append((name, percent(old), percent(new), percent(change, "{:+.2f}")))
    return _aligned(rows)


def measure_lines(found: dict[str, Any], names: Iterable[str]) -> list[str]:
    """The figures that there are of the measures of these names, a line each."""
    figures = ((title, figure(found, key), factor) for key, title, factor in titles(names))
    return [
        f"{title}  " + (f"{100 * value:.2f} %" if factor == 100 else f"{value:.4g}")
        for title, value, factor in figures
        if value is not None
    ]


def titles(names: Iterable[str]) -> list[tuple[str, str, int]]:
    """(key, name, factor) of all figures of the measures of these names."""
    return [title for module in measures.modules(names) for title in module.TITLES]


def figure(found: dict[str, Any], key: str) -> float | None:
    """A figure by its key, "outer.inner" of one inside another; None where there is none."""
    for name in key.split("."):
        found = (found or {}).get(name)
    return found


def measures_in(scores: dict[str, Any]) -> dict[str, Any]:
    """The measures in what `score_run` has written, as they are defined now.

    Consistency without its controls, and the stability beside it, are of an older definition.
    """
    found = dict(scores.get("interpretability") or {})
    if "consistency" in found and "consistency_position" not in found:
        found = {k: v for k, v in found.items() if k not in ("consistency", "stability")}
    return found


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("─" * width for width in widths))
    return "\n".join(
        "  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])])
        for first, *rest in rows
    )


# -- the paper's tables ------------------------------------------------------------------------

NOT_RUN = "not run"
_SETS = {"voc": "Pascal VOC 2012", "cityscapes": "Cityscapes", "isbi_em": "EM (ISBI 2012)"}
_LAST = "finetune_pruned"

# Title, head, and the lines with the paper's figures, each with the data set, kind of run and phase
# that ours are of. Where the head begins with the data, so does a line, by `tables`.
TABLES = (
    (
        "Table 1: mIoU",
        "data | model | paper, validation | paper, test | ours, validation",
        ("voc", "deeplab", "joint", "DeepLabv2 (with CRF) | 77.69 | 79.70 | {miou}"),
        ("voc", "imagenet", _LAST, "ProtoSeg, ImageNet | 72.05 | 72.92 | {miou}"),
        ("voc", "coco", _LAST, "ProtoSeg, COCO | 67.98 | 68.71 | {miou}"),
        ("cityscapes", "deeplab", "joint", "DeepLabv2 | 71.40 | 70.40 | {miou}"),
        ("cityscapes", "imagenet", _LAST, "ProtoSeg, ImageNet | 67.23 | 67.04 | {miou}"),
        ("cityscapes", "coco", _LAST, "ProtoSeg, COCO | 55.35 | 56.77 | {miou}"),
    ),
    (
        "Table 2: the diversity loss",
        "data | λ_J | paper: overlap | ours: overlap | paper: mIoU | ours: mIoU",
        ("voc", "no_diversity", _LAST, "0 | 48.16 | {overlap} | 69.60 | {miou}"),
        ("voc", "imagenet", _LAST, "0.25 | 26.59 | {overlap} | 72.05 | {miou}"),
        ("cityscapes", "no_diversity", _LAST, "0 | 57.99 | {overlap} | 61.60 | {miou}"),
        ("cityscapes", "imagenet", _LAST, "0.25 | 24.09 | {overlap} | 67.23 | {miou}"),
    ),
    (
        "Table 3: the stages",
        "data | paper's stage | our phase | prototypes | ours | paper: mIoU | ours: mIoU",
        ("voc", "imagenet", "warmup", "warm-up | {phase} | 210 | {m} | 25.65 | {miou}"),
        ("voc", "imagenet", "joint", "joint | {phase} | 210 | {m} | 68.24 | {miou}"),
        ("voc", "imagenet", "finetune", "projection | {phase} | 201 | {m} | 72.00 | {miou}"),
        ("voc", "imagenet", _LAST, "pruning | {phase} | 133 | {m} | 72.05 | {miou}"),
        ("cityscapes", "imagenet", "warmup", "warm-up | {phase} | 190 | {m} | 31.45 | {miou}"),
        ("cityscapes", "imagenet", "joint", "joint | {phase} | 190 | {m} | 65.38 | {miou}"),
        ("cityscapes", "imagenet", "finetune", "projection | {phase} | 188 | {m} | 67.24 | {miou}"),
        ("cityscapes", "imagenet", _LAST, "pruning | {phase} | 128 | {m} | 67.23 | {miou}"),
    ),
    (
        "Table 4: EM",
        "model | paper: mIoU | ours: mIoU | paper: error | ours: 1 − F of inside",
        ("isbi_em", "deeplab", "joint", "U-Net | 78.74 | {miou} | 5.37 | {f_error}"),
        ("isbi_em", "imagenet", _LAST, "ProtoSeg (U-Net) | 76.58 | {miou} | 5.40 | {f_error}"),
    ),
)

# Without the recipe a figure cannot stand beside the paper's: section 4's for Pascal and
# Cityscapes; for EM, whose supplement is missing, a follow-up's.
_DEEPLAB = {
    "batch_size": 10,
    "model.depth": 101,
    "model.features": 64,
    "model.prototypes_per_class": 10,
    "phases.warmup.steps": 30_000,
    "phases.joint.steps": 30_000,
    "phases.finetune.steps": 2_000,
    "phases.finetune_pruned.steps": 2_000,
    "loss.assignment": 0.0,
}
_UNET = {
    "batch_size": 2,
    "crop_size": [512, 512],
    "model.backbone": "unet",
    "model.depth": 4,
    "model.width": 64,
    "model.features": 64,
    "model.prototypes_per_class": 10,
    "phases.joint.steps": 10_000,
    "phases.finetune.steps": 10_000,
    "phases.finetune_pruned.steps": 10_000,
    "loss.assignment": 0.0,
}
_RECIPES = {"voc": _DEEPLAB, "cityscapes": _DEEPLAB, "isbi_em": _UNET}


@dataclasses.dataclass(frozen=True)
class Run:
    """What the tables need of a run: config.json with every key, the entries of summary.json by
    phase, the measures on validation by phase, where they were taken; the folder's name, and the
    prototypes that were removed by hand."""

    config: dict[str, Any]
    phases: dict[str, dict[str, Any]]
    measures: dict[str, dict[str, Any]]
    name: str = ""
    removed: tuple[int, ...] = ()

    @property
    def last(self) -> str:
        """The phase that its explanations are measured after."""
        return DIRECTIONS if self.config["model"]["head"] == "directions" else _LAST

    @property
    def deviations(self) -> list[str]:
        """How the config departs from the paper's recipe."""
        name, start = self.config["data"]["name"], self.config["pretrained"]["path"]
        found = []
        for key, wanted in _RECIPES.get(name, {}).items():
            value = functools.reduce(lambda section, k: section[k], key.split("."), self.config)
            if value != wanted:
                found.append(f"{key} is {value}, not {wanted}")
        if name in ("voc", "cityscapes") and not start:
            found.append("no pretrained weights")
        if start and not readers.is_weights(start):
            found.append(f"it started from run {start}")
        return found

    @property
    def row(self) -> tuple[str, str]:
        """(data set, kind): "imagenet", "coco", "no_diversity", "deeplab"; "other" for the rest."""
        model, diversity = self.config["model"], self.config["loss"]["diversity"]
        kind = "coco" if model["preprocessing"] == "caffe" else "imagenet"
        if diversity != 0.25:
            kind = "other" if diversity else "no_diversity"
        if model["head"] == "linear":
            kind = "deeplab"
        return self.config["data"]["name"], "other" if self.deviations else kind


def read(folder: str) -> Run:
    """A run by its folder.

    Raises:
      UserError: it holds no run.
    """
    workdir, taken = Workdir.existing(folder), {}
    for path in (workdir.path / "eval").glob("validation-*.json"):
        scores = read_json(path)
        if "interpretability" in scores and not scores.get("flips"):
            taken[scores["phase"]] = measures_in(scores)
    phases = {entry["phase"]: entry for entry in workdir.summary()}
    removed = tuple(read_json(workdir.path / "removed.json", {}).get("removed", ()))
    config = json.loads(workdir.config().to_json())
    return Run(config, phases, taken, workdir.path.name, removed)


def mean_deviation(
    values: Iterable[float | None], scale: float = 100.0, digits: int = 2, none: str = NOT_RUN
) -> str:
    """Mean ± sample deviation of the values that there are, times a factor; or `none`."""
    values = [scale * v for v in values if v is not None]
    if not values:
        return none
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def tables(runs: Sequence[Run]) -> str:
    """Tables 1–4 as Markdown, and one of measures if any run has some."""
    texts = []
    for title, head, *rows in TABLES:
        lines = []
        for name, kind, phase, line in rows:
            scores = [run.phases.get(phase, {}) for run in runs if run.row == (name, kind)]
            ours = {
                key: mean_deviation(found.get(key) for found in scores)
                for key in ("miou", "overlap", "f_error")
            }
            count = mean_deviation((x.get("num_prototypes") for x in scores), 1.0, 0)
            line = line.format(phase=f"`{phase}`", m=count, **ours)
            lines.append(f"{_SETS[name]} | {line}" if head.startswith("data") else line)
        texts.append(_markdown(title, head, lines))
    note = (
        "The paper's projection and pruning rows are scores after their fine-tunings, hence our "
        "phases beside them. Its Table 4 error can only be 1 − F."
    )
    return "\n\n".join([*texts, note, *_measures(runs)])


def _markdown(title: str, head: str, lines: Iterable[str]) -> str:
    rule = "--- | " * head.count(" | ") + "---"
    return "\n".join([f"## {title}", "", *(f"| {x} |" for x in (head, rule, *lines))])


def _measures(runs: Sequence[Run]) -> list[str]:
    """The table of measures after the last phase, a column for runs that differ in the seed alone;
    none without any."""
    measured = [run for run in runs if run.last in run.measures]
    alike: dict[str, list[Run]] = {}
    for run in measured:
        alike.setdefault(_but_for_its_seed(run), []).append(run)
    if not alike:
        return []
    heads = [_head(found[0]) for found in alike.values()]
    columns = []
    for head, found in zip(heads, alike.values(), strict=True):
        which = f" ({found[0].name})" if heads.count(head) > 1 else ""
        count = f", {len(found)} runs" if len(found) > 1 else ""
        columns.append((head + which + count, [run.measures[run.last] for run in found]))
    lines = []
    for key, name, factor in titles(
        dict.fromkeys(name for run in measured for name in run.config["measures"])
    ):
        cells = [
            mean_deviation((figure(m, key) for m in found), factor, none="–")
            for _, found in columns
        ]
        if any(cell != "–" for cell in cells):
            lines.append(" | ".join((f"{name}, %" if factor == 100 else name, *cells)))
    head = " | ".join(("measure", *(name for name, _ in columns)))
    return [_markdown("Measures of explanations, validation", head, lines)]


def _head(run: Run) -> str:
    data = run.config["data"]
    without = f" without {data['held_out']}" if data["held_out"] else ""
    name = _SETS.get(data["name"], data["name"]) + without
    if run.last == DIRECTIONS:
        return f"{name}, directions ({run.config['model']['directions']})"
    return f"{name}, λ_J = {run.config['loss']['diversity']:g}"


def _but_for_its_seed(run: Run) -> str:
    """What runs must have in common for their figures to be averaged."""
    # Mean and deviation are measured on a split that the seed may draw.
    aside = {"seed", "model.mean", "model.std", *FREE_KEYS} - {"pretrained.path"}
    config = {k: v for k, v in flat(run.config).items() if k not in aside}
    return json.dumps([config, run.removed], sort_keys=True)


def print_tables(folders: Sequence[str]) -> None:
    """Tables 1–4 of the runs in these folders, and which of them count for no row.

    Raises:
      UserError: there is no folder, or no run in one.
    """
    if not folders:
        raise UserError("no run given; name one or more folders that train.py wrote")
    runs = [read(folder) for folder in folders]
    print(tables(runs))
    known = {(name, kind) for _, _, *rows in TABLES for name, kind, *_ in rows}
    for folder, run in zip(folders, runs, strict=True):
        if run.row not in known:
            data = f"its data set {run.row[0]!r} is none of the paper's"
            why = "; ".join(run.deviations) or ("λ_J" if run.row[0] in _SETS else data)
            print(f"\n{folder} is of no row of Tables 1–4 ({why}).")
        elif ("joint" if run.row[1] == "deeplab" else _LAST) not in run.phases:
            print(f"\n{folder} is not finished ({', '.join(run.phases) or 'no phase yet'}).")
