"""Which prototype stands for which part: a finished run's table, on a data set with part labels.

    python -m benchmarks.part_table --run=DIR [--split=validation] [--out=FILE.md]

A row a part: the prototypes that stand for it (`part_agreement.standing_for`), how much of the part
they win together and how much of what they win is the part; and the same of the one of them that
wins most of it. `python explain.py --workdir=DIR --figures=parts` draws it.
"""

import argparse
import pathlib
import shlex
from typing import Any

from benchmarks import machine
from benchmarks.interpretability import measured
from protoseg_jax import devices
from protoseg_jax.evaluation import part_agreement
from protoseg_jax.run.finished import Finished


def rows(found: dict[str, Any], indices: list[int]) -> list[tuple]:
    """(part, its share of the class's points, prototypes, their recall and precision, the best one,
    its recall and precision) of each part, in the data set's order; recall and precision in [0, 1].

    Recall is the share of the part's points that prototypes win, precision the part's share of all
    points of the class that they win. Without a prototype these are None.

    Args:
      found: what `part_agreement.figures` gives.
      indices: the number of each prototype, by its position.
    """
    standing, result = part_agreement.standing_for(found, len(indices)), []
    for entry in found["classes"].values():
        total = max(sum(map(sum, entry["table"])), 1)
        for part, points in zip(entry["parts"], entry["table"], strict=True):
            mine = part_agreement.that_stand_for(part, standing)
            own = [k for k, j in enumerate(entry["prototypes"]) if j in mine]
            own.sort(key=lambda k: -points[k])

            def shares(chosen, points=points, entry=entry):
                won = sum(points[k] for k in chosen)
                of_all = sum(row[k] for row in entry["table"] for k in chosen)
                return won / max(sum(points), 1), won / max(of_all, 1)

            numbers = [indices[entry["prototypes"][k]] for k in own]
            both = (*shares(own), numbers[0], *shares(own[:1])) if own else (None,) * 5
            result.append((part, sum(points) / total, numbers, *both))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--title", default="Which prototype stands for which part")
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    devices.keep_compiled_programs()
    found = measured(arguments.run, arguments.split)["part_agreement"]
    indices = [p.index for p in Finished.load(arguments.run).prototypes]
    told = [f"--run={arguments.run}", f"--split={arguments.split}"]
    lines = [
        f"# {arguments.title}",
        "",
        f"`{shlex.join(['python', '-m', 'benchmarks.part_table', *told])}`, {machine.describe()}",
        "",
        "| part | area | prototypes | recall | precision | best | recall | precision |",
        "| --- " * 8 + "|",
    ]
    for part, area, numbers, *shares in rows(found, indices):
        cells = ["–" if x is None else f"{100 * x:.0f}" for x in shares]
        cells[2] = "–" if shares[2] is None else str(shares[2])
        names = ", ".join(map(str, numbers)) or "none"
        lines.append(f"| {part} | {100 * area:.0f} | {names} | {' | '.join(cells)} |")
    lines += [
        "",
        "In %. Area: of the class's points. A prototype stands for the part that most of its "
        "points are of, among those of which it has more than their area. Recall: of the part's "
        "points, those that these prototypes win; precision: of the points that they win, the "
        "part's.",
    ]
    machine.report(lines, arguments.out)


if __name__ == "__main__":
    main()
