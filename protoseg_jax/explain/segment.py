"""Any number of images, of any sizes, into files: classes, overlays, probabilities, evidence.

```
OUT/
  segment.json            the network, so that nothing else goes on here
  segment.classes.jpg     the classes' colours and names
  segmented.jsonl         a line an image that is done: its name, file, size, time and kinds
  NAME.png                the class of each pixel, indexed, in the run's colours
  NAME.overlay.jpg        the image under its classes' colours
  NAME.probabilities.npz  "probabilities" float16 [H W c], softmax of the upsampled logits
  NAME.evidence.npz       "similarities" [h w m], "logits" [h w c], "prototype" [h w], the number of
                          the winning one, and "novelty" [h w] where prototypes decide, at every
                          point; "corner" [2], "size" [2] and "own" [4] of what they cover and
                          decide; "kernel" [m c]; "prototypes" [m], their numbers
```

Of a run that works in tiles all of the evidence but the last two has a leading axis, a tile each.
NAME is the image's path below what was named, without its suffix. Images are read, and files
written, by threads beside the network, and logits are brought to full size by strips of rows.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import glob
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from protoseg_jax import decoding, images, models
from protoseg_jax.data import tiles
from protoseg_jax.data.pairs import files_below
from protoseg_jax.data.reading import Reading
from protoseg_jax.errors import UserError, full_disk, reason
from protoseg_jax.explain import evidence
from protoseg_jax.explain.model import Model, assemble
from protoseg_jax.files import read_json, write_atomically, write_json
from protoseg_jax.inference import Inference
from protoseg_jax.program import Interrupts
from protoseg_jax.progress import Progress, say

T = TypeVar("T")

KINDS = ("overlay", "probabilities", "evidence")
_ENDINGS = {
    "labels": ".png",
    "overlay": ".overlay.jpg",
    "probabilities": ".probabilities.npz",
    "evidence": ".evidence.npz",
}
_ABOUT, _DONE, _LEGEND = "segment.json", "segmented.jsonl", "segment.classes.jpg"
_LEGEND_WIDTH = 640
_THREADS = 2  # that read, and as many that write
_WILD = set("*?[")


def find(given: Sequence[str], out: Path) -> dict[str, Path]:
    """The images that files, folders (with all below them) and patterns name, by NAME.

    Hidden files are left alone unless named, and so is what lies in `out` or in another folder
    that images were segmented into.

    Raises:
      UserError: nothing is there, or two images would be written to one file.
    """
    found: dict[str, Path] = {}
    out = out.resolve()
    for text in given:
        here = []
        for name, file in _named(text):
            file = file.resolve()
            outputs = file.is_relative_to(out) or any((p / _ABOUT).exists() for p in file.parents)
            if not outputs:
                here.append((name, file))
        if not here:
            raise UserError(
                f"no image at {text!r}; name files, folders or patterns of "
                f"{', '.join(decoding.SUFFIXES)}"
            )
        for name, file in here:
            other = found.setdefault(name, file)
            if other != file:
                raise UserError(
                    f"{other} and {file} would both be written to {name}.png; segment them into "
                    "different folders"
                )
    return found


def _named(text: str) -> Iterator[tuple[str, Path]]:
    """(NAME, file) of the images that an argument names."""
    if not text or "\0" in text:
        return
    if os.path.isfile(text):
        yield Path(text).stem, Path(text)
        return
    base = Path(text)
    if os.path.isdir(text):
        files = files_below(base)
    else:
        base = Path(*itertools.takewhile(lambda part: not _WILD & set(part), base.parts))
        hits = [Path(hit) for hit in glob.glob(_any_case(text), recursive=True)]
        files = itertools.chain.from_iterable(
            files_below(hit) if hit.is_dir() else [hit] for hit in hits
        )
    for file in sorted(set(files)):
        below = file.relative_to(base)
        hidden = any(part.startswith(".") for part in below.parts)
        there = file.is_file() or file.is_symlink()  # a broken link fails, and is told
        if file.suffix.lower() in decoding.SUFFIXES and not hidden and there:
            yield str(below.with_suffix("")), file


def _any_case(pattern: str) -> str:
    """A pattern whose suffix may be of any case, as those of files are."""
    stem, suffix = os.path.splitext(pattern)
    if suffix.lower() not in decoding.SUFFIXES:
        return pattern
    return stem + "".join(f"[{c.lower()}{c.upper()}]" if c.isalpha() else c for c in suffix)


@dataclasses.dataclass
class _Cut:
    """What the network sees at once of an image, and what it said of it (see `model.Part`)."""

    corner: tuple[int, int]
    own: tuple[int, int, int, int]
    size: tuple[int, int]
    pixels: UInt8[np.ndarray, "h w 3"] | None  # at the evaluation size; None once it was seen
    said: dict[str, np.ndarray] | None = None


@dataclasses.dataclass
class _Image:
    """An image on its way."""

    name: str
    path: Path
    size: tuple[int, int]
    about: list[Any]  # of the file when it was read, see `_state`
    cuts: list[_Cut]


def _state(path: Path) -> list[Any]:
    """What tells a file from another, or from what it was before."""
    found = path.stat()
    return [str(path), found.st_size, found.st_mtime_ns]


class Segmenter:
    """Segments images with a run into a folder.

    Args:
      model: the run.
      out: the folder.
      kinds: of `KINDS`, what to write beside the classes.

    Raises:
      UserError: the folder is another network's or cannot be written; or evidence is wanted of a
        black box.
    """

    def __init__(self, model: Model, out: Path, kinds: Sequence[str] = ()):
        if "evidence" in kinds:
            model.require_prototypes()
        self._model, self._out, self._kinds = model, out.resolve(), ("labels", *kinds)
        post_hoc = models.kind(model.experiment.config.model) == "direction"
        self._step = _step(model.inference, "evidence" in kinds, post_hoc)
        self._indices = np.array([p.index for p in model.checkpoint.prototypes], np.uint16)
        self._record = self._claim()

    def _claim(self) -> dict[str, tuple[list[Any], set[str]]]:
        """What is done already, by NAME: the file's state, and the kinds that were written."""
        model = self._model
        stored = read_json(model.workdir.checkpoints.path / f"{model.phase}.json", {})
        about = {"phase": model.phase, "checkpoint": stored.get("sha256")}
        done: dict[str, tuple[list[Any], set[str]]] = {}
        try:
            known = read_json(self._out / _ABOUT)
            if known is not None and {key: known.get(key) for key in about} != about:
                raise UserError(
                    f"{self._out} holds what another network said, of {known.get('run')} after its "
                    f"phase {known.get('phase')}; name another --out"
                )
            write_json(self._out / _ABOUT, {"run": str(model.workdir.path), **about})
            legend = images.encode(model.classes.legend(_LEGEND_WIDTH), ".jpg", 95)
            write_atomically(self._out / _LEGEND, legend)
            with contextlib.suppress(FileNotFoundError):
                for line in (self._out / _DONE).read_text().splitlines():
                    with contextlib.suppress(ValueError):  # cut short when it was killed
                        name, state, kinds = json.loads(line)
                        before = done[name][1] if done.get(name, (None,))[0] == state else set()
                        done[name] = state, before | set(kinds)
        except (OSError, ValueError, AttributeError, TypeError) as error:
            if full_disk(error):
                raise
            raise UserError(
                f"{self._out} cannot be used ({reason(error)}); name another --out"
            ) from error
        return done

    def run(self, found: dict[str, Path]) -> None:
        """Segment images by their names (`find`), those that are not done yet.

        Raises:
          UserError: some images could not be segmented (all others are), or what was named is
            another image of a name that is done.
        """
        for name, path in found.items():
            before = self._record.get(name, ([str(path)],))[0][0]
            if before != str(path):
                raise UserError(
                    f"{self._target(name, 'labels')} is of {before}, not of {path}; name another "
                    "--out"
                )
        left = {name: path for name, path in found.items() if not self._is_done(name, path)}
        if len(left) < len(found):
            say(f"{len(found) - len(left)} of {len(found)} images are done already")
        failed: dict[Path, str] = {}
        readers, writers = (
            concurrent.futures.ThreadPoolExecutor(_THREADS, f"segment-{what}")
            for what in ("reads", "writes")
        )
        pending: collections.deque[tuple[_Image, concurrent.futures.Future]] = collections.deque()

        def settle() -> None:
            image, future = pending.popleft()
            try:
                future.result()
            except UserError as error:
                failed[image.path] = str(error)
            else:
                line = json.dumps([image.name, image.about, list(self._kinds)])
                print(line, file=done, flush=True)
            progress.update(1)

        try:
            with (
                Interrupts(),
                open(self._out / _DONE, "a") as done,
                Progress("segmenting", len(found), len(found) - len(left), "image") as progress,
            ):
                reading = self._read_ahead(left, readers, failed, progress)
                for image in self._seen(reading, self._batch_size(len(found))):
                    pending.append((image, writers.submit(self._write, image)))
                    while len(pending) > 2 * _THREADS:
                        settle()
                while pending:
                    settle()
        finally:
            for pool in (readers, writers):
                pool.shutdown(wait=True, cancel_futures=True)
            for path, text in failed.items():
                say(f"failed: {path}: {text}")
        if failed:
            some = ", ".join(map(str, list(failed)[:5]))
            raise UserError(
                f"{len(failed)} of {len(found)} images could not be segmented: {some}"
                f"{', …' if len(failed) > 5 else ''}; what is wrong with each stands above"
            )

    def _is_done(self, name: str, path: Path) -> bool:
        """Whether all files of an image as it is now are there."""
        state, kinds = self._record.get(name, (None, set()))
        with contextlib.suppress(OSError):
            there = all(self._target(name, kind).exists() for kind in self._kinds)
            return set(self._kinds) <= kinds and state == _state(path) and there
        return False

    def _target(self, name: str, kind: str) -> Path:
        return self._out / f"{name}{_ENDINGS[kind]}"

    def _read_ahead(
        self,
        left: dict[str, Path],
        readers: concurrent.futures.Executor,
        failed: dict[Path, str],
        progress: Progress,
    ) -> Iterator[_Image]:
        """The images in order, some of them read beforehand; those that fail are left out."""
        experiment = self._model.experiment
        in_tiles = experiment.config.eval_overlap is not None  # an image is then many cuts
        ahead = _THREADS if in_tiles else 2 * experiment.eval_batch_size
        waiting: collections.deque[tuple[Path, concurrent.futures.Future]] = collections.deque()
        names = iter(left.items())
        while True:
            for name, path in itertools.islice(names, ahead - len(waiting)):
                waiting.append((path, readers.submit(self._read, name, path)))
            if not waiting:
                return
            path, future = waiting.popleft()
            try:
                image = future.result()
            except UserError as error:
                failed[path] = str(error)
                progress.update(1)
            else:
                yield image

    def _read(self, name: str, path: Path) -> _Image:
        config, inference = self._model.experiment.config, self._model.inference
        try:
            about = _state(path)
        except OSError as error:
            raise UserError(f"it cannot be read ({reason(error)})") from error
        pixels = Reading.of(config).picture(path)
        cuts = [
            _Cut(corner, own, cut.shape[:2], inference.prepare(cut))
            for corner, own, cut in tiles.cuts(pixels, inference.eval_size, config.eval_overlap)
        ]
        return _Image(name, path, pixels.shape[:2], about, cuts)

    def _batch_size(self, count: int) -> int:
        """Of the batches for so many images, an evaluation's or no more than there is to see. Those
        that are done count, so that each start of a command computes the same."""
        experiment = self._model.experiment
        if experiment.config.eval_overlap is not None:  # an image is many cuts
            return experiment.eval_batch_size
        devices = experiment.pool.count
        return min(experiment.eval_batch_size, -(-count // devices) * devices)

    def _seen(self, reading: Iterator[_Image], batch_size: int) -> Iterator[_Image]:
        """The images once the network has said all of them, in order."""
        begun: collections.deque[_Image] = collections.deque()
        queue: collections.deque[list[_Cut]] = collections.deque()

        def cuts() -> Iterator[_Cut]:
            for image in reading:
                begun.append(image)
                yield from image.cuts

        def batches() -> Iterator[dict[str, np.ndarray]]:
            flat = cuts()
            while rows := list(itertools.islice(flat, batch_size)):
                queue.append(rows)
                pixels = np.zeros((batch_size, *rows[0].pixels.shape), np.uint8)
                for n, cut in enumerate(rows):
                    pixels[n], cut.pixels = cut.pixels, None
                yield {"image": pixels}

        outputs = self._model.experiment.pool.outputs(
            self._step, self._model.checkpoint.variables, batches()
        )
        for said in _one_behind(said for _, said in outputs):
            said = {key: np.asarray(x).reshape(-1, *x.shape[2:]) for key, x in said.items()}
            for n, cut in enumerate(queue.popleft()):
                cut.said = {key: x[n] for key, x in said.items()}
            while begun and all(cut.said is not None for cut in begun[0].cuts):
                yield begun.popleft()

    # -- writing -------------------------------------------------------------------------------

    def _write(self, image: _Image) -> None:
        """All files of an image."""
        probabilities = None
        if "probabilities" in self._kinds:
            probabilities = np.zeros((*image.size, len(self._model.classes)), np.float16)
        pieces = ((cut.corner, cut.own, cut.size, cut.said["logits"]) for cut in image.cuts)
        labels = assemble(image.size, pieces, probabilities)
        if probabilities is not None:
            self._save(image.name, "probabilities", {"probabilities": probabilities})
        if "evidence" in self._kinds:
            self._save(image.name, "evidence", self._evidence(image))
        if "overlay" in self._kinds:
            self._put(image.name, "overlay", self._overlay(image.path, labels))
        png = images.palette_png(labels, self._model.classes.colours)
        self._put(image.name, "labels", png)

    def _evidence(self, image: _Image) -> dict[str, np.ndarray]:
        found = []
        for cut in image.cuts:
            said = {**cut.said, "prototype": self._indices[cut.said["prototype"]]}
            places = {key: np.array(getattr(cut, key)) for key in ("corner", "size", "own")}
            found.append({**said, **places})
        if self._model.experiment.config.eval_overlap is None:
            (stacked,) = found
        else:
            stacked = {key: np.stack([one[key] for one in found]) for key in found[0]}
        return {**stacked, "kernel": self._model.kernel, "prototypes": self._indices}

    def _overlay(self, path: Path, labels: UInt8[np.ndarray, "H W"]) -> bytes:
        picture = Reading.of(self._model.experiment.config).picture(path)
        if picture.shape[:2] != labels.shape:
            raise UserError("it changed while it was segmented; start the same command again")
        mixed = cv2.addWeighted(picture, 0.5, self._model.classes.paint(labels), 0.5, 0)
        try:
            return images.encode(mixed, ".jpg", 90)
        except (ValueError, cv2.error) as error:
            raise UserError(f"no overlay can be made of it ({reason(error)})") from error

    def _save(self, name: str, kind: str, arrays: dict[str, np.ndarray]) -> None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        self._put(name, kind, buffer.getbuffer())

    def _put(self, name: str, kind: str, content: bytes | memoryview) -> None:
        path = self._target(name, kind)
        try:
            write_atomically(path, content)
        except OSError as error:
            if full_disk(error):
                raise
            raise UserError(f"{path} cannot be written ({reason(error)})") from error


def _one_behind(items: Iterable[T]) -> Iterator[T]:
    """The items, each once the next has been asked for: the network is at work on a batch while
    what it said of the one before is written."""
    first, second = itertools.tee(items)
    next(first, None)
    for _, item in itertools.zip_longest(first, second):
        yield item


@functools.lru_cache(maxsize=4)
def _step(inference: Inference, with_evidence: bool, post_hoc: bool):
    """step(variables, batch) → what is kept of each image, to be mapped over the devices.

    The same arguments give the same function, so that it is compiled once.
    """

    def step(variables: Any, batch: dict[str, Any]) -> dict[str, Float[Any, "b h w *k"]]:
        output = inference(variables, batch["image"])
        if not with_evidence:
            return {"logits": output.logits}
        found = evidence.explain_points(output, variables["params"]["head"]["kernel"])
        kept = ("similarities", "logits", "prototype", *(() if post_hoc else ("novelty",)))
        return {key: getattr(found, key) for key in kept}

    return step


def segment(
    workdir: str,
    given: Sequence[str],
    out: str,
    kinds: Sequence[str] = (),
    phase: str | None = None,
) -> int:
    """Segment images with a run, and say how many; goes on where it stopped.

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
    return len(found)
