"""A run's folder: config, manifest, metrics, checkpoints, prototypes, scores (DESIGN's contract).

```
config.json · manifest.json · metrics.jsonl · tensorboard/ · checkpoints/ · prototypes.json ·
prototypes/ · summary.json · eval/ · explain/
```

Checkpoints are Orbax PyTree checkpoints of unreplicated NumPy arrays, so that a run restores on
any number of devices. `checkpoints/PHASE` is the end of a phase, `checkpoints/PHASE-STEP` a place
inside one. What is not an array (phase, step, which prototype belongs to which class and where it
comes from) lies beside the arrays in `checkpoints/NAME.json`, written last: a checkpoint without it
does not count.
"""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import ml_collections
import orbax.checkpoint as ocp

from protoseg_jax.errors import UserError

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
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if (self.path / "config.json").exists():
                self._check_same(new)
            elif any(p.name not in ("tensorboard", "lock") for p in self.path.iterdir()):
                raise UserError(
                    f"workdir {str(self.path)!r} is not empty and holds no run; "
                    "name another folder with --workdir"
                )
            write_json(self.path / "config.json", new)
            write_json(self.path / "manifest.json", manifest)
        except OSError as error:
            raise UserError(
                f"workdir {str(self.path)!r} cannot be written ({error.strerror}); "
                "name another with --workdir"
            ) from error

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
        """Write a checkpoint; older ones inside the phase are dropped (all of them at its end)."""
        target = self.checkpoints / checkpoint.name
        self._forget(checkpoint.name)
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(target, checkpoint.arrays)
        meta = {
            f.name: getattr(checkpoint, f.name)
            for f in dataclasses.fields(checkpoint)
            if f.name != "arrays"
        }
        write_json(self.checkpoints / f"{checkpoint.name}.json", meta)
        inside = sorted(self.checkpoints.glob(f"{checkpoint.phase}-[0-9]*.json"))
        for path in inside if checkpoint.finished else inside[:-_KEEP_IN_PHASE]:
            self._forget(path.stem)

    def _forget(self, name: str) -> None:
        (self.checkpoints / f"{name}.json").unlink(missing_ok=True)
        shutil.rmtree(self.checkpoints / name, ignore_errors=True)

    def restore(self, name: str) -> Checkpoint:
        """Read a checkpoint by its name (`PHASE` or `PHASE-STEP`)."""
        meta = json.loads((self.checkpoints / f"{name}.json").read_text())
        with ocp.PyTreeCheckpointer() as checkpointer:
            arrays = checkpointer.restore(self.checkpoints / name)
        arrays.setdefault("frozen", {})
        return Checkpoint(arrays=arrays, **meta)

    def latest(self, phase: str) -> str | None:
        """Name of the newest checkpoint of a phase: its end, else its furthest step, else None."""
        if (self.checkpoints / f"{phase}.json").exists():
            return phase
        inside = sorted(self.checkpoints.glob(f"{phase}-[0-9]*.json"))
        return inside[-1].stem if inside else None

    # -- metrics and results -------------------------------------------------------------------

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
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
        if not path.exists():
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
        rest = [e for e in self.summary() if e["phase"] != entry["phase"]]
        write_json(self.path / "summary.json", [*rest, entry])
