"""The paper's Tables 1–4 in Markdown, our runs' figures beside the paper's; and their measures.

    python -m protoseg_jax.tables DIR …

Each DIR is a run's folder. A run counts for the row that its config is (data set, weights, λ_J,
head) if it follows the paper's recipe; what does not is named below the tables. Several runs of a
row give mean ± sample deviation; rows without a finished run say "not run". All figures are per
cent, on validation unless a column says test.
"""

import dataclasses
import functools
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from protoseg_jax.errors import UserError
from protoseg_jax.evaluation.interpretability import MEASURES
from protoseg_jax.models import port_torch
from protoseg_jax.workdir import Workdir

NOT_RUN = "not run"
_SETS = {"voc": "Pascal VOC 2012", "cityscapes": "Cityscapes", "isbi_em": "EM (ISBI 2012)"}
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
}
_RECIPES = {"voc": _DEEPLAB, "cityscapes": _DEEPLAB, "isbi_em": _UNET}


@dataclasses.dataclass(frozen=True)
class Run:
    """What the tables need of a run.

    Attributes:
      config: config.json.
      phases: the entries of summary.json by phase.
      measures: those of explanations by phase (eval/validation-PHASE.json), where they were taken.
    """

    config: dict[str, Any]
    phases: dict[str, dict[str, Any]]
    measures: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def deviations(self) -> list[str]:
        """How the config departs from the paper's recipe."""
        name = self.config["data"]["name"]
        found = []
        for key, wanted in _RECIPES.get(name, {}).items():
            value = functools.reduce(
                lambda section, k: section.get(k, {}), key.split("."), self.config
            )
            if value != wanted:
                found.append(f"{key} is {value}, not {wanted}")
        weights = self.config["pretrained"]["path"]
        if name in ("voc", "cityscapes") and not weights:
            found.append("no pretrained weights")
        if weights and Path(weights).suffix not in port_torch.READERS:
            found.append(f"it started from run {weights}")
        return found

    @property
    def row(self) -> tuple[str, str]:
        """(data set, kind): "imagenet", "coco", "no_diversity", "deeplab"; "other" for the rest."""
        config, name = self.config, self.config["data"]["name"]
        if self.deviations:
            return name, "other"
        if config["model"]["head"] == "linear":
            return name, "deeplab"
        if config["loss"]["diversity"] == 0:
            return name, "no_diversity"
        if config["loss"]["diversity"] != 0.25:
            return name, "other"
        return name, "coco" if config["model"]["preprocessing"] == "caffe" else "imagenet"

    @property
    def last(self) -> dict[str, Any]:
        """The last phase's scores, if the run is finished."""
        wanted = "joint" if self.row[1] == "deeplab" else "finetune_pruned"
        return self.phases.get(wanted, {})


def read(folder: str) -> Run:
    """A run by its folder.

    Raises:
      UserError: it holds no run.
    """
    workdir = Workdir.existing(folder)
    measures = {}
    for path in (workdir.path / "eval").glob("validation-*.json"):
        scores = json.loads(path.read_text())
        if "interpretability" in scores and not scores.get("flips"):
            measures[scores["phase"]] = scores["interpretability"]
    phases = {entry["phase"]: entry for entry in workdir.summary()}
    return Run(workdir.config_json(), phases, measures)


def mean_deviation(
    values: Iterable[float | None], scale: float = 100.0, digits: int = 2, none: str = NOT_RUN
) -> str:
    """Mean ± sample deviation of the values that there are, times a factor; or `none`."""
    values = [scale * v for v in values if v is not None]
    if not values:
        return none
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _markdown(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"## {title}", "", f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


# (data set, kind, name) → the paper's mIoU on validation and test
TABLE_1 = (
    ("voc", "deeplab", "DeepLabv2 (with CRF)", 77.69, 79.70),
    ("voc", "imagenet", "ProtoSeg, ImageNet", 72.05, 72.92),
    ("voc", "coco", "ProtoSeg, COCO", 67.98, 68.71),
    ("cityscapes", "deeplab", "DeepLabv2", 71.40, 70.40),
    ("cityscapes", "imagenet", "ProtoSeg, ImageNet", 67.23, 67.04),
    ("cityscapes", "coco", "ProtoSeg, COCO", 55.35, 56.77),
)
# λ_J → the paper's overlap and mIoU
TABLE_2 = (
    ("voc", "no_diversity", "0", 48.16, 69.60),
    ("voc", "imagenet", "0.25", 26.59, 72.05),
    ("cityscapes", "no_diversity", "0", 57.99, 61.60),
    ("cityscapes", "imagenet", "0.25", 24.09, 67.23),
)
# The paper's stage, ours, and its prototypes and mIoU
TABLE_3 = (
    ("voc", "warm-up", "warmup", 210, 25.65),
    ("voc", "joint", "joint", 210, 68.24),
    ("voc", "projection", "finetune", 201, 72.00),
    ("voc", "pruning", "finetune_pruned", 133, 72.05),
    ("cityscapes", "warm-up", "warmup", 190, 31.45),
    ("cityscapes", "joint", "joint", 190, 65.38),
    ("cityscapes", "projection", "finetune", 188, 67.24),
    ("cityscapes", "pruning", "finetune_pruned", 128, 67.23),
)
TABLE_4 = (("deeplab", "U-Net", 78.74, 5.37), ("imagenet", "ProtoSeg (U-Net)", 76.58, 5.40))


def tables(runs: Sequence[Run]) -> str:
    """Tables 1–4 as Markdown."""

    def of(name: str, kind: str) -> list[Run]:
        return [run for run in runs if run.row == (name, kind)]

    def last(name: str, kind: str, key: str) -> str:
        return mean_deviation(run.last.get(key) for run in of(name, kind))

    def stage(name: str, phase: str, key: str, scale: float, digits: int) -> str:
        found = (run.phases.get(phase, {}).get(key) for run in of(name, "imagenet"))
        return mean_deviation(found, scale, digits)

    first = _markdown(
        "Table 1: mIoU",
        ("data", "model", "paper, validation", "paper, test", "ours, validation"),
        (
            (_SETS[s], name, f"{validation:.2f}", f"{test:.2f}", last(s, kind, "miou"))
            for s, kind, name, validation, test in TABLE_1
        ),
    )
    second = _markdown(
        "Table 2: the diversity loss",
        ("data", "λ_J", "paper: overlap", "ours: overlap", "paper: mIoU", "ours: mIoU"),
        (
            (
                _SETS[s],
                weight,
                f"{overlap:.2f}",
                last(s, kind, "overlap"),
                f"{miou:.2f}",
                last(s, kind, "miou"),
            )
            for s, kind, weight, overlap, miou in TABLE_2
        ),
    )
    third = _markdown(
        "Table 3: the stages",
        ("data", "paper's stage", "our phase", "prototypes", "ours", "paper: mIoU", "ours: mIoU"),
        (
            (
                _SETS[s],
                name,
                f"`{phase}`",
                str(count),
                stage(s, phase, "num_prototypes", 1.0, 0),
                f"{miou:.2f}",
                stage(s, phase, "miou", 100.0, 2),
            )
            for s, name, phase, count, miou in TABLE_3
        ),
    )
    fourth = _markdown(
        "Table 4: EM",
        ("model", "paper: mIoU", "ours: mIoU", "paper: error", "ours: 1 − F of inside"),
        (
            (
                name,
                f"{miou:.2f}",
                last("isbi_em", kind, "miou"),
                f"{error:.2f}",
                last("isbi_em", kind, "f_error"),
            )
            for kind, name, miou, error in TABLE_4
        ),
    )
    measured = _measures(runs)
    note = (
        "The paper's projection and pruning rows are scores after their fine-tunings, hence our "
        "phases beside them. Its Table 4 error can only be 1 − F."
    )
    return "\n\n".join([first, second, third, fourth, note, *measured])


def _measures(runs: Sequence[Run]) -> list[str]:
    """The table of measures after the last phase; none without any.

    A row is a data set, a class held out if any, and λ_J.
    """
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        if "finetune_pruned" in run.measures:
            data = run.config["data"]
            name = _SETS.get(data["name"], data["name"])
            if data.get("held_out"):
                name += f" without {data['held_out']}"
            key = name, f"{run.config['loss']['diversity']:g}"
            rows.setdefault(key, []).append(run.measures["finetune_pruned"])
    if not rows:
        return []
    cells = [
        (*key, *(mean_deviation((m.get(k) for m in found), f, none="–") for k, _, f in MEASURES))
        for key, found in rows.items()
    ]
    titles = (f"{name}, %" if factor == 100 else name for _, name, factor in MEASURES)
    return [_markdown("Measures of explanations, validation", ("data", "λ_J", *titles), cells)]


def _main(*folders: str) -> None:
    if not folders:
        raise UserError("no run given; name one or more folders that train.py wrote")
    runs = [read(folder) for folder in folders]
    print(tables(runs))
    known = {(s, kind) for s, kind, *_ in (*TABLE_1, *TABLE_2)}
    known |= {("isbi_em", kind) for kind, *_ in TABLE_4}
    for folder, run in zip(folders, runs, strict=True):
        if run.row not in known:
            print(f"\n{folder} is of no row ({'; '.join(run.deviations) or ', '.join(run.row)}).")
        elif not run.last:
            print(f"\n{folder} is not finished ({', '.join(run.phases) or 'no phase yet'}).")


if __name__ == "__main__":
    import sys

    try:
        _main(*sys.argv[1:])
    except UserError as error:
        from protoseg_jax.errors import exit_with

        exit_with(str(error))
