"""Kill runs at random moments, start them again, and compare with an undisturbed one.

    python -m tests.kill [--runs=50] [--signal=KILL] [--seed=0] [--out=FILE.md]

Each run is `train.py` on a small folder data set through every phase, killed up to three times,
each time at a random moment of what an undisturbed run takes, then left to finish. Its parameters
after every phase, prototypes and scores must equal the undisturbed run's bit for bit, or the
program fails.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

from benchmarks import machine
from protoseg_jax.run.workdir import Workdir
from tests.small import make_data

ROOT = pathlib.Path(__file__).resolve().parents[1]

MAX_KILLS = 3
PHASES = ("warmup", "joint", "projection", "finetune", "pruning", "finetune_pruned")
SETTINGS = {
    "batch_size": 2,
    "crop_size": "(33,33)",
    "eval_size": "(49,57)",
    "eval_batch_size": 2,
    "log_every": 1,
    "eval_every": 4,
    "checkpoint_every": 2,
    "model.width": 8,
    "model.features": 8,
    "model.prototypes_per_class": 3,
    "phases.warmup.steps": 6,
    "phases.joint.steps": 12,
    "phases.finetune.steps": 6,
    "phases.finetune_pruned.steps": 6,
}
# Config and settings. The U-Net's eight layers compile in half of the time of the ResNet's.
UNET = ("camvid", {"data.name": "folder", "model.depth": 1, "model.output_stride": 2})
RESNET = ("folder", {"model.depth": 14})


def command(
    data: pathlib.Path,
    cache: pathlib.Path,
    workdir: pathlib.Path,
    network: tuple[str, dict] = UNET,
) -> list[str]:
    """`train.py` for the small run, with one of the two networks."""
    config, own = network
    settings = {"data.dir": data, "data.cache": cache, **SETTINGS, **own}
    return [
        sys.executable,
        str(ROOT / "train.py"),
        f"--config={ROOT / 'configs' / config}.py:scratch",
        f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in settings.items()),
    ]


def environment(scratch: pathlib.Path) -> dict[str, str]:
    """As many CPU devices as users have, and compiled programs kept (where tests keep theirs, if
    they do), so that a restart costs seconds."""
    flags = os.environ.get("XLA_FLAGS", "").split()  # tests compile in a way of their own
    return {
        "JAX_COMPILATION_CACHE_DIR": str(scratch / "compiled"),
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(f for f in flags if "device_count" not in f),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def results(workdir: pathlib.Path) -> dict:
    """All that must be equal: arrays of every phase, prototypes, scores."""
    folder = Workdir(workdir)
    summary = [{k: v for k, v in e.items() if k != "seconds"} for e in folder.summary()]
    arrays = {}
    for phase in PHASES:
        for path, leaf in _leaves(folder.checkpoints.restore(phase).arrays):
            arrays[f"{phase}/{path}"] = np.asarray(leaf)
    prototypes = json.loads((workdir / "prototypes.json").read_text())
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    steps = [(x["phase"], x["step"], x["loss"]) for x in map(json.loads, lines)]
    return {"summary": summary, "prototypes": prototypes, "steps": steps, "arrays": arrays}


def _leaves(tree, path=""):
    if isinstance(tree, dict):
        for key in sorted(tree):
            yield from _leaves(tree[key], f"{path}{key}/")
    else:
        yield path, tree


def differences(first: dict, second: dict) -> list[str]:
    """Names of what is not bit for bit equal."""
    found = [k for k in ("summary", "prototypes", "steps") if first[k] != second[k]]
    names = first["arrays"].keys() | second["arrays"].keys()
    for name in sorted(names):
        a, b = (x["arrays"].get(name) for x in (first, second))
        if a is None or b is None or a.dtype != b.dtype or a.tobytes() != b.tobytes():
            found.append(name)
    return found


def undisturbed(scratch: pathlib.Path) -> tuple[dict, float]:
    """(results, seconds) of a run that nobody kills, compiled programs being kept already."""
    make_data(scratch / "data")
    for name in ("first", "reference"):  # the first fills the caches
        start = time.monotonic()
        line = command(scratch / "data", scratch / "cache", scratch / name)
        subprocess.run(line, env=environment(scratch), check=True, capture_output=True)
        took = time.monotonic() - start
    expected = results(scratch / "reference")
    assert not differences(results(scratch / "first"), expected), "two undisturbed runs differ"
    return expected, took


def trial(
    scratch: pathlib.Path, number: int, took: float, rng: random.Random, signum: int
) -> tuple[dict, list[str]]:
    """One run, killed at random moments: (its results, where each kill struck)."""
    workdir, struck = scratch / f"run{number}", []
    line = command(scratch / "data", scratch / "cache", workdir)
    while True:
        process = subprocess.Popen(
            line, env=environment(scratch), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        last = len(struck) == MAX_KILLS
        try:
            _, errors = process.communicate(timeout=None if last else rng.uniform(2, took))
        except subprocess.TimeoutExpired:
            process.send_signal(signum)
            _, errors = process.communicate()
            # 0: it ended just before the signal.
            if process.returncode not in (0, -signum, 128 + signum):
                raise RuntimeError(errors.decode()) from None
            if process.returncode:
                struck.append(_place(errors.decode()))
                continue
        if process.returncode:
            raise RuntimeError(errors.decode())
        return results(workdir), struck


def _place(errors: str) -> str:
    lines = [x for x in errors.splitlines() if ":" in x]
    return lines[-1].split(",")[0].strip()[:60] if lines else "starting"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--signal", default="KILL", choices=["KILL", "TERM", "INT"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    signum, rng = getattr(signal, f"SIG{arguments.signal}"), random.Random(arguments.seed)
    rows, unequal = [], 0
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        expected, took = undisturbed(scratch)
        for number in range(arguments.runs):
            got, struck = trial(scratch, number, took, rng, signum)
            wrong = differences(got, expected)
            unequal += bool(wrong)
            verdict = f"differs: {', '.join(wrong[:3])}" if wrong else "bit-identical"
            rows.append(f"| {number} | {'; '.join(struck) or 'not struck'} | {verdict} |")
            print(rows[-1], file=sys.stderr, flush=True)
    machine.report(
        [
            "# Runs killed at random moments",
            "",
            f"`python -m tests.kill --runs={arguments.runs} --signal={arguments.signal} "
            f"--seed={arguments.seed}`, {machine.describe()}",
            "",
            f"{arguments.runs - unequal} of {arguments.runs} runs ended bit-identical to the "
            f"undisturbed one ({took:.0f} s). Compared: all parameters after every phase, "
            "prototypes, scores, losses of all steps.",
            "",
            "| run | last line before each kill | result |",
            "| --- | --- | --- |",
            *rows,
        ],
        arguments.out,
    )
    sys.exit(bool(unequal))


if __name__ == "__main__":
    main()
