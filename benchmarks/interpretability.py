"""The measures of explanations of finished runs, mean ± deviation over the runs of a variant.

    python -m benchmarks.interpretability --runs "λ_J = 0: runs/a,runs/b" --runs "λ_J = 0.25: …"
        [--split=validation] [--out=FILE]

Each run is measured as `eval.py --interpretability` does, unless DIR/eval holds its measures.
"""

import argparse
import json
import pathlib
import shlex
import sys

from benchmarks import machine
from protoseg_jax import devices
from protoseg_jax.evaluation import report, score
from protoseg_jax.run.workdir import Workdir

SCORES = (("miou", "mIoU", 100), ("overlap", "overlap", 100))


def measured(folder: str, split: str) -> dict:
    """A run's scores and measures on a split in its last phase."""
    summary = Workdir.existing(folder).summary()
    phase = summary[-1]["phase"] if summary else None
    stored = pathlib.Path(folder) / "eval" / f"{split}-{phase}.json"
    if stored.exists():
        result = json.loads(stored.read_text())
        if "interpretability" in result:
            return {**result, **report.measures_in(result)}
    print(f"measuring {folder}", file=sys.stderr, flush=True)
    result = score.score_run(folder, split, interpretability=True)
    return {**result, **result["interpretability"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", action="append", required=True, help="NAME: DIR,DIR,…")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--title", default="Measures of explanations")
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    devices.keep_compiled_programs()
    groups, phases, known = {}, set(), {}
    for text in arguments.runs:
        name, _, folders = text.partition(":")
        folders = [folder.strip() for folder in folders.split(",")]
        groups[name.strip()] = [measured(folder, arguments.split) for folder in folders]
        for folder in folders:
            known |= dict.fromkeys(Workdir.existing(folder).config().measures)
        phases |= {result["phase"] for result in groups[name.strip()]}
    names = [
        f"{name}, {len(results)} run{'s'[: len(results) > 1]}" for name, results in groups.items()
    ]
    told = [f"--runs={text}" for text in arguments.runs] + [f"--split={arguments.split}"]
    command = shlex.join(["python", "-m", "benchmarks.interpretability", *told])
    lines = [
        f"# {arguments.title}",
        "",
        f"`{command}`, {machine.describe()}",
        "",
        f"| {arguments.split}, {', '.join(sorted(phases))} | {' | '.join(names)} |",
        "| --- " * (1 + len(groups)) + "|",
    ]
    for key, name, factor in (*SCORES, *report.titles(known)):
        cells = [
            report.mean_deviation((report.figure(r, key) for r in results), factor, none="–")
            for results in groups.values()
        ]
        if any(c != "–" for c in cells):
            lines.append(f"| {name}{', %' if factor == 100 else ''} | {' | '.join(cells)} |")
    machine.report(lines, arguments.out)


if __name__ == "__main__":
    main()
