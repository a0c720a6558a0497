"""Weights from files: tensors by name, every one accounted for, to our parameters.

`readers` reads the files, `names` finds the network in them. A network's module says what its
tensors are called elsewhere and puts them in our names: `port(tensors, where)` → `Ported`, by way
of an `Account`; `ORIGINS` says what comes with the weights of each origin. If a file of some origin
may have a `config.json` beside it that says more, `configured(origin, path)` gives the origin then.
"""

import dataclasses
import hashlib
import importlib.util
import io
import itertools
import re
import types
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from jaxtyping import Float, Int

from protoseg_jax.errors import UserError
from protoseg_jax.files import write_atomically
from protoseg_jax.models import names, readers
from protoseg_jax.models.names import named
from protoseg_jax.models.prototypes import equal_blocks
from protoseg_jax.models.readers import Tensors, not_ours

_CLEAR = 0.25  # by how much a prototype's largest weight must lead to tell its class
_DEEPEST = 16  # levels of a tree of parameters, more than any network's


@dataclasses.dataclass(frozen=True)
class Origin:
    """What comes with weights of an origin (docs/method.md: stride and preprocessing follow it).

    Attributes:
      stride_in: the convolution that strides, as in `resnet.Bottleneck`.
      preprocessing: a name of `models.preprocessing`.
    """

    stride_in: str
    preprocessing: str


@dataclasses.dataclass(frozen=True)
class Package:
    """A Python package that brings weights; nothing is ever fetched.

    Attributes:
      requirement: what pip is asked for.
      module: its name.
      file: of the weights, in it.
      sha256: of that file.
    """

    requirement: str
    module: str
    file: str
    sha256: str

    def find(self) -> Path:
        """The weights' file where the package is installed.

        Raises:
          UserError: it is not, or brings another file.
        """
        spec = importlib.util.find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"the weights come with the Python package {self.module}, which is not installed: "
                f"pip install {self.requirement}"
            )
        path = Path(spec.submodule_search_locations[0]) / self.file
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != self.sha256:
            raise UserError(
                f"weights file {path} is absent or not the one that is known, by its SHA-256; "
                f"install that: pip install --force-reinstall --no-deps {self.requirement}"
            )
        return path


@dataclasses.dataclass
class Ported:
    """Weights in our names and layouts, float32.

    Attributes:
      origin: a key of the network's `ORIGINS`.
      depth: `config.model.depth` of the network.
      params: {"backbone": …}; of a ProtoSeg also its decoder, "prototypes" and "head".
      frozen: {"backbone": …}, the BatchNorms' affine maps.
      prototype_classes: c(j) [M] of a ProtoSeg, else None.
    """

    origin: str
    depth: int
    params: dict[str, Any]
    frozen: dict[str, Any]
    prototype_classes: np.ndarray | None = None


def load(path: str | Path, network: types.ModuleType) -> Ported:
    """Weights for a backbone, which is given by its module, from a file or folder in one of the
    forms of `readers`, or from an installed package, by one of the network's `PACKAGES`.

    Raises:
      UserError: the file is missing, is no weights file, or its tensors are not those of a known
        origin of that network.
    """
    packages = getattr(network, "PACKAGES", {})
    path = packages[str(path)].find() if str(path) in packages else Path(path)
    backbone, origins = network.__name__.rpartition(".")[2], getattr(network, "ORIGINS", {})
    if not path.is_file() and not path.is_dir():
        others = f" (packages of model.backbone={backbone!r}: {', '.join(packages) or 'none'})"
        raise UserError(f"weights file {path} does not exist; set pretrained.path to one{others}")
    path = readers.locate(path)
    readers.require_known(path)
    if not hasattr(network, "port"):
        raise UserError(
            f"weights {path} are of another network: model.backbone is {backbone!r}, for which "
            "none are known; leave pretrained.path out"
        )
    tensors = readers.read(path)
    if readers.is_ours(path):
        found = _ours(tensors, path, network)
    else:
        found = network.port(names.within(tensors, origins, path), path)
        if hasattr(network, "configured"):
            found.origin = network.configured(found.origin, path)
    if found.origin not in origins:
        raise UserError(
            f"weights {path} are of the origin {named([found.origin])}, which {network.__name__} "
            "does not know; port them again, or name it in ORIGINS there"
        )
    return found


def save(ported: Ported, path: str | Path) -> None:
    """Write weights as our `.npz`: arrays by `params/…` and `frozen/…`, no pickle.

    Raises:
      UserError: the file cannot be written.
    """
    trees = {"params": ported.params, "frozen": ported.frozen}
    arrays = traverse_util.flatten_dict(trees, sep="/")
    if ported.prototype_classes is not None:
        arrays["prototype_classes"] = ported.prototype_classes
    buffer = io.BytesIO()
    np.savez(buffer, origin=ported.origin, depth=ported.depth, **arrays)
    try:
        write_atomically(path, buffer.getvalue())
    except PermissionError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); name another") from error


def _ours(arrays: Tensors, path: Path, network: types.ModuleType) -> Ported:
    """The arrays of an `.npz` as what `save` was given.

    Raises:
      UserError: it did not write these.
    """
    rest = dict(arrays)
    origin, depth = rest.pop("origin", None), rest.pop("depth", None)
    if origin is None or origin.shape or origin.dtype.kind != "U":
        raise not_ours(path, "it names no origin")
    if depth is None or depth.shape or depth.dtype.kind not in "iu":
        raise not_ours(path, "it names no depth")
    classes, head = rest.pop("prototype_classes", None), rest.get("params/head/kernel")
    for name, array in rest.items():
        collection, *inner = name.split("/")
        if collection not in ("params", "frozen") or not 2 <= len(inner) <= _DEEPEST:
            raise not_ours(path, f"{named([name])} is none of its names")
        if array.dtype != np.float32 or not np.isfinite(array).all():
            raise not_ours(path, f"{named([name])} is not of finite float32 numbers")
    folders = sorted(f"{name}/" for name in rest)
    for folder, following in itertools.pairwise(folders):
        if following.startswith(folder):
            raise not_ours(path, f"{named([folder])} is an array, too")
    backbone = next(iter(network.GROUPS))
    if not any(folder.startswith(f"params/{backbone}/") for folder in folders):
        raise not_ours(path, f"it holds no {backbone}")
    if classes is not None or head is not None:
        if not _are_classes(classes, head):
            raise not_ours(path, "its prototypes' classes are not those of its last layer")
        classes = classes.astype(np.int64)
    trees = {"params": {}, "frozen": {}, **traverse_util.unflatten_dict(rest, sep="/")}
    return Ported(str(origin), int(depth), trees["params"], trees["frozen"], classes)


def _are_classes(classes: np.ndarray | None, w_h: np.ndarray | None) -> bool:
    """Whether these are c(j) [M] of a last layer [M, C]."""
    if classes is None or w_h is None or w_h.ndim != 2 or classes.dtype.kind not in "iu":
        return False
    inside = (classes >= 0) & (classes < w_h.shape[1])
    return classes.shape == w_h.shape[:1] and bool(inside.all())


class Account:
    """A state dict of which every tensor is taken, ignored, or complained of."""

    def __init__(self, tensors: Tensors):
        self.tensors, self.used = tensors, set()
        kinds = ("missing", "of another shape", "not numbers", "not finite", "without a scale")
        self.wrong: dict[str, list[str]] = {kind: [] for kind in kinds}

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor as float32; −1 in `shape` is any size but 0; a zero in place of what is wrong,
        whose every axis is 1."""
        nothing = np.zeros([1] * len(shape), np.float32)
        if name not in self.tensors:
            self.wrong["missing"].append(name)
            return nothing
        self.used.add(name)
        tensor = np.asarray(self.tensors[name])
        fits = len(tensor.shape) == len(shape)
        if not fits or any(
            m == 0 or n not in (-1, m) for n, m in zip(shape, tensor.shape, strict=True)
        ):
            wanted = "×".join("…" if n < 0 else str(n) for n in shape)
            shown = f"{named([name])} ({'×'.join(map(str, tensor.shape))}, not {wanted})"
            self.wrong["of another shape"].append(shown)
            return nothing
        if not np.can_cast(tensor.dtype, np.float32, "same_kind"):  # complex numbers, strings
            self.wrong["not numbers"].append(name)
            return nothing
        with np.errstate(over="ignore"):
            tensor = tensor.astype(np.float32, copy=False)
        if not np.isfinite(tensor).all():
            self.wrong["not finite"].append(name)
            return nothing
        return tensor

    def kernel(self, name: str, shape: tuple[int, int, int, int]) -> Float[np.ndarray, "k k i o"]:
        """A convolution's weights from PyTorch's layout, whose shape is (o, i, k, k)."""
        return np.ascontiguousarray(self.take(name, shape).transpose(2, 3, 1, 0))

    def affine(
        self, name: str, channels: int, epsilon: float = 1e-5
    ) -> dict[str, Float[np.ndarray, " c"]]:
        """A BatchNorm as `FrozenBatchNorm`: scale = γ / √(σ² + ε), bias = β − μ · scale; ε by
        default PyTorch's."""
        gamma, beta, mean, variance = (
            self.take(f"{name}.{n}", (channels,))
            for n in ("weight", "bias", "running_mean", "running_var")
        )
        # In float64, so that folding costs no digits.
        with np.errstate(invalid="ignore", over="ignore"):  # σ² < 0; γ beyond float32 by σ
            scale = gamma / np.sqrt(variance.astype(np.float64) + epsilon)
            bias = (beta - mean * scale).astype(np.float32)
            scale = scale.astype(np.float32)
        if not (np.isfinite(scale).all() and np.isfinite(bias).all() and (variance >= 0).all()):
            self.wrong["without a scale"].append(name)
        return {"scale": scale, "bias": bias}

    def settle(self, where: Any, kind: str, ignored: str) -> None:
        """Complain in one line of what in file `where` does not fit a `kind` of network; names of
        the pattern `ignored` and BatchNorms' counters need not have been taken.

        Raises:
          UserError: something does not fit.
        """
        known = re.compile(rf".*\.num_batches_tracked|{ignored}")
        left = [n for n in self.tensors if n not in self.used and not known.fullmatch(n)]
        parts = [
            f"{len(those)} {what}: {named(those)}"
            for what, those in {**self.wrong, "not expected": left}.items()
            if those
        ]
        if near := [n for m in self.wrong["missing"][:1] if (n := names.nearest(m, left))]:
            parts.append(f"nearest to {named(self.wrong['missing'][:1])} is {named(near)}")
        if parts:
            raise UserError(
                f"weights {where} are not those of a {kind} ({'; '.join(parts)}); "
                "use a file of that network"
            )


def prototype_classes(w_h: Float[np.ndarray, "m c"], where: Any) -> Int[np.ndarray, " m"]:
    """c(j) of a trained last layer of file `where`; the authors' state dict does not hold it.

    Blocks of M / C where that is a whole number and no prototype's weights clearly say otherwise;
    else (a pruned model) each prototype's largest weight.

    Raises:
      UserError: a prototype's class is not clear.
    """
    count, num_classes = w_h.shape
    ordered = np.sort(w_h, axis=1)
    with np.errstate(over="ignore"):
        lead = ordered[:, -1] - (ordered[:, -2] if num_classes > 1 else 0.0)
    clear = (lead >= _CLEAR) & (ordered[:, -1] > 0)
    largest = w_h.argmax(axis=1)
    blocks = equal_blocks(count, num_classes)
    if count % num_classes == 0 and (blocks == largest)[clear].all():
        return blocks
    if not clear.all():
        unclear = named(map(str, np.flatnonzero(~clear)))
        raise UserError(
            f"weights {where}: the class of prototype {unclear} is not clear from "
            "last_layer.weight; port the model from before its pruning"
        )
    return largest
