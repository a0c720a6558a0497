"""Does a class that training never saw look novel? Beside the same class in a run that did see it.

    python -m benchmarks.novelty [--config=configs/demo.py] [--class=car] [--seeds=0]
        [--runs=runs/novelty] [--set=key=value …] [--out=FILE.md]

For each seed two runs, one with `data.held_out` and one without. In both, the AUROC of the class's
points of validation against all others by novelty, min_j ‖z − p_j‖². The second is the control: a
class may lie far from prototypes because it is difficult, and only what the first has beyond it is
novelty. What is finished is not run again.
"""

import argparse
import pathlib
import shlex

from benchmarks import machine
from benchmarks.programs import call
from protoseg_jax import devices
from protoseg_jax.evaluation import score
from protoseg_jax.evaluation.report import mean_deviation
from protoseg_jax.run.finished import Finished


def measured(path: pathlib.Path, name: str) -> dict:
    """Scores and novelty of a finished run, of its last phase on validation."""
    run = Finished.load(path)
    scores = {entry["phase"]: entry["miou"] for entry in run.workdir.summary()}
    novel = run.experiment.labels.names.index(name)
    found = score.measure(run.experiment, run.checkpoint, "validation", ["novelty"], novel)
    return {"miou": scores[run.phase], "novelty_auroc": found["novelty_auroc"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/demo.py")
    parser.add_argument("--class", dest="name", default="car")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--runs", type=pathlib.Path, default="runs/novelty", help="their folder")
    parser.add_argument("--set", action="append", default=[], help="key=value for every run")
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    devices.keep_compiled_programs()
    variants = {
        f"{arguments.name} held out": [f"--config.data.held_out={arguments.name}"],
        f"{arguments.name} learnt (control)": [],
    }
    rows = []
    for title, settings in variants.items():
        results = []
        for seed in arguments.seeds.split(","):
            place = arguments.runs / f"{'held_out' if settings else 'learnt'}-seed{seed}"
            line = [f"--config={arguments.config}", f"--workdir={place}", f"--config.seed={seed}"]
            call("train.py", *line, *settings, *(f"--config.{s}" for s in arguments.set))
            results.append(measured(place, arguments.name))
        cells = [mean_deviation(r[k] for r in results) for k in ("novelty_auroc", "miou")]
        rows.append(f"| {title} | {len(results)} | {' | '.join(cells)} |")
    told = [f"--config={arguments.config}", f"--class={arguments.name}"]
    told += [f"--seeds={arguments.seeds}", *(f"--set={s}" for s in arguments.set)]
    machine.report(
        [
            "# Novelty of a class that training never saw",
            "",
            f"`{shlex.join(['python', '-m', 'benchmarks.novelty', *told])}`, {machine.describe()}",
            "",
            "| run | seeds | novelty AUROC of the class's points % | mIoU % |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            "mIoU is over the classes that the run has labels of: one held out is not among them.",
        ],
        arguments.out,
    )


if __name__ == "__main__":
    main()
