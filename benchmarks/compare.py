"""Train variants of a config side by side over several seeds: mean ± deviation of every score.

    python -m benchmarks.compare --config=configs/demo.py:paper --seeds=0,1,2 \\
        --vary=loss.diversity=0 --vary=loss.diversity=0.25

A variant is one `--vary`: settings `key=value` separated by commas (empty: the config as it is),
optionally behind a name and a colon. `--set` applies to all of them. Each run is `train.py` in a
folder of its own under --runs; what is finished is not run again, so the command can be stopped and
repeated. `--flips` also scores each last phase averaged over mirror images. `--only-table` runs
nothing.
"""

import argparse
import json
import pathlib
import re
import shlex
import statistics

from benchmarks import machine
from benchmarks.programs import call
from protoseg_jax.evaluation.report import mean_deviation

COLUMNS = (
    ("miou", "mIoU %"),
    ("pixel_error", "error %"),
    ("f_error", "1 − F %"),  # two classes only
    ("overlap", "overlap %"),
)


def parse_variant(text: str) -> tuple[str, list[str]]:
    """`name: key=value,key=value` → (name, ["--config.key=value", …])."""
    name, colon, rest = text.partition(":")
    settings = [s for s in re.split(r",(?=[\w.]+=)", rest if colon else text) if s.strip()]
    return (name if colon else text or "as configured"), [f"--config.{s.strip()}" for s in settings]


def folder(runs: pathlib.Path, name: str, seed: int) -> pathlib.Path:
    """The run's folder of a variant and seed."""
    return runs / f"{re.sub(r'[^0-9A-Za-z.=_-]+', '_', name)}-seed{seed}"


def table(variants: dict[str, list[list[dict]]]) -> list[str]:
    """Markdown rows: variant, phase and those scores over the seeds that any run has.

    Args:
      variants: by name the runs' summaries (summary.json), one a seed.
    """
    columns = [
        (key, name)
        for key, name in COLUMNS
        if any(e.get(key) is not None for runs in variants.values() for s in runs for e in s)
    ]
    rows = [
        f"| variant | phase | seeds | prototypes | {' | '.join(n for _, n in columns)} | seconds |",
        "| --- " * (5 + len(columns)) + "|",
    ]
    for name, summaries in variants.items():
        for phase in dict.fromkeys(e["phase"] for s in summaries for e in s):
            entries = [e for s in summaries for e in s if e["phase"] == phase]
            counts = [e["num_prototypes"] for e in entries if e["num_prototypes"] is not None]
            scores = [mean_deviation((e.get(key) for e in entries), none="–") for key, _ in columns]
            prototypes = f"{statistics.mean(counts):.1f}" if counts else "–"
            seconds = [e["seconds"] for e in entries if e["seconds"] is not None]
            took = f"{statistics.mean(seconds):.0f}" if seconds else "–"
            rows.append(
                f"| {name} | {phase} | {len(entries)} | {prototypes} | {' | '.join(scores)} "
                f"| {took} |"
            )
    return rows


def mirrored(place: pathlib.Path, last: dict, run: bool) -> list[dict]:
    """The entry of a run's last phase with `eval.py --flips`' scores, if there are any.

    Args:
      place: the run's folder.
      last: the phase's entry in its summary.
      run: whether to score it where that was not done yet.
    """
    path = place / "eval" / f"validation-{last['phase']}-flips.json"
    if run and not path.exists():
        call("eval.py", f"--workdir={place}", "--flips")
    if not path.exists():
        return []
    scores = json.loads(path.read_text())
    scores = {key: scores.get(key) for key, _ in COLUMNS}
    return [{**last, **scores, "phase": f"{last['phase']}, flips", "seconds": None}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--vary", action="append", default=[], help="[name:] key=value,…")
    parser.add_argument("--set", action="append", default=[], help="key=value for every run")
    parser.add_argument("--runs", type=pathlib.Path, default="runs/compare", help="their folder")
    parser.add_argument("--title", default="Variants side by side")
    parser.add_argument("--out", type=pathlib.Path, help="also write the table to this .md file")
    parser.add_argument("--flips", action="store_true", help="score with eval.py --flips too")
    parser.add_argument("--only-table", action="store_true", help="of what is finished")
    arguments = parser.parse_args()

    seeds = [int(s) for s in arguments.seeds.split(",")]
    variants = dict(parse_variant(text) for text in arguments.vary or [""])
    common = [f"--config.{s}" for s in arguments.set]
    summaries: dict[str, list[list[dict]]] = {name: [] for name in variants}
    # Seed by seed, so that an early look compares like with like.
    for seed in seeds:
        for name, settings in variants.items():
            place = folder(arguments.runs, name, seed)
            if not arguments.only_table:
                line = [f"--config={arguments.config}", f"--workdir={place}"]
                call("train.py", *line, f"--config.seed={seed}", *common, *settings)
            if (place / "summary.json").exists():
                summary = json.loads((place / "summary.json").read_text())
                if arguments.flips:
                    summary += mirrored(place, summary[-1], not arguments.only_table)
                summaries[name].append(summary)

    told = [f"--config={arguments.config}", f"--seeds={arguments.seeds}"]
    told += [f"--vary={x}" for x in arguments.vary] + [f"--set={x}" for x in arguments.set]
    told += ["--flips"] if arguments.flips else []
    command = shlex.join(["python", "-m", "benchmarks.compare", *told])
    lines = [f"# {arguments.title}", "", f"`{command}`, {machine.describe()}", ""]
    lines += [*table(summaries), "", "Validation scores; mean ± sample deviation over the seeds."]
    machine.report(lines, arguments.out)


if __name__ == "__main__":
    main()
