"""Images of 10,000² and of 1×1 pixels through every command: exit code, time and peak memory.

    python -m benchmarks.huge [--side=10000] [--config=configs/folder.py] [--out=FILE.md]

Made here: a folder with two huge photographs (one trains, one is validated), two of a single pixel
and six of common sizes, two classes. Each command is a process of its own; training is --smoke, so
that every phase has a few steps.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import cv2
import numpy as np

from benchmarks import machine
from protoseg_jax import images
from protoseg_jax.data.sets import parts

ROOT = pathlib.Path(__file__).parents[1]
SETTINGS = ("--config.model.prototypes_per_class=2", "--config.batch_size=2")


def make(root: pathlib.Path, side: int) -> list[pathlib.Path]:
    """The folder; returns its validation images."""
    sizes = [(side, side), (1, 1), (240, 320), (600, 400), (333, 501), (480, 640)]
    names = {"train": [], "validation": []}
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    (root / "classes.txt").write_text("ground\nthing\n")
    for n, (height, width) in enumerate([*sizes, sizes[0], sizes[1], *sizes[2:4]]):
        image, label = parts.scene(0, 0, n)[:2]
        label = np.where(label > 0, 1, 0).astype(np.uint8)
        nearest = cv2.INTER_NEAREST
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        label = cv2.resize(label, (width, height), interpolation=nearest)
        suffix = ".png" if height == 1 else ".jpg"  # a JPEG's pixel would be a block's
        (root / "images" / f"im{n}{suffix}").write_bytes(images.encode(image, suffix))
        (root / "masks" / f"im{n}.png").write_bytes(images.encode(label))
        names["train" if n < len(sizes) else "validation"].append(f"im{n}")
    for split, stems in names.items():
        (root / f"{split}.txt").write_text("\n".join(stems) + "\n")
    return sorted(p for p in (root / "images").iterdir() if p.stem in names["validation"])


def measured(line: list[str], log: pathlib.Path) -> tuple[int, float, float]:
    """(exit code, seconds, peak GB of the process and what it waited for) of a command."""
    started = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(line, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, time.monotonic() - started, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=10_000)
    parser.add_argument("--config", default="configs/folder.py")
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        root, run = pathlib.Path(scratch) / "set", pathlib.Path(scratch) / "run"
        shown = ",".join(map(str, make(root, arguments.side)[:2]))  # the huge one and the pixel
        data = f"--config.data.dir={root}"
        train = ["train.py", f"--config={arguments.config}", data, *SETTINGS]
        of_run = f"--workdir={run}"
        segment = ["-m", "protoseg_jax", "segment", of_run, f"--images={root / 'images'}"]
        commands = {
            "check": ["-m", "protoseg_jax", "check", str(root), f"--sheet={run}.png"],
            "train --smoke": [*train, of_run, "--smoke"],
            "eval": ["eval.py", of_run],
            "segment --overlay": [*segment, f"--out={scratch}/labels", "--overlay"],
            "explain": ["explain.py", of_run],
            "explain --images": ["explain.py", of_run, f"--images={shown}", f"--out={run}/two"],
        }
        for name, line in commands.items():
            log = pathlib.Path(scratch) / "log"
            code, seconds, peak = measured([sys.executable, *line], log)
            rows.append(f"| {name} | {code} | {seconds:.0f} | {peak:.1f} |")
            print(rows[-1], flush=True)
            if code:
                print(log.read_text()[-3000:], file=sys.stderr)
    side = arguments.side
    machine.report(
        [
            f"# Images of {side:,}² and of 1×1 pixels",
            "",
            f"`{' '.join(['python -m benchmarks.huge', *sys.argv[1:]])}`, {machine.describe()}",
            "",
            f"Six images train and four validate; of each split one is {side:,}² (JPEG) and one a "
            f"single pixel. `{arguments.config}`, two classes, two prototypes each.",
            "",
            "| | exit code | seconds | peak memory, GB |",
            "| --- | --- | --- | --- |",
            *rows,
        ],
        arguments.out,
    )


if __name__ == "__main__":
    main()
