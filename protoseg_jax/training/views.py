"""Views of the training images, seen once by a frozen backbone.

With `augment.views = V` what the backbone says of every training image as evaluation sees it, and
of V crops of each, is computed before anything trains and kept in the cache of data. Decoder, head
and prototypes then learn from these maps, at a small part of a step's time. Crops are scaled, cut
and flipped before the backbone, so that each map is what the network says of a real image.

`CACHE/views-FINGERPRINT/` holds a file a view, `NNN.maps`: the images' records one after another
(the leaves of the backbone's maps, then Y_Z), as NumPy's structured dtype lays them out. index.json
has the SHA-256 of each finished one. A file that is damaged or unfinished is made again. All that
decides the content is in the fingerprint.
"""

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grain.python as grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from protoseg_jax import files, models
from protoseg_jax.data import pipeline, prepare
from protoseg_jax.devices import DevicePool
from protoseg_jax.errors import UserError, full_disk, reason
from protoseg_jax.inference import Inference, shrink_labels
from protoseg_jax.progress import Progress, say
from protoseg_jax.run.checkpoints import Checkpoint
from protoseg_jax.run.experiment import Experiment
from protoseg_jax.version import __version__

_FORMAT = 1  # raise it when what is stored, or how a view is drawn, changes


def check(experiment: Experiment) -> None:
    """Refuse `augment.views` where maps of views are not what the network would train on.

    Raises:
      UserError: a phase trains the backbone; views are not as large as crops, or are tiles; or MSC.
    """
    config = experiment.config
    views, backbone = config.augment.views, models.groups(config.model)[0]
    if not views:
        return
    trained = [p.name for p in experiment.phases if backbone in p.learning_rates]
    crop, size = tuple(config.crop_size), tuple(config.eval_size)
    why = None
    if views < 0:
        why = "it must be the number of crops of each image, or 0"
    elif trained:
        why = (
            "what the backbone says is kept only where it is frozen, but phases."
            f"{trained[0]}.learning_rates.{backbone} trains it"
        )
    elif crop != size:
        why = f"crops and evaluation must be of one size, not crop_size={crop}, eval_size={size}"
    elif config.eval_overlap is not None:
        why = "it does not go with eval_overlap"
    elif config.model.msc:
        why = "it does not go with model.msc"
    if why:
        raise UserError(f"augment.views={views}: {why}; set --config.augment.views=0, or mend that")


def batches(
    experiment: Experiment, start: Checkpoint
) -> Callable[[int], Iterator[dict[str, np.ndarray]]]:
    """The training batches from a number on, as `Experiment.train_batches` but that each has
    "maps", what the backbone says, in place of "image", and Y_Z for "label".

    Views that are not in the cache yet are computed. Every process of a run does this by itself.

    Args:
      experiment: whose config has `augment.views`.
      start: any checkpoint of the run; all have the same backbone.

    Raises:
      UserError: the cache cannot be written.
    """
    views = _open(experiment, start)
    config, pool = experiment.config, experiment.pool
    return lambda number: pipeline.train_batches(
        range(views.images),
        _Draw(views),
        batch_size=config.batch_size,
        seed=config.seed,
        start=number,
        workers=config.data.workers,
        part=(pool.process, pool.processes),
    )


@dataclasses.dataclass(frozen=True)
class Views:
    """Random access to records in files; picklable, and safe to read from several threads.

    Attributes:
      paths: a file for each view.
      images: records of each file.
      dtype: of a record, its last field "label".
      tree: how the other fields make up the backbone's maps.
    """

    paths: tuple[Path, ...]
    images: int
    dtype: np.dtype
    tree: Any

    def record(self, view: int, image: int) -> dict[str, Any]:
        """{"maps": the backbone's, "label": Y_Z uint8 [h w]} of one view of one image.

        Raises:
          UserError: the file cannot be read.
        """
        try:
            with open(self.paths[view], "rb", buffering=0) as file:
                file.seek(image * self.dtype.itemsize)
                found = np.frombuffer(file.read(self.dtype.itemsize), self.dtype)[0]
        except (OSError, ValueError, IndexError) as error:
            raise UserError(
                f"view {self.paths[view]} cannot be read ({reason(error)}); start the same command "
                "again to have it made again"
            ) from error
        *maps, label = (found[name] for name in self.dtype.names)
        return {"maps": jax.tree.unflatten(self.tree, maps), "label": label}


@dataclasses.dataclass(frozen=True)
class _Draw(grain.RandomMapTransform):
    """An image's number → one of its views."""

    views: Views

    def random_map(self, element: int, rng: np.random.Generator) -> dict[str, Any]:
        return self.views.record(int(rng.integers(len(self.views.paths))), element)


class _Crops:
    """The source of one view: a crop of each image, as training draws them."""

    def __init__(self, experiment: Experiment, view: int):
        self._source = experiment.source(experiment.config.data.train_split)
        self._augment, self._seed = experiment.augmentation, (experiment.config.seed, view)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([*self._seed, index])
        return self._augment.random_map(self._source[index], rng)


# -- the cache ---------------------------------------------------------------------------------


def _open(experiment: Experiment, start: Checkpoint) -> Views:
    """The views of an experiment, those that are missing computed."""
    config, inference = experiment.config, experiment.inference(start.prototypes)
    pool = DevicePool(jax.local_devices()) if experiment.pool.processes > 1 else experiment.pool
    group = models.groups(config.model)[0]
    variables = {name: {group: tree.get(group, {})} for name, tree in start.variables.items()}
    batch = -(-config.eval_batch_size // pool.count) * pool.count
    folder = Path(config.data.cache).expanduser()
    folder /= f"views-{_fingerprint(experiment, inference, variables, (pool.count, batch))}"
    dtype, tree = _layout(inference, variables)
    paths = tuple(folder / f"{view:03d}.maps" for view in range(config.augment.views + 1))
    views = Views(paths, len(experiment.source(config.data.train_split)), dtype, tree)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with files.hold(folder / ".lock", wait=True):
            missing = _missing(folder, views)
            if missing:
                for left in folder.glob(".*.maps.*.tmp"):  # by a process that was killed
                    left.unlink()
                _require_room(folder, len(missing) * views.images * dtype.itemsize)
                _make(folder, views, missing, experiment, inference, variables, pool, batch)
    except OSError as error:
        if full_disk(error):
            raise
        raise UserError(
            f"data cache {folder} cannot be written ({reason(error)}); set data.cache to a folder "
            "of yours"
        ) from error
    return views


def _fingerprint(
    experiment: Experiment, inference: Inference, variables: Any, batches: tuple[int, int]
) -> str:
    """Of all that decides the maps, to the last bit: the backbone as the program that it becomes,
    its weights, devices and their batches, and what images are read and how they are cut."""
    config, digest = experiment.config, hashlib.sha256()
    image = jax.ShapeDtypeStruct((1, *inference.eval_size, 3), np.uint8)
    program = jax.jit(lambda v, x: inference.encode(v, x)).lower(variables, image)
    digest.update(program.as_text().encode())
    for path, x in jax.tree_util.tree_leaves_with_path(variables):
        digest.update(f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape} ".encode())
        digest.update(np.ascontiguousarray(x))
    augment = {key: value for key, value in sorted(config.augment.items()) if key != "views"}
    data = config.data
    source = experiment.data.folder, data.train_split, data.held_out, tuple(config.crop_size)
    versions = _FORMAT, __version__, jax.__version__, jax.local_devices()[0].platform
    return prepare.fingerprint(
        [digest.hexdigest(), augment, config.seed, source, batches, versions]
    )


def _layout(inference: Inference, variables: Any) -> tuple[np.dtype, Any]:
    """The dtype of a record, and the tree that its maps make up."""
    image = jax.ShapeDtypeStruct((1, *inference.eval_size, 3), np.uint8)
    leaves, tree = jax.tree.flatten(jax.eval_shape(inference.encode, variables, image))
    fields = [(f"map{n}", x.dtype, x.shape[1:]) for n, x in enumerate(leaves)]
    return np.dtype([*fields, ("label", np.uint8, inference.feature_size)]), tree


def _require_room(folder: Path, size: int) -> None:
    """Refuse to fill the disk with views, beforehand.

    Raises:
      UserError: there is less room than they take.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"{folder} would take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; make "
            "room, set --config.data.cache to another disk, or lower --config.augment.views"
        )
    say(f"views of the training images: {size / 1e9:.2g} GB, in {folder}")


def _missing(folder: Path, views: Views) -> list[int]:
    """Numbers of the views that are not there as they were written."""
    try:
        known = files.read_json(folder / "index.json", {})
    except ValueError:
        known = {}
    missing = []
    for view, path in enumerate(views.paths):
        if not path.exists() or path.name not in known:
            missing.append(view)
            continue
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != known[path.name]:
                say(f"warning: {path} is damaged; it is made again")
                missing.append(view)
    return missing


def _make(
    folder: Path,
    views: Views,
    missing: list[int],
    experiment: Experiment,
    inference: Inference,
    variables: Any,
    pool: DevicePool,
    batch_size: int,
) -> None:
    """Compute the missing views, each written, then named in index.json."""
    names = tuple(views.dtype.names)

    def step(variables: Any, batch: dict[str, Array]) -> dict[str, Array]:
        leaves = jax.tree.leaves(inference.encode(variables, batch["image"]))
        label: Int[Array, "b h w"] = shrink_labels(
            batch["label"], batch["size"], inference.feature_size
        )
        return dict(zip(names, (*leaves, label.astype(jnp.uint8)), strict=True))

    mapped, variables = pool.map(step), pool.replicate(variables)
    config = experiment.config

    def records(view: int, progress: Progress) -> Iterable[np.ndarray]:
        source = _Crops(experiment, view) if view else experiment.source(config.data.train_split)
        images = pipeline.eval_batches(
            source,
            eval_size=inference.eval_size,
            batch_size=batch_size,
            workers=config.data.workers,
        )
        for batch in pool.prefetch(images):
            found, index = jax.device_get((mapped(variables, batch), batch["index"]))
            real = index.reshape(-1) >= 0
            rows = np.zeros(int(real.sum()), views.dtype)
            for name, x in found.items():
                rows[name] = x.reshape(-1, *x.shape[2:])[real]
            yield rows
            progress.update(len(rows))

    with Progress("views", len(missing) * views.images, 0, unit="image") as progress:
        for view in missing:
            digest = hashlib.sha256()
            with files.writing(views.paths[view]) as file:
                for rows in records(view, progress):
                    file.write(data := rows.tobytes())
                    digest.update(data)
            try:
                known = files.read_json(folder / "index.json", {})
            except ValueError:
                known = {}
            name = views.paths[view].name
            files.write_json(folder / "index.json", {**known, name: digest.hexdigest()})
