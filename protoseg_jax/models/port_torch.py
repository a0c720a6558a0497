"""PyTorch weights: state dicts of three origins → our parameters.

* `torchvision`: `layer1.0.conv1.weight`, `layer1.0.bn1.running_var`, … The backbone is taken, `fc`
  is ignored.
* `deeplab`: `layer1.conv1.conv.weight`, `layer2.block1.reduce.bn.weight`, … of the PyTorch port of
  DeepLabv2 (COCO). The backbone is taken, the classifier (`aspp`, `fc`) is ignored.
* `protoseg`: the same below `features.base.`, with `prototype_vectors` and `last_layer.weight`, of
  the authors' code. Everything is taken but `ones`.

Files: `.pth`/`.pt` (needs PyTorch; read with `weights_only=True`, so nothing in them is executed),
`.safetensors`, and our own `.npz`. Every tensor is accounted for: what is missing, not expected or
of another shape is named. BatchNorm becomes the affine map of `FrozenBatchNorm`.

    python -m protoseg_jax.models.port_torch SRC DST.npz
    python -m protoseg_jax.models.port_torch SRC WORKDIR --config=configs/pascal.py [--config.key=…]

The second form writes a trained ProtoSeg as a run's folder, its joint phase finished, for eval.py
and for train.py, which goes on with projection: a state dict does not say where its prototypes
come from.
"""

import dataclasses
import io
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from protoseg_jax.errors import UserError, reason
from protoseg_jax.models.prototypes import equal_blocks
from protoseg_jax.models.resnet import BLOCKS
from protoseg_jax.workdir import write_atomically

BATCH_NORM_EPSILON = 1e-5
_CLEAR = 0.25  # by how much a prototype's largest weight must lead to tell its class
_NAMED = 4  # tensors named in a message, of each kind
_NORM = ("weight", "bias", "running_mean", "running_var")

Tensors = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Origin:
    """What comes with weights of an origin (METHOD: stride and preprocessing follow the weights).

    Attributes:
      stride_in: the convolution that strides, as in `resnet.Bottleneck`.
      preprocessing: a name of `data.preprocessing`.
    """

    stride_in: str
    preprocessing: str


ORIGINS = {
    "torchvision": Origin("3x3", "imagenet"),
    "deeplab": Origin("1x1", "caffe"),
    # Trained by the released code, which feeds ImageNet's RGB whatever it started from.
    "protoseg": Origin("1x1", "imagenet"),
}


@dataclasses.dataclass
class Ported:
    """Weights in our names and layouts, float32.

    Attributes:
      origin: a key of `ORIGINS`.
      depth: of the ResNet, a key of `resnet.BLOCKS`.
      params: {"backbone": …}; of a ProtoSeg also "aspp", "prototypes" and "head".
      frozen: {"backbone": …}, the BatchNorms' affine maps.
      prototype_classes: c(j) [M] of a ProtoSeg, else None.
    """

    origin: str
    depth: int
    params: dict[str, Any]
    frozen: dict[str, Any]
    prototype_classes: np.ndarray | None = None


# -- reading files -----------------------------------------------------------------------------


def load(path: str | Path) -> Ported:
    """Weights from a `.pth`, `.pt`, `.safetensors` or `.npz` file.

    Raises:
      UserError: the file is missing, is no weights file, or its tensors are not those of a known
        origin.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights file {path} does not exist; set pretrained.path to one")
    if path.suffix not in READERS:
        raise UserError(
            f"weights file {path} is of an unknown kind; it must be one of {', '.join(READERS)}"
        )
    found = READERS[path.suffix](path)
    return found if isinstance(found, Ported) else port(found, path)


def _read_torch(path: Path) -> Tensors:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"reading {path} needs PyTorch: pip install torch, or where it is installed turn the "
            "file into an .npz with python -m protoseg_jax.models.port_torch"
        ) from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not zipfile.is_zipfile(path) and not path.read_bytes()[:1] == b"\x80":
            raise _damaged(path, error) from error  # a download's error page, say
        raise UserError(
            f"weights file {path} holds more than tensors (a whole module?), which would have to "
            "be executed; where its code is, save torch.save(model.state_dict(), 'weights.pth')"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(torch.is_tensor(t) for t in state.values()):
        raise UserError(
            f"weights file {path} holds no state dict (names → tensors); save "
            "torch.save(model.state_dict(), 'weights.pth')"
        )
    return {name: tensor.float().numpy() for name, tensor in state.items()}


def _read_safetensors(path: Path) -> Tensors:
    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error


def _read_npz(path: Path) -> Ported:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        origin, depth = str(arrays.pop("origin")), int(arrays.pop("depth"))
        classes = arrays.pop("prototype_classes", None)
        trees = traverse_util.unflatten_dict(arrays, sep="/")
        if origin not in ORIGINS:
            raise ValueError(f"its origin {origin!r} is unknown")
        return Ported(origin, depth, trees["params"], trees["frozen"], classes)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"weights file {path} is not one of port_torch's ({reason(error)}); make it again "
            "with python -m protoseg_jax.models.port_torch"
        ) from error


# By a file's suffix: what reads it.
READERS: dict[str, Callable[[Path], Tensors | Ported]] = {
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".pth": _read_torch,
    ".pt": _read_torch,
}


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


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"weights file {path} cannot be read ({reason(error)}); it is cut short or of another "
        "kind than its name says: fetch it again"
    )


# -- names -------------------------------------------------------------------------------------


def _torchvision(path: tuple[str, ...]) -> tuple[str, str]:
    """Our module → (convolution, BatchNorm), for the module of a convolution."""
    if len(path) == 1:
        return "conv1", "bn1"
    block, conv = path[0].replace("_", "."), path[1]
    if conv == "downsample_conv":
        return f"{block}.downsample.0", f"{block}.downsample.1"
    return f"{block}.{conv}", f"{block}.{conv.replace('conv', 'bn')}"


_DEEPLAB = {
    "conv1": "reduce",
    "conv2": "conv3x3",
    "conv3": "increase",
    "downsample_conv": "shortcut",
}


def _deeplab(path: tuple[str, ...]) -> tuple[str, str]:
    """As `_torchvision`; DeepLab's layer1 is the stem and its blocks count from 1."""
    name = "layer1.conv1"
    if len(path) > 1:
        stage, block = re.fullmatch(r"layer(\d)_(\d+)", path[0]).groups()
        name = f"layer{int(stage) + 1}.block{int(block) + 1}.{_DEEPLAB[path[1]]}"
    return f"{name}.conv", f"{name}.bn"


def convolutions(depth: int, width: int) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Our path and PyTorch's shape (out, in, k, k) of every convolution of a ResNet."""
    yield ("conv1",), (width, 3, 7, 7)
    channels = width
    for stage, blocks in enumerate(BLOCKS[depth]):
        inner = width * 2**stage
        for block in range(blocks):
            name = f"layer{stage + 1}_{block}"
            if block == 0:
                yield (name, "downsample_conv"), (4 * inner, channels, 1, 1)
            yield (name, "conv1"), (inner, channels, 1, 1)
            yield (name, "conv2"), (inner, inner, 3, 3)
            yield (name, "conv3"), (4 * inner, inner, 1, 1)
            channels = 4 * inner


class _Account:
    """A state dict of which every tensor is taken, ignored, or complained of."""

    def __init__(self, tensors: Tensors):
        self.tensors = tensors
        self.missing: list[str] = []
        self.misshaped: list[str] = []
        self.used: set[str] = set()

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor as float32; −1 in `shape` is any size; zeros in place of what is wrong."""
        empty = np.zeros([max(n, 1) for n in shape], np.float32)
        if name not in self.tensors:
            self.missing.append(name)
            return empty
        self.used.add(name)
        tensor = np.asarray(self.tensors[name], np.float32)
        fits = len(tensor.shape) == len(shape)
        if not fits or any(n not in (-1, m) for n, m in zip(shape, tensor.shape, strict=True)):
            wanted = "×".join("…" if n < 0 else str(n) for n in shape)
            self.misshaped.append(f"{name} ({'×'.join(map(str, tensor.shape))}, not {wanted})")
            return empty
        return tensor

    def settle(self, where: Any, kind: str, ignored: Callable[[str], bool]) -> None:
        """Complain of what does not fit, in one line.

        Raises:
          UserError: something does not.
        """
        unexpected = [n for n in self.tensors if n not in self.used and not ignored(n)]
        infinite = [n for n in self.used if not np.isfinite(self.tensors[n]).all()]
        parts = [
            f"{len(names)} {what}: {', '.join(names[:_NAMED])}{', …' * (len(names) > _NAMED)}"
            for what, names in (
                ("missing", self.missing),
                ("of another shape", self.misshaped),
                ("not expected", unexpected),
                ("not finite", infinite),
            )
            if names
        ]
        if parts:
            raise UserError(
                f"weights {where} are not those of a {kind} ({'; '.join(parts)}); "
                "use a file of that network"
            )


# -- porting -----------------------------------------------------------------------------------


def port(tensors: Tensors, where: Any) -> Ported:
    """A state dict of any known origin in our names.

    Args:
      tensors: arrays by name, as PyTorch lays them out.
      where: the file's name, for messages.

    Raises:
      UserError: the names are of no known origin, or tensors are missing, unexpected or of
        another shape.
    """
    for prefix in ("module.", "features.base.", "features.", "base."):
        bare = {n.removeprefix(prefix): t for n, t in tensors.items()}
        if len(bare) < len(tensors):
            twice = next(n for n in tensors if n.startswith(prefix) and n[len(prefix) :] in tensors)
            raise UserError(
                f"weights {where} hold both {twice} and {twice[len(prefix) :]}; leave one of the "
                "two networks in the file"
            )
        tensors = bare
    if "layer1.0.conv1.weight" in tensors:
        origin, names = "torchvision", _torchvision
        blocks = _count_blocks(tensors, r"layer{}\.(\d+)\.", first_stage=1)
    elif "layer1.conv1.conv.weight" in tensors:
        origin, names = "deeplab", _deeplab
        blocks = _count_blocks(tensors, r"layer{}\.block(\d+)\.", first_stage=2)
        if "prototype_vectors" in tensors:
            origin = "protoseg"
    else:
        some = ", ".join(list(tensors)[:_NAMED]) or "none"
        raise UserError(
            f"weights {where} are of an unknown network (its tensors: {some}, …); known are "
            "torchvision's ResNets, the PyTorch DeepLabv2 port and the authors' ProtoSeg"
        )
    depths = {counts: depth for depth, counts in BLOCKS.items()}
    if blocks not in depths or (origin == "torchvision" and "layer1.0.conv3.weight" not in tensors):
        raise UserError(
            f"weights {where} are of a ResNet that is not supported ({blocks} blocks in its "
            f"stages); use bottleneck ones, of depth {', '.join(map(str, BLOCKS))}"
        )
    depth, account = depths[blocks], _Account(tensors)
    stem = tensors.get(names(("conv1",))[0] + ".weight")
    width = stem.shape[0] if stem is not None and stem.ndim else 64
    params, frozen = _backbone(account, names, depth, width)
    ported = Ported(origin, depth, {"backbone": params}, {"backbone": frozen})
    if origin == "protoseg":
        _add_protoseg(account, ported, channels=32 * width)
    account.settle(where, f"{origin} ResNet-{depth}", lambda name: _ignored(name, origin))
    if origin == "protoseg":
        ported.prototype_classes = prototype_classes(ported.params["head"]["kernel"], where)
    return ported


def _count_blocks(tensors: Tensors, pattern: str, first_stage: int) -> tuple[int, ...]:
    stages = [re.compile(pattern.format(first_stage + stage)) for stage in range(4)]
    return tuple(len({m[1] for n in tensors if (m := stage.match(n))}) for stage in stages)


def _ignored(name: str, origin: str) -> bool:
    if name.endswith(".num_batches_tracked"):
        return True
    if origin == "protoseg":
        return name == "ones"
    classifier = r"fc\.(weight|bias)" + (r"|aspp\.c\d\.(weight|bias)" * (origin == "deeplab"))
    return re.fullmatch(classifier, name) is not None


def _kernel(weight: np.ndarray) -> np.ndarray:
    """Out, in, k, k → k, k, in, out."""
    return np.ascontiguousarray(weight.transpose(2, 3, 1, 0))


def _backbone(
    account: _Account, names: Callable, depth: int, width: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parameters, frozen affine maps): scale = γ / √(σ² + ε), bias = β − μ · scale."""
    params, frozen = {}, {}
    for path, shape in convolutions(depth, width):
        conv, norm = names(path)
        params[*path, "kernel"] = _kernel(account.take(f"{conv}.weight", shape))
        gamma, beta, mean, variance = (account.take(f"{norm}.{n}", shape[:1]) for n in _NORM)
        # In float64, so that folding costs no digits.
        scale = gamma / np.sqrt(variance.astype(np.float64) + BATCH_NORM_EPSILON)
        place = (*path[:-1], path[-1].replace("conv", "norm"))
        frozen[*place, "scale"] = scale.astype(np.float32)
        frozen[*place, "bias"] = (beta - mean * scale).astype(np.float32)
    return traverse_util.unflatten_dict(params), traverse_util.unflatten_dict(frozen)


def _add_protoseg(account: _Account, ported: Ported, channels: int) -> None:
    """The ASPP, the prototypes and the last layer of the authors' ProtoSeg."""
    vectors = account.take("prototype_vectors", (-1, -1, 1, 1))[:, :, 0, 0]
    count, features = vectors.shape
    branches = sorted(n for n in account.tensors if re.fullmatch(r"aspp\.c\d\.weight", n))
    ported.params["aspp"] = {
        name.split(".")[1]: {
            "kernel": _kernel(account.take(name, (features, channels, 3, 3))),
            "bias": account.take(name.replace("weight", "bias"), (features,)),
        }
        for name in branches or ["aspp.c0.weight"]
    }
    last = account.tensors.get("last_layer.weight")
    trailing = (1, 1) if last is not None and last.ndim == 4 else ()
    kernel = account.take("last_layer.weight", (-1, count, *trailing))
    ported.params["prototypes"] = {"vectors": vectors}
    ported.params["head"] = {"kernel": np.ascontiguousarray(kernel.reshape(-1, count).T)}


def prototype_classes(w_h: np.ndarray, where: Any) -> np.ndarray:
    """c(j) [M] of a trained last layer, which the authors' state dict does not hold.

    Blocks of M / C where that is a whole number and no prototype's weights clearly say otherwise;
    else (a pruned model) each prototype's largest weight.

    Args:
      w_h: [M, C].
      where: the file's name, for messages.

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
        unclear = ", ".join(map(str, np.flatnonzero(~clear)[:_NAMED]))
        raise UserError(
            f"weights {where}: the class of prototype {unclear} is not clear from "
            "last_layer.weight; port the model from before its pruning"
        )
    return largest


def _main(source: str, target: str) -> None:
    from protoseg_jax.training import run

    if Path(target).suffix == ".npz":
        save(load(source), target)
    elif _CONFIG.value is None:
        raise UserError(f"{target} is no .npz; to write a run's folder, give its --config too")
    else:
        run.write_ported(_CONFIG.value, source, target)
    print(f"{source} → {target}")


if __name__ == "__main__":
    from ml_collections import config_flags

    from protoseg_jax import errors

    _CONFIG = config_flags.DEFINE_config_file("config", help_string="The run's config.")
    errors.run(_main, arguments=("SRC", "DST"))
