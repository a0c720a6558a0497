"""The measures of explanations of finished runs, mean ± deviation over the runs of a variant.

    python benchmarks/interpretability.py --runs "λ_J = 0: runs/a,runs/b" --runs "λ_J = 0.25: …"
        [--split=validation] [--out=FILE]

Each run is measured as `eval.py --interpretability` does, unless DIR/eval holds its measures.
"""

import argparse
import json
import pathlib
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import machine  # noqa: E402

from protoseg_jax import devices  # noqa: E402
from protoseg_jax.training import scoring  # noqa: E402
from protoseg_jax.workdir import Workdir  # noqa: E402

# (key, name, factor, digits); the first ones are scores
ROWS = (
    ("miou", "mIoU %", 100, 2),
    ("overlap", "overlap %", 100, 2),
    ("utilisation", "utilisation %", 100, 2),
    ("unused", "prototypes that win no point", 1, 1),
    ("sparsity", "sparsity: prototypes a decision", 1, 2),
    ("faithfulness", "faithfulness: area between the curves, %", 100, 2),
    ("consistency", "consistency %", 100, 2),
    ("stability", "stability %", 100, 2),
    ("novelty_auroc", "novelty AUROC of the held-out class, %", 100, 2),
)


def measured(folder: str, split: str) -> dict:
    """A run's scores and measures on a split in its last phase."""
    summary = Workdir.existing(folder).summary()
    phase = summary[-1]["phase"] if summary else None
    stored = pathlib.Path(folder) / "eval" / f"{split}-{phase}.json"
    if stored.exists():
        result = json.loads(stored.read_text())
        if "interpretability" in result:
            return {**result, **result["interpretability"]}
    print(f"measuring {folder}", file=sys.stderr, flush=True)
    result = scoring.score_run(folder, split, None, None, interpretability=True)
    return {**result, **result["interpretability"]}


def cell(values: list[float | None], factor: float, digits: int) -> str:
    """Mean ± sample deviation."""
    values = [factor * v for v in values if v is not None]
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", action="append", required=True, help="NAME: DIR,DIR,…")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--title", default="Measures of explanations")
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    devices.keep_compiled_programs()
    groups, phases = {}, set()
    for text in arguments.runs:
        name, _, folders = text.partition(":")
        groups[name.strip()] = [
            measured(folder.strip(), arguments.split) for folder in folders.split(",")
        ]
        phases |= {result["phase"] for result in groups[name.strip()]}
    names = [
        f"{name}, {len(results)} run{'s'[: len(results) > 1]}" for name, results in groups.items()
    ]
    lines = [
        f"# {arguments.title}",
        "",
        f'`python benchmarks/interpretability.py --runs "NAME: DIR,…" …`, {machine.describe()}',
        "",
        f"| {arguments.split}, {', '.join(sorted(phases))} | {' | '.join(names)} |",
        "| --- " * (1 + len(groups)) + "|",
    ]
    for key, label, factor, digits in ROWS:
        cells = [cell([r.get(key) for r in rs], factor, digits) for rs in groups.values()]
        if any(c != "–" for c in cells):
            lines.append(f"| {label} | {' | '.join(cells)} |")
    machine.report(lines, arguments.out)


if __name__ == "__main__":
    main()
