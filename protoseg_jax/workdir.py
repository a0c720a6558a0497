"""A run's folder: config, manifest, metrics, checkpoints, prototypes, scores (DESIGN's contract).

```
config.json · manifest.json · classes.json · metrics.jsonl · tensorboard/ · checkpoints/ ·
prototypes.json · prototypes/ · summary.json · eval/ · explain/
```

Checkpoints are Orbax PyTree checkpoints of unreplicated NumPy arrays, so that a run restores on
any number of devices. `checkpoints/PHASE` is the end of a phase, `checkpoints/PHASE-STEP` a place
inside one. What is not an array (phase, step, which prototype belongs to which class and where it
comes from) lies beside the arrays in `checkpoints/NAME.json`, with a SHA-256 of both, and is
written last: a checkpoint without it does not count. One whose digest is wrong is moved to
`checkpoints/damaged/`, and the one before it is used.

Checkpoints are written by a thread of their own; a step waits only for its arrays to reach the
host. With several processes the first one writes, and all read: the folder must be shared.
"""

import concurrent.futures
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import orbax.checkpoint as ocp

from protoseg_jax.devices import barrier, is_main
from protoseg_jax.errors import UserError, full_disk, reason

# Keys a user may change when a run goes on: paths, logging. (And the steps of unfinished phases.)
_FREE_KEYS = (
    "data.dir",
    "data.cache",
    "data.workers",
    "pretrained.path",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "eval_batch_size",
)
_KEEP_IN_PHASE = 2
_SPARE_BYTES = 1 << 20  # what a checkpoint takes beside its arrays, generously


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file under a temporary name and rename it, so that it is never seen half written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """`write_atomically` of a JSON value."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")


@dataclasses.dataclass
class Checkpoint:
    """A run at one moment.

    Attributes:
      phase: name of the phase the run is in.
      step: optimiser steps done inside that phase.
      finished: whether the phase is over.
      arrays: {"params": …, "frozen": …, "optimizer": {"0": leaf, …}} as NumPy arrays.
      prototypes: one dict a prototype: "index", "class", and after projection its source
        ("image", "image_id", "row", "col", "squared_distance", "box").
      seconds: time spent in this phase so far.
    """

    phase: str
    step: int
    finished: bool
    arrays: dict[str, Any]
    prototypes: list[dict[str, Any]]
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return self.phase if self.finished else f"{self.phase}-{self.step:07d}"

    @property
    def variables(self) -> dict[str, Any]:
        """The arrays as the model's variables."""
        frozen = {"frozen": self.arrays["frozen"]} if self.arrays["frozen"] else {}
        return {"params": self.arrays["params"], **frozen}


class DamagedCheckpoint(UserError):
    """A checkpoint whose content is not what was written."""


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(config, dict):
        return {
            k: v for key, x in config.items() for k, v in _flat(x, f"{prefix}{key}.").items()
        } or {prefix.rstrip("."): {}}
    return {prefix.rstrip("."): config}


class Workdir:
    """Reads and writes a run's folder.

    Args:
      path: the folder; it need not exist yet.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path).absolute()
        self.checkpoints = self.path / "checkpoints"
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        self._writing: concurrent.futures.Future | None = None
        self._lock = None

    # -- opening -------------------------------------------------------------------------------

    @classmethod
    def existing(cls, path: str | os.PathLike) -> "Workdir":
        """Open a folder that must hold a run.

        Raises:
          UserError: there is no such folder, or it holds no run.
        """
        workdir = cls(path)
        if not (workdir.path / "config.json").is_file():
            raise UserError(
                f"workdir {str(path)!r} holds no run (no config.json); "
                "name the folder that train.py wrote, as in --workdir=runs/demo"
            )
        return workdir

    def start(self, config: ml_collections.ConfigDict, manifest: dict[str, Any]) -> None:
        """Claim the folder for `config`, or check that it already belongs to it.

        Raises:
          UserError: the folder cannot be written, holds something else, or another config's run.
        """
        new = json.loads(config.to_json())
        if not is_main():
            return barrier("the run's folder is claimed")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._claim()
            if (self.path / "config.json").exists():
                self._check_same(new)
            elif any(p.name[0] != "." and p.name != "lock" for p in self.path.iterdir()):
                raise UserError(
                    f"workdir {str(self.path)!r} is not empty and holds no run; "
                    "name another folder with --workdir"
                )
            write_json(self.path / "config.json", new)
            write_json(self.path / "manifest.json", manifest)
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
        file = open(self.path / "lock", "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise UserError(
                f"workdir {str(self.path)!r} is in use by another train.py (process {owner}); "
                "wait for it or name another --workdir"
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()} on {os.uname().nodename}")
        file.flush()
        self._lock = file

    def release(self) -> None:
        """Let go of the folder, so that another may claim it."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def _check_same(self, new: dict[str, Any]) -> None:
        old, new = _flat(self.config_json()), _flat(new)
        finished = {entry["phase"] for entry in self.summary()}
        changed = []
        for key in sorted(set(old) | set(new)):
            if old.get(key) == new.get(key) or key in _FREE_KEYS:
                continue
            phase = re.fullmatch(r"phases\.(\w+)\.steps", key)
            if phase and phase[1] not in finished and new.get(key, 0) > old.get(key, 0):
                continue
            changed.append(f"{key} ({old.get(key)} there, {new.get(key)} now)")
        if changed:
            raise UserError(
                f"workdir {str(self.path)!r} belongs to another config: {', '.join(changed)}; "
                "use another --workdir, or the config it was started with"
            )

    def config_json(self) -> dict[str, Any]:
        """The run's config as plain JSON values."""
        return json.loads((self.path / "config.json").read_text())

    def config(self) -> ml_collections.ConfigDict:
        """The run's config."""
        return ml_collections.ConfigDict(self.config_json())

    # -- checkpoints ---------------------------------------------------------------------------

    def save(self, checkpoint: Checkpoint) -> None:
        """Start writing a checkpoint; its arrays must not change any more.

        When it is written, older ones inside the phase are dropped but one (at its end, all).

        Raises:
          UserError: the checkpoint before this one could not be written.
        """
        self.wait()
        if is_main():
            self._writing = self._thread.submit(self._write, checkpoint)

    def wait(self) -> None:
        """Wait until the last `save` is on disk.

        Raises:
          UserError: it could not be written.
        """
        if self._writing:
            writing, self._writing = self._writing, None
            writing.result()

    def finish_writing(self) -> None:
        """`wait`, when the run ends by another error, which must not be hidden."""
        if self._writing:
            concurrent.futures.wait([self._writing])

    def _write(self, checkpoint: Checkpoint) -> None:
        self._forget(checkpoint.name)
        target = self.checkpoints / checkpoint.name
        # Looked at first: Orbax prints pages from its threads when the disk fills up under it.
        need = sum(x.nbytes for x in jax.tree.leaves(checkpoint.arrays)) + _SPARE_BYTES
        if shutil.disk_usage(self.path).free < need:
            raise OSError(errno.ENOSPC, "disk full", str(target))
        try:
            with _checkpointer() as checkpointer:
                checkpointer.save(target, checkpoint.arrays)
            meta = {
                f.name: getattr(checkpoint, f.name)
                for f in dataclasses.fields(checkpoint)
                if f.name != "arrays"
            }
            meta["sha256"] = _digest(target, meta)
            write_json(self.checkpoints / f"{checkpoint.name}.json", meta)
        except Exception as error:  # Orbax reports a full disk in exceptions of many kinds
            shutil.rmtree(target, ignore_errors=True)
            if full_disk(error):
                raise OSError(errno.ENOSPC, "disk full", str(target)) from error
            raise
        inside = self._inside(checkpoint.phase)
        for name in inside if checkpoint.finished else inside[:-_KEEP_IN_PHASE]:
            self._forget(name)

    def _inside(self, phase: str) -> list[str]:
        """Names of the checkpoints inside a phase, in order."""
        return sorted(p.stem for p in self.checkpoints.glob(f"{phase}-[0-9]*.json"))

    def _forget(self, name: str) -> None:
        (self.checkpoints / f"{name}.json").unlink(missing_ok=True)
        shutil.rmtree(self.checkpoints / name, ignore_errors=True)
        # What a killed process left; Orbax would warn of it.
        for left in self.checkpoints.glob(f"{name}{ocp.utils.TMP_DIR_SUFFIX}*"):
            shutil.rmtree(left, ignore_errors=True)

    def restore(self, name: str) -> Checkpoint:
        """Read a checkpoint by its name (`PHASE` or `PHASE-STEP`).

        Raises:
          DamagedCheckpoint: it is not what was written.
        """
        path = self.checkpoints / name
        try:
            meta = json.loads((self.checkpoints / f"{name}.json").read_bytes())
            expected = meta.pop("sha256")
            if _digest(path, meta) != expected:
                raise ValueError("its SHA-256 is not the one that was written")
            with _checkpointer() as checkpointer:
                arrays = checkpointer.restore(path)
            arrays.setdefault("frozen", {})
            return Checkpoint(arrays=arrays, **meta)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedCheckpoint(
                f"checkpoint {path} is damaged ({reason(error)}); start train.py again on this "
                "workdir to go on from the one before it"
            ) from error

    def latest(self, phase: str) -> str | None:
        """Name of the newest checkpoint of a phase: its end, else its furthest step, else None."""
        if (self.checkpoints / f"{phase}.json").exists():
            return phase
        return next(reversed(self._inside(phase)), None)

    def finished(self, phases: Sequence[str], wanted: str | None = None) -> list[str]:
        """Those of the phases whose end is on disk.

        Raises:
          UserError: there is none, or `wanted` is not among them.
        """
        found = [name for name in phases if self.latest(name) == name]
        if not found:
            raise UserError(
                f"run {str(self.path)!r} has not finished a phase yet; let train.py go on"
            )
        if wanted and wanted not in found:
            raise UserError(
                f"run {str(self.path)!r} has not finished phase {wanted!r}; "
                f"it has {', '.join(found)}"
            )
        return found

    def newest(self, phases: Sequence[str]) -> Checkpoint | None:
        """The furthest checkpoint of a run that is whole; damaged ones are named and set aside.

        Args:
          phases: names of the run's phases, in order.
        """
        for phase in reversed(phases):
            while name := self.latest(phase):
                try:
                    return self.restore(name)
                except DamagedCheckpoint as error:
                    aside = self.checkpoints / "damaged"
                    barrier(f"{name} was read")
                    if is_main():
                        self._set_aside(name, aside)
                        what = str(error).partition(";")[0]
                        print(f"warning: {what}; moved to {aside}", file=sys.stderr)
                    barrier(f"{name} was set aside")
        return None

    def _set_aside(self, name: str, aside: Path) -> None:
        aside.mkdir(exist_ok=True)
        for source in (self.checkpoints / name, self.checkpoints / f"{name}.json"):
            target = aside / source.name
            if target.is_dir():
                shutil.rmtree(target)
            if source.exists():
                source.replace(target)

    # -- metrics and results -------------------------------------------------------------------

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
        path = self.path / "summary.json"
        return json.loads(path.read_text()) if path.exists() else []

    def add_summary(self, entry: dict[str, Any]) -> None:
        """Add a phase's entry to summary.json."""
        self.write_summary([e for e in self.summary() if e["phase"] != entry["phase"]] + [entry])

    def write_summary(self, entries: list[dict[str, Any]]) -> None:
        """Replace summary.json."""
        if is_main():
            write_json(self.path / "summary.json", entries)
        barrier("the summary is written")


def _checkpointer() -> ocp.Checkpointer:
    """Orbax for this process alone: it does not wait for the others."""
    process = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=process,
        active_processes={process},
        barrier_sync_key_prefix=f"process{process}",
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _digest(folder: Path, meta: dict[str, Any]) -> str:
    """SHA-256 over the names and contents of a checkpoint's files and what lies beside them."""
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"\n{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
