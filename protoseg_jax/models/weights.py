"""Weights from files: tensors by name, every one accounted for, to our parameters.

Files: `.pth`/`.pt` (needs PyTorch; read with `weights_only=True`, so nothing in them is executed),
`.safetensors`, and our own `.npz`. A network's module says what its tensors are called elsewhere
and puts them in our names: `port(tensors, where)` → `Ported`, by way of an `Account`; `ORIGINS`
says what comes with the weights of each origin.
"""

import dataclasses
import io
import pickle
import re
import types
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from flax import traverse_util
from jaxtyping import Float, Int

from protoseg_jax.errors import UserError, reason
from protoseg_jax.files import write_atomically
from protoseg_jax.models.prototypes import equal_blocks

BATCH_NORM_EPSILON = 1e-5
_CLEAR = 0.25  # by how much a prototype's largest weight must lead to tell its class
NAMED = 4  # tensors named in a message, of each kind

Tensors = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Origin:
    """What comes with weights of an origin (docs/method.md: stride and preprocessing follow it).

    Attributes:
      stride_in: the convolution that strides, as in `resnet.Bottleneck`.
      preprocessing: a name of `models.preprocessing`.
    """

    stride_in: str
    preprocessing: str


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
    """Weights from a file for a backbone, which is given by its module.

    Raises:
      UserError: the file is missing, is no weights file, or its tensors are not those of a known
        origin of that network.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights file {path} does not exist; set pretrained.path to one")
    if path.suffix not in READERS:
        raise UserError(
            f"weights file {path} is of an unknown kind; it must be one of {', '.join(READERS)}"
        )
    if not hasattr(network, "port"):
        raise UserError(
            f"weights {path} are of another network: model.backbone is "
            f"{network.__name__.rpartition('.')[2]!r}, for which none are known; leave "
            "pretrained.path out"
        )
    try:
        found = READERS[path.suffix](path)
    except _UNREADABLE as error:
        what = "cannot be read", "it is cut short or of another kind than its name says: fetch it"
        if path.suffix == ".npz":
            what = "is not one that `protoseg port` wrote", "make it with that"
        raise UserError(
            f"weights file {path} {what[0]} ({reason(error)}); {what[1]} again"
        ) from error
    if not isinstance(found, Ported):
        found = network.port(found, path)
    if found.origin not in getattr(network, "ORIGINS", {}):
        raise UserError(
            f"weights {path} are of the origin {found.origin!r}, which {network.__name__} does not "
            "know; port them again, or name it in ORIGINS there"
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


def _read_npz(path: Path) -> Ported:
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    origin, depth = str(arrays.pop("origin")), int(arrays.pop("depth"))
    classes = arrays.pop("prototype_classes", None)
    trees = traverse_util.unflatten_dict(arrays, sep="/")
    return Ported(origin, depth, trees["params"], trees["frozen"], classes)


def _read_torch(path: Path) -> Tensors:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"reading {path} needs PyTorch: pip install torch, or where it is installed turn the "
            "file into an .npz with `protoseg port`"
        ) from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not zipfile.is_zipfile(path) and not path.read_bytes()[:1] == b"\x80":
            raise  # a download's error page, say
        raise UserError(
            f"weights file {path} holds more than tensors (a whole module?), which would have to "
            "be executed; where its code is, save torch.save(model.state_dict(), 'weights.pth')"
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(torch.is_tensor(t) for t in state.values()):
        raise UserError(
            f"weights file {path} holds no state dict (names → tensors); save "
            "torch.save(model.state_dict(), 'weights.pth')"
        )
    return {name: tensor.float().numpy() for name, tensor in state.items()}


# By a file's suffix: what reads it.
READERS: dict[str, Callable[[Path], Tensors | Ported]] = {
    ".npz": _read_npz,
    ".safetensors": safetensors.numpy.load_file,
    ".pth": _read_torch,
    ".pt": _read_torch,
}
# What they raise of a file that is cut short or of another kind.
_UNREADABLE = (
    *(OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError),
    *(zipfile.BadZipFile, pickle.UnpicklingError, safetensors.SafetensorError),
)


class Account:
    """A state dict of which every tensor is taken, ignored, or complained of."""

    def __init__(self, tensors: Tensors):
        self.tensors, self.used = tensors, set()
        self.wrong: dict[str, list[str]] = {"missing": [], "of another shape": []}

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor as float32; −1 in `shape` is any size; zeros in place of what is wrong."""
        empty = np.zeros([max(n, 1) for n in shape], np.float32)
        if name not in self.tensors:
            self.wrong["missing"].append(name)
            return empty
        self.used.add(name)
        tensor = np.asarray(self.tensors[name], np.float32)
        fits = len(tensor.shape) == len(shape)
        if not fits or any(n not in (-1, m) for n, m in zip(shape, tensor.shape, strict=True)):
            wanted = "×".join("…" if n < 0 else str(n) for n in shape)
            shown = f"{name} ({'×'.join(map(str, tensor.shape))}, not {wanted})"
            self.wrong["of another shape"].append(shown)
            return empty
        return tensor

    def kernel(self, name: str, shape: tuple[int, int, int, int]) -> Float[np.ndarray, "k k i o"]:
        """A convolution's weights from PyTorch's layout, whose shape is (o, i, k, k)."""
        return np.ascontiguousarray(self.take(name, shape).transpose(2, 3, 1, 0))

    def affine(self, name: str, channels: int) -> dict[str, Float[np.ndarray, " c"]]:
        """A BatchNorm as `FrozenBatchNorm`: scale = γ / √(σ² + ε), bias = β − μ · scale."""
        gamma, beta, mean, variance = (
            self.take(f"{name}.{n}", (channels,))
            for n in ("weight", "bias", "running_mean", "running_var")
        )
        # In float64, so that folding costs no digits.
        scale = gamma / np.sqrt(variance.astype(np.float64) + BATCH_NORM_EPSILON)
        bias = beta - mean * scale
        return {"scale": scale.astype(np.float32), "bias": bias.astype(np.float32)}

    def settle(self, where: Any, kind: str, ignored: str) -> None:
        """Complain in one line of what in file `where` does not fit a `kind` of network; names of
        the pattern `ignored` and BatchNorms' counters need not have been taken.

        Raises:
          UserError: something does not fit.
        """
        known = re.compile(rf".*\.num_batches_tracked|{ignored}")
        left = [n for n in self.tensors if n not in self.used and not known.fullmatch(n)]
        infinite = [n for n in self.used if not np.isfinite(self.tensors[n]).all()]
        parts = [
            f"{len(names)} {what}: {', '.join(names[:NAMED])}{', …' * (len(names) > NAMED)}"
            for what, names in {**self.wrong, "not expected": left, "not finite": infinite}.items()
            if names
        ]
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
    lead = ordered[:, -1] - (ordered[:, -2] if num_classes > 1 else 0.0)
    clear = (lead >= _CLEAR) & (ordered[:, -1] > 0)
    largest = w_h.argmax(axis=1)
    blocks = equal_blocks(count, num_classes)
    if count % num_classes == 0 and (blocks == largest)[clear].all():
        return blocks
    if not clear.all():
        unclear = ", ".join(map(str, np.flatnonzero(~clear)[:NAMED]))
        raise UserError(
            f"weights {where}: the class of prototype {unclear} is not clear from "
            "last_layer.weight; port the model from before its pruning"
        )
    return largest
