"""A run's folder: config, manifest, metrics, scores, checkpoints.

```
config.json · manifest.json · classes.json · split.json · metrics.jsonl · tensorboard/ ·
checkpoints/ · prototypes.json · prototypes/ · summary.json · eval/ · explain/ · figures/ ·
removed.json · segmented/ · blackbox/ (a run, of `pretrained.blackbox`)
```
"""

import datetime
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import ml_collections

from protoseg_jax import config as configs
from protoseg_jax.data.labels import LabelSet
from protoseg_jax.devices import backend_description, barrier, is_main
from protoseg_jax.errors import UserError, full_disk
from protoseg_jax.files import hold, read_json, write_atomically, write_json
from protoseg_jax.run.checkpoints import Checkpoints
from protoseg_jax.version import __version__

# Keys a user may change when a run goes on: paths, logging. (And the steps of unfinished phases.)
FREE_KEYS = (
    "data.dir",
    "data.cache",
    "data.workers",
    "pretrained.path",
    "measures",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "eval_batch_size",
)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(config, dict):
        return {
            k: v for key, x in config.items() for k, v in flat(x, f"{prefix}{key}.").items()
        } or {prefix.rstrip("."): {}}
    return {prefix.rstrip("."): config}


def _plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """A config as plain JSON values."""
    return json.loads(config.to_json())


class Workdir:
    """Reads and writes a run's folder.

    Args:
      path: the folder; it need not exist yet.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path).absolute()
        self.checkpoints = Checkpoints(self.path / "checkpoints")
        self._lock: IO[str] | None = None

    @classmethod
    def existing(cls, path: str | os.PathLike) -> "Workdir":
        """Open a folder that must hold a run.

        Raises:
          UserError: there is no such folder, or it holds no run.
        """
        workdir = cls(path)
        if not workdir.holds_run:
            raise UserError(
                f"workdir {str(path)!r} holds no run (no config.json); "
                "name the folder that train.py wrote, as in --workdir=runs/demo"
            )
        return workdir

    @property
    def holds_run(self) -> bool:
        return (self.path / "config.json").is_file()

    # -- claiming ------------------------------------------------------------------------------

    def start(self, config: ml_collections.ConfigDict) -> None:
        """Claim the folder for `config`, or check that it already belongs to it.

        Raises:
          UserError: the folder cannot be written, holds something else, or another config's run.
        """
        if not is_main():
            return barrier("the run's folder is claimed")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._claim()
            self.check_same(config)
            if not self.holds_run and any(
                p.name[0] != "." and p.name != "lock" for p in self.path.iterdir()
            ):
                raise UserError(
                    f"workdir {str(self.path)!r} is not empty and holds no run; "
                    "name another folder with --workdir"
                )
            write_json(self.path / "config.json", _plain(config))
            write_json(self.path / "manifest.json", _manifest(config))
        except OSError as error:
            if full_disk(error):
                raise
            raise UserError(
                f"workdir {str(self.path)!r} cannot be written ({error.strerror}); "
                "name another with --workdir"
            ) from error
        barrier("the run's folder is claimed")

    def _claim(self) -> None:
        """Hold the folder's lock until this process ends, however it ends."""
        if self._lock:
            return
        try:
            self._lock = hold(self.path / "lock", wait=False)
        except BlockingIOError as error:
            raise UserError(
                f"workdir {str(self.path)!r} is in use by another train.py (process "
                f"{error.filename2 or 'unknown'}); wait for it or name another --workdir"
            ) from error
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()} on {os.uname().nodename}")
        self._lock.flush()

    def release(self) -> None:
        """Let go of the folder, so that another may claim it."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def check_same(self, config: ml_collections.ConfigDict) -> None:
        """Refuse a config that the folder's run, if there is one, was not started with.

        Raises:
          UserError: it differs in what makes a run another one.
        """
        if not self.holds_run:
            return
        old, new = flat(_plain(self.config())), flat(_plain(config))
        finished = {entry["phase"] for entry in self.summary()}
        changed = []
        for key in sorted(set(old) | set(new)):
            before, now = old.get(key), new.get(key)
            if before == now or key in FREE_KEYS:
                continue
            phase = re.fullmatch(r"phases\.(\w+)\.steps", key)
            if phase and phase[1] not in finished and (now or 0) > (before or 0):
                continue
            changed.append(f"{key} ({before} there, {now} now)")
        if changed:
            raise UserError(
                f"workdir {str(self.path)!r} belongs to another config: {', '.join(changed)}; "
                "use another --workdir, or the config it was started with"
            )

    def cpu_devices(self) -> int | None:
        """How many devices a CPU was split into when the run last went on; None without a run, on
        a GPU, of a run of several processes, and where the manifest cannot be read."""
        try:
            made_on = read_json(self.path / "manifest.json", {}).get("devices", {})
        except (OSError, ValueError):
            return None
        alone = made_on.get("platform") == "cpu" and made_on.get("processes", 1) == 1
        return made_on.get("local_devices") if alone else None

    def config(self) -> ml_collections.ConfigDict:
        """The run's config, with every key."""
        return configs.complete(read_json(self.path / "config.json"))

    # -- results -------------------------------------------------------------------------------

    def labels(self) -> LabelSet | None:
        """The run's classes; None of an old run that kept none."""
        record = read_json(self.path / "classes.json")
        return record and LabelSet(tuple(record["names"]), tuple(map(tuple, record["colours"])))

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        if is_main():
            with open(self.path / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    def truncate_metrics(self, done: list[str], phase: str | None, step: int) -> None:
        """Drop the lines written after the restored moment.

        Args:
          done: phases that are over; their lines stay.
          phase: the phase being resumed; its lines up to `step` stay.
          step: the restored step.
        """
        path = self.path / "metrics.jsonl"
        if not path.exists() or not is_main():
            return
        kept = []
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue  # a line cut short when the run was killed
            if line["phase"] in done or (line["phase"] == phase and line["step"] <= step):
                kept.append(text)
        write_atomically(path, "".join(f"{text}\n" for text in kept))

    def summary(self) -> list[dict[str, Any]]:
        """summary.json: one entry a finished and scored phase."""
        return read_json(self.path / "summary.json", [])

    def write_summary(self, entries: list[dict[str, Any]]) -> None:
        """Replace summary.json."""
        if is_main():
            write_json(self.path / "summary.json", entries)
        barrier("the summary is written")


def _manifest(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What a run is made with: versions, commit, devices, command, dtype."""
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "protoseg_jax": __version__,
        "python": sys.version.split()[0],
        "versions": {n.replace("-", "."): importlib.metadata.version(n) for n in packages},
        "git_commit": _commit(),
        "devices": backend_description(),
        "command": sys.argv,
        "compute_dtype": config.compute_dtype,
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    """The checkout's commit; None of an installed package, or without git."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return None
    return found[1] if Path(found[0]).resolve() == root else None
