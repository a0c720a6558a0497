"""Any number of images, of any sizes, into files: classes, overlays, probabilities, evidence.

```
OUT/
  segment.json            which run and phase this is of, so that nothing else goes on here
  NAME.png                the class of each pixel, indexed, in the run's colours
  NAME.overlay.jpg        the image under its classes' colours
  NAME.probabilities.npz  "probabilities" float16 [H W c], softmax of the upsampled logits
  NAME.evidence.npz       at every point: "similarities" float32 [h w m], "logits" [h w c],
                          "prototype" uint16 [h w], the number of the winning one, and, where
                          prototypes decide, "novelty" [h w]; "kernel" [m c], "prototypes" [m] their
                          numbers; "corner" and "size" of what they cover. With tiles all but the
                          last two have a leading axis, a tile each.
```

NAME is the image's path below what was named, without its suffix. Images are read, and files
written, by threads beside the network; an image is never held longer than it takes, and logits are
brought to full size by strips of rows.
"""

import collections
import concurrent.futures
import dataclasses
import glob
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from protoseg_jax import images, models
from protoseg_jax.data import tiles
from protoseg_jax.errors import UserError, full_disk, reason
from protoseg_jax.evaluation import segmentation
from protoseg_jax.explain import evidence
from protoseg_jax.explain.model import Model
from protoseg_jax.files import read_json, write_atomically, write_json
from protoseg_jax.progress import Progress, say

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
KINDS = ("overlay", "probabilities", "evidence")
_ENDINGS = {
    "labels": ".png",
    "overlay": ".overlay.jpg",
    "probabilities": ".probabilities.npz",
    "evidence": ".evidence.npz",
}
_THREADS = 2  # that read, and as many that write
_STRIP = 2**24  # logits at full size at once
_STEP = 64  # canvases are multiples of it, or of more, so that few are compiled
_WILD = set("*?[")


def find(given: Sequence[str], out: Path) -> dict[str, Path]:
    """The images that files, folders (with all below them) and patterns name, by NAME.

    Hidden files are left alone, as is what lies in `out`.

    Raises:
      UserError: nothing is there, or two images would be written to one file.
    """
    found: dict[str, Path] = {}
    out = out.absolute()
    for text in given:
        path, base = Path(text), Path(text)
        if path.is_dir():
            files = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in SUFFIXES]
        elif path.is_file():
            files, base = [path], path.parent
        else:
            parts = itertools.takewhile(lambda part: not _WILD & set(part), path.parts)
            base = Path(*parts)
            files = [Path(p) for p in sorted(glob.glob(text, recursive=True)) if Path(p).is_file()]
        here = []
        for file in files:
            below = file.relative_to(base)
            hidden = any(part.startswith(".") for part in below.parts)
            if not hidden and not file.absolute().is_relative_to(out):
                here.append((str(below.with_suffix("")), file))
        if not here:
            raise UserError(
                f"no image at {text}; name files, folders or patterns of {', '.join(SUFFIXES)}"
            )
        for name, file in here:
            other = found.setdefault(name, file)
            if other != file:
                raise UserError(
                    f"{other} and {file} would both be written to {name}.png; segment them into "
                    "different folders"
                )
    return found


@dataclasses.dataclass
class _Cut:
    """What the network sees at once of an image, and what it said of it."""

    corner: tuple[int, int]
    own: tuple[int, int, int, int]
    size: tuple[int, int]
    pixels: UInt8[np.ndarray, "h w 3"] | None  # at the evaluation size; None once it was seen
    said: dict[str, np.ndarray] | None = None


@dataclasses.dataclass
class _Image:
    """An image on its way: its size, and its cuts."""

    name: str
    size: tuple[int, int]
    cuts: list[_Cut]


class Segmenter:
    """Segments images with a run into a folder.

    Args:
      model: the run.
      out: the folder.
      kinds: of `KINDS`, what to write beside the classes.

    Raises:
      UserError: the folder is another run's; or evidence is wanted of a black box.
    """

    def __init__(self, model: Model, out: Path, kinds: Sequence[str] = ()):
        if "evidence" in kinds:
            model.require_prototypes()
        self._model, self._out, self._kinds = model, out, ("labels", *kinds)
        self._post_hoc = models.kind(model.experiment.config.model) == "direction"
        experiment = model.experiment
        self._batch = experiment.eval_batch_size
        self._step = _step(model, with_evidence="evidence" in kinds)
        self._claim()

    def _claim(self) -> None:
        about = {
            "run": str(self._model.workdir.path),
            "phase": self._model.phase,
            "prototypes": [p.index for p in self._model.prototypes],
        }
        record = self._out / "segment.json"
        try:
            known = read_json(record)
            if known not in (None, about):
                raise UserError(
                    f"{self._out} holds what {known.get('run')} after its phase "
                    f"{known.get('phase')} said; name another --out"
                )
            write_json(record, about)
        except (OSError, ValueError, AttributeError) as error:
            if full_disk(error):
                raise
            raise UserError(
                f"{self._out} cannot be used ({reason(error)}); name another --out"
            ) from error

    def run(self, found: dict[str, Path]) -> None:
        """Segment images by their names, those that are not done yet.

        Raises:
          UserError: some images could not be segmented; all others are.
        """
        left = {name: path for name, path in found.items() if not self._done(name, path)}
        if len(left) < len(found):
            say(f"{len(found) - len(left)} of {len(found)} images are done already")
        failed: dict[str, str] = {}
        readers, writers = (
            concurrent.futures.ThreadPoolExecutor(_THREADS, f"segment-{what}")
            for what in ("reads", "writes")
        )
        pending: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            with Progress("segmenting", len(found), len(found) - len(left), "image") as progress:
                reading = self._read_ahead(left, readers, failed, progress)
                for image in self._seen(reading):
                    pending.append(writers.submit(self._write, image, left[image.name]))
                    while len(pending) > 2 * _THREADS:
                        pending.popleft().result()
                    progress.update(1)
                for future in pending:
                    future.result()
        finally:
            for pool in (readers, writers):
                pool.shutdown(wait=True, cancel_futures=True)
        if failed:
            for text in failed.values():
                say(f"failed: {text}")
            raise UserError(
                f"{len(failed)} of {len(found)} images could not be segmented: "
                f"{', '.join(list(failed)[:5])}{', …' if len(failed) > 5 else ''}; what is wrong "
                "with each stands above"
            )

    def _done(self, name: str, path: Path) -> bool:
        """Whether all files of an image are there, and younger than it."""
        try:
            changed = path.stat().st_mtime
            return all(self._target(name, kind).stat().st_mtime >= changed for kind in self._kinds)
        except OSError:
            return False

    def _target(self, name: str, kind: str) -> Path:
        return self._out / f"{name}{_ENDINGS[kind]}"

    def _read_ahead(
        self,
        left: dict[str, Path],
        readers: concurrent.futures.Executor,
        failed: dict[str, str],
        progress: Progress,
    ) -> Iterator[_Image]:
        """The images in order, some of them read beforehand; those that fail are left out."""
        waiting: collections.deque[tuple[str, concurrent.futures.Future]] = collections.deque()
        names = iter(left.items())
        while True:
            for name, path in itertools.islice(names, 2 * self._batch - len(waiting)):
                waiting.append((name, readers.submit(self._read, name, path)))
            if not waiting:
                return
            name, future = waiting.popleft()
            try:
                yield future.result()
            except UserError as error:
                failed[str(left[name])] = str(error)
                progress.update(1)

    def _read(self, name: str, path: Path) -> _Image:
        image = images.read(path, self._model.experiment.config.data.white)
        inference = self._model.inference
        overlap, cuts = self._model.experiment.config.eval_overlap, []
        for corner, own, pixels in tiles.cuts(image, inference.eval_size, overlap):
            cuts.append(_Cut(corner, own, pixels.shape[:2], inference.prepare(pixels)))
        return _Image(name, image.shape[:2], cuts)

    def _seen(self, reading: Iterator[_Image]) -> Iterator[_Image]:
        """The images once the network has said all of them, in order."""
        begun: collections.deque[_Image] = collections.deque()
        queue: collections.deque[list[_Cut]] = collections.deque()

        def cuts() -> Iterator[_Cut]:
            for image in reading:
                begun.append(image)
                yield from image.cuts

        def batches() -> Iterator[dict[str, np.ndarray]]:
            flat = cuts()
            while rows := list(itertools.islice(flat, self._batch)):
                queue.append(rows)
                pixels = np.stack([cut.pixels for cut in rows])
                filling = np.zeros((self._batch - len(rows), *pixels.shape[1:]), np.uint8)
                for cut in rows:
                    cut.pixels = None
                yield {"image": np.concatenate([pixels, filling])}

        outputs = self._model.experiment.pool.outputs(
            self._step, self._model.checkpoint.variables, batches()
        )
        for _, said in outputs:
            said = {k: np.asarray(x).reshape(-1, *x.shape[2:]) for k, x in said.items()}
            for n, cut in enumerate(queue.popleft()):
                cut.said = {key: x[n] for key, x in said.items()}
            while begun and all(cut.said is not None for cut in begun[0].cuts):
                yield begun.popleft()

    # -- writing -------------------------------------------------------------------------------

    def _write(self, image: _Image, path: Path) -> None:
        """All files of an image, its classes last: they say that it is done."""
        count = len(self._model.classes)
        labels = np.zeros(image.size, np.uint8)
        probabilities = None
        if "probabilities" in self._kinds:
            probabilities = np.zeros((*image.size, count), np.float16)
        for cut in image.cuts:
            (y, x), (top, left, bottom, right) = cut.corner, cut.own
            inner = slice(left - x, right - x)
            for rows, found, shares in strips(
                cut.said["logits"], cut.size, shares=probabilities is not None
            ):
                first, last = max(top, y + rows.start), min(bottom, y + rows.stop)
                if first < last:
                    here = slice(first - y - rows.start, last - y - rows.start), inner
                    labels[first:last, left:right] = found[here]
                    if probabilities is not None:
                        probabilities[first:last, left:right] = shares[here]
        if probabilities is not None:
            self._save(image.name, "probabilities", probabilities=probabilities)
        if "evidence" in self._kinds:
            self._save(image.name, "evidence", **self._evidence(image))
        if "overlay" in self._kinds:
            self._put(image.name, "overlay", self._overlay(path, labels))
        png = images.palette_png(labels, self._model.classes.colours)
        self._put(image.name, "labels", png)

    def _evidence(self, image: _Image) -> dict[str, Any]:
        indices = np.array([p.index for p in self._model.prototypes], np.uint16)
        said = [{k: x for k, x in cut.said.items()} for cut in image.cuts]
        for found in said:
            found["prototype"] = indices[found["prototype"]]
        stacked = {key: np.stack([found[key] for found in said]) for key in said[0]}
        if self._model.experiment.config.eval_overlap is None:
            stacked = {key: x[0] for key, x in stacked.items()}
        return {
            **stacked,
            "kernel": self._model.kernel,
            "prototypes": indices,
            "corner": np.array([cut.corner for cut in image.cuts]),
            "size": np.array([cut.size for cut in image.cuts]),
        }

    def _overlay(self, path: Path, labels: UInt8[np.ndarray, "H W"]) -> bytes:
        picture = images.read(path, self._model.experiment.config.data.white)
        mixed = cv2.addWeighted(picture, 0.5, self._model.classes.paint(labels), 0.5, 0)
        return images.encode(mixed, ".jpg", 90)

    def _save(self, name: str, kind: str, **arrays: np.ndarray) -> None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        self._put(name, kind, buffer.getvalue())

    def _put(self, name: str, kind: str, content: bytes) -> None:
        path = self._target(name, kind)
        try:
            write_atomically(path, content)
        except OSError as error:
            if full_disk(error):
                raise
            raise UserError(f"{path} cannot be written ({reason(error)})") from error


def _step(model: Model, *, with_evidence: bool):
    """step(variables, batch) → what is kept of each image, to be mapped over the devices."""
    inference = model.inference
    post_hoc = models.kind(model.experiment.config.model) == "direction"

    def step(variables, batch):
        output = inference(variables, batch["image"])
        if not with_evidence:
            return {"logits": output.logits}
        found = evidence.explain_points(output, variables["params"]["head"]["kernel"])
        kept = ("similarities", "logits", "prototype", *(() if post_hoc else ("novelty",)))
        return {key: getattr(found, key) for key in kept}

    return step


def strips(
    logits: Float[np.ndarray, "h w c"], size: tuple[int, int], *, shares: bool = False
) -> Iterator[tuple[slice, np.ndarray, np.ndarray | None]]:
    """(rows, their classes [n W], with `shares` their probabilities [n W c]) of a map brought to a
    (height, width), as `segmentation.predict` has them, some rows at a time.

    Args:
      logits: at the feature map's resolution.
      size: of the image.
      shares: whether probabilities are wanted.
    """
    height, width = size
    across = _canvas(width)
    rows = max(_STRIP // (across * logits.shape[-1]) // _STEP, 1) * _STEP
    rows = min(rows, _canvas(height))
    for top in range(0, height, rows):
        found, p = _strip(logits, np.array(size), top, (rows, across), shares)
        here = slice(top, min(top + rows, height))
        count = here.stop - top
        yield (
            here,
            np.asarray(found)[:count, :width],
            np.asarray(p)[:count, :width] if shares else None,
        )


def _canvas(length: int) -> int:
    """A length that holds another: a multiple of 64, of 128 from 512 on, of 256 from 1024 on …"""
    step = max(_STEP, 1 << max(length.bit_length() - 3, 0))
    return -(-length // step) * step


def _strip_of(logits, size, top, canvas, shares):
    full = segmentation.upsample(logits[None], size[None], canvas, top)[0]
    p = jax.nn.softmax(full).astype(jnp.float16) if shares else None
    return full.argmax(-1).astype(jnp.uint8), p


_strip = jax.jit(_strip_of, static_argnums=(3, 4))


def segment(
    workdir: str,
    given: Sequence[str],
    out: str,
    kinds: Sequence[str] = (),
    phase: str | None = None,
) -> Path:
    """Segment images with a run; goes on where it stopped.

    Args:
      workdir: the run's folder.
      given: files, folders and patterns.
      out: the folder to write.
      kinds: of `KINDS`, what to write beside the classes.
      phase: whose network; by default of the last finished one.

    Raises:
      UserError: no run there, no images, or some that could not be segmented.
    """
    found = find(given, Path(out))
    Segmenter(Model.load(workdir, phase), Path(out), kinds).run(found)
    return Path(out)
