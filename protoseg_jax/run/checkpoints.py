"""Checkpoints of a run: Orbax PyTrees of unreplicated NumPy arrays, each with a record beside it.

So stored, a run restores on any number of devices. `PHASE` is the end of a phase, `PHASE-STEP` a
place inside one. What is not an array (phase, step, which prototype belongs to which class and
where it comes from) lies beside the arrays in `NAME.json`, with a SHA-256 of both, and is written
last: a checkpoint without it does not count. One whose digest is wrong is moved to `damaged/`, and
the one before it is used.

They are written by a thread of their own; a step waits only for its arrays to reach the host. With
several processes the first one writes, and all read: the folder must be shared.
"""

import concurrent.futures
import dataclasses
import errno
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from protoseg_jax.devices import barrier, is_main
from protoseg_jax.errors import UserError, full_disk, reason
from protoseg_jax.files import write_json
from protoseg_jax.run.prototypes import Prototype

_KEEP_IN_PHASE = 2
_SPARE_BYTES = 1 << 20  # what a checkpoint takes beside its arrays, generously


@dataclasses.dataclass
class Checkpoint:
    """A run at one moment.

    Attributes:
      phase: name of the phase the run is in.
      step: optimiser steps done inside that phase.
      finished: whether the phase is over.
      arrays: {"params": …, "frozen": …, "optimizer": {"0": leaf, …}} as NumPy arrays.
      prototypes: in the order of the arrays' M.
      seconds: time spent in this phase so far.
    """

    phase: str
    step: int
    finished: bool
    arrays: dict[str, Any]
    prototypes: list[Prototype]
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return self.phase if self.finished else f"{self.phase}-{self.step:07d}"

    @property
    def num_prototypes(self) -> int:
        """Prototypes, or directions; the bias beside those is none."""
        return sum(p.class_ >= 0 for p in self.prototypes)

    @property
    def variables(self) -> dict[str, Any]:
        """The arrays as the model's variables."""
        frozen = {"frozen": self.arrays["frozen"]} if self.arrays["frozen"] else {}
        return {"params": self.arrays["params"], **frozen}

    def keep(self, positions: Sequence[int]) -> "Checkpoint":
        """The same with only the prototypes at these positions: new shapes."""
        params, at = dict(self.arrays["params"]), np.asarray(positions)
        params["prototypes"] = {"vectors": np.asarray(params["prototypes"]["vectors"])[at]}
        params["head"] = {"kernel": np.asarray(params["head"]["kernel"])[at]}
        if "anchors" in params:
            params["anchors"] = {"vectors": np.asarray(params["anchors"]["vectors"])[at]}
        arrays = {"params": params, "frozen": self.arrays["frozen"]}
        kept = [self.prototypes[j] for j in at.tolist()]
        return dataclasses.replace(self, arrays=arrays, prototypes=kept)


class DamagedCheckpoint(UserError):
    """A checkpoint whose content is not what was written."""


class Checkpoints:
    """Writes and reads the checkpoints of a run.

    Args:
      path: their folder, in the run's.
    """

    def __init__(self, path: Path):
        self.path = path
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        self._writing: concurrent.futures.Future | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Start writing a checkpoint; its arrays must not change any more.

        When it is written, older ones inside the phase are dropped but one (at its end, all).

        Raises:
          OSError: the checkpoint before this one could not be written.
        """
        self.wait()
        if is_main():
            self._writing = self._thread.submit(self._write, checkpoint)

    def wait(self) -> None:
        """Wait until the last `save` is on disk.

        Raises:
          OSError: it could not be written.
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
        target = self.path / checkpoint.name
        # Looked at first: Orbax prints pages from its threads when the disk fills up under it.
        need = sum(x.nbytes for x in jax.tree.leaves(checkpoint.arrays)) + _SPARE_BYTES
        if shutil.disk_usage(self.path.parent).free < need:
            raise OSError(errno.ENOSPC, "disk full", str(target))
        try:
            with _checkpointer() as checkpointer:
                checkpointer.save(target, checkpoint.arrays)
            meta = {n: getattr(checkpoint, n) for n in ("phase", "step", "finished", "seconds")}
            meta["prototypes"] = [p.to_json() for p in checkpoint.prototypes]
            meta["sha256"] = _digest(target, meta)
            write_json(self.path / f"{checkpoint.name}.json", meta)
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
        return sorted(p.stem for p in self.path.glob(f"{phase}-[0-9]*.json"))

    def _forget(self, name: str) -> None:
        (self.path / f"{name}.json").unlink(missing_ok=True)
        # With what a killed process left, of which Orbax would warn.
        for left in (self.path / name, *self.path.glob(f"{name}{ocp.utils.TMP_DIR_SUFFIX}*")):
            shutil.rmtree(left, ignore_errors=True)

    def restore(self, name: str) -> Checkpoint:
        """Read a checkpoint by its name (`PHASE` or `PHASE-STEP`).

        Raises:
          DamagedCheckpoint: it is not what was written.
        """
        path = self.path / name
        try:
            meta = json.loads((self.path / f"{name}.json").read_bytes())
            expected = meta.pop("sha256")
            if _digest(path, meta) != expected:
                raise ValueError("its SHA-256 is not the one that was written")
            with _checkpointer() as checkpointer:
                arrays = checkpointer.restore(path)
            arrays.setdefault("frozen", {})
            prototypes = [Prototype.from_json(p) for p in meta.pop("prototypes")]
            return Checkpoint(arrays=arrays, prototypes=prototypes, **meta)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedCheckpoint(
                f"checkpoint {path} is damaged ({reason(error)}); start train.py again on this "
                "workdir to go on from the one before it"
            ) from error

    def latest(self, phase: str) -> str | None:
        """Name of the newest checkpoint of a phase: its end, else its furthest step, else None."""
        if (self.path / f"{phase}.json").exists():
            return phase
        return next(reversed(self._inside(phase)), None)

    def finished(self, phases: Sequence[str], wanted: str | None = None) -> list[str]:
        """Those of the phases whose end is on disk.

        Raises:
          UserError: there is none, or `wanted` is not among them.
        """
        run, found = str(self.path.parent), [name for name in phases if self.latest(name) == name]
        if not found:
            raise UserError(f"run {run!r} has not finished a phase yet; let train.py go on")
        if wanted and wanted not in found:
            raise UserError(
                f"run {run!r} has not finished phase {wanted!r}; it has {', '.join(found)}"
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
                    aside = self.path / "damaged"
                    barrier(f"{name} was read")
                    if is_main():
                        self._set_aside(name, aside)
                        what = str(error).partition(";")[0]
                        print(f"warning: {what}; moved to {aside}", file=sys.stderr)
                    barrier(f"{name} was set aside")
        return None

    def _set_aside(self, name: str, aside: Path) -> None:
        aside.mkdir(exist_ok=True)
        for source in (self.path / name, self.path / f"{name}.json"):
            target = aside / source.name
            if target.is_dir():
                shutil.rmtree(target)
            if source.exists():
                source.replace(target)


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
