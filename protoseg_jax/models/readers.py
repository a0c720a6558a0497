"""Files of weights, in the forms that people have them, as tensors by name; nothing is executed.

* PyTorch's (`.pth`, `.pt`, `.bin`, `.ckpt`, `.pth.tar`), which `state_dicts` reads: a state dict,
  or a checkpoint with one inside, by one of `STATE_DICTS` (PyTorch Lightning's `.ckpt`, say);
* `.safetensors`, and our own `.npz`;
* several files with an index, as transformers writes them: `model-00001-of-00002.safetensors`, …
  and `model.safetensors.index.json`, which is {"metadata": {…}, "weight_map": {tensor: file}};
  or `pytorch_model.bin.index.json`. Either may be named, the index or one of the files;
* a folder of Hugging Face's hub: `FOLDER_FILES` says which of its files.

The case of a suffix does not matter.
"""

import collections
import json
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from protoseg_jax.errors import UserError, reason
from protoseg_jax.models import pickles, state_dicts, torch_tensors
from protoseg_jax.models.names import named

Tensors = dict[str, np.ndarray]

# Names under which a checkpoint keeps the network's state dict, and one within another.
STATE_DICTS = ("state_dict", "model_state_dict", "model_state", "model", "net")
# The weights of a folder: the first of these that it has, in the order of transformers.
FOLDER_FILES = ("model.safetensors", "model.safetensors.index.json")
FOLDER_FILES += ("pytorch_model.bin", "pytorch_model.bin.index.json")
_INDEX = ".index.json"
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})(\.\w+)")
_FILE = re.compile(r"[^./\\\0][^/\\\0]{0,200}")  # in the same folder, whatever the system
_LARGEST = 2**26  # bytes of an index or a config
_SHARED = 4  # times a file's size: all of its tensors, which may be views of the same numbers


def is_weights(path: str | Path) -> bool:
    """Whether a path is a file that is called like one of weights, or a folder with such a file."""
    path = Path(path)
    if path.is_dir():
        return in_folder(path) is not None
    return _is_index(path) or _format(path) in READERS


def in_folder(folder: str | Path) -> Path | None:
    """The weights' file of a folder of Hugging Face's; None if it has none, as a run's has not."""
    return next((p for n in FOLDER_FILES if (p := Path(folder) / n).is_file()), None)


def locate(path: Path) -> Path:
    """The file to read where a path is a folder's or one of several shards': its index, if any.

    Raises:
      UserError: there is none.
    """
    if path.is_dir():
        found = in_folder(path)
        if found is None:
            raise UserError(
                f"folder {path} holds no weights ({', '.join(FOLDER_FILES)}); name a weights file"
            )
        return found
    shard = _SHARD.fullmatch(path.name)
    if shard and path.is_file():
        index = path.with_name(f"{shard[1]}{shard[3]}{_INDEX}")
        if index.is_file():
            return index
        if int(shard[2]) > 1:
            raise UserError(
                f"weights file {path} is one of {int(shard[2])}, and {index.name}, which says what "
                "is in each, is not beside it; fetch that and the others into that folder"
            )
    return path


def require_known(path: Path) -> None:
    """Refuse a file whose name is none of a weights file or an index."""
    if not _is_index(path) and _format(path) not in READERS:
        raise UserError(
            f"weights file {path} is of an unknown kind; it must be one of "
            f"{', '.join((*READERS, *_FORMATS, _INDEX))}"
        )


def read(path: Path) -> Tensors:
    """What a file that `locate` found, of a known kind, holds.

    Raises:
      UserError: it cannot be read or has not what it should.
    """
    return _read_shards(path) if _is_index(path) else _quietly(READERS[_format(path)], path)


def is_ours(path: Path) -> bool:
    """Whether a file is an `.npz`."""
    return _format(path) == ".npz"


def config(path: Path) -> dict[str, Any]:
    """The `config.json` beside a weights file: what a folder of Hugging Face's says of the network;
    {} without one.

    Raises:
      UserError: it cannot be read.
    """
    beside = path.with_name("config.json")
    return _read_json(beside, "config") if beside.is_file() else {}


def not_ours(path: Path, why: str) -> UserError:
    """What is said of an `.npz` that our `weights.save` has not written."""
    return UserError(
        f"weights file {path} is not one that `protoseg port` wrote ({why}); make it with that "
        "again"
    )


def _is_index(path: Path) -> bool:
    return path.name.lower().endswith(_INDEX)


def _format(path: Path) -> str:
    """The key of `READERS` for a file's name, if any."""
    suffix = path.suffix.lower()
    return _FORMATS.get(suffix, suffix)


def _quietly(reader: Callable[[Path], Any], path: Path) -> Any:
    """What a reader finds in a file.

    The libraries that read raise whatever they meet in bytes that are not theirs (a tokenizer's
    error of NumPy, say), and some warn first: all of it is one line here.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return reader(path)
    except UserError:
        raise
    except Exception as error:
        if is_ours(path):
            raise not_ours(path, reason(error)) from error
        raise UserError(
            f"weights file {path} cannot be read ({reason(error)}); it is cut short or of another "
            "kind than its name says: fetch it again"
        ) from error


# -- one file ----------------------------------------------------------------------------------


def _read_npz(path: Path) -> Tensors:
    with np.load(path, allow_pickle=False) as file:
        return {name: np.asarray(array) for name, array in file.items()}  # bytes, if no array


def _read_torch(path: Path) -> Tensors:
    state = _state_dict(state_dicts.load(path), path)
    size = path.stat().st_size
    for name, tensor in state.items():  # one number may be told to be a thousand
        if tensor.nbytes > size:
            raise ValueError(f"{named([name])} is larger than the file")
    if sum(tensor.nbytes for tensor in state.values()) > _SHARED * size:
        raise ValueError("its tensors share their numbers too often")
    return {name: tensor.array() for name, tensor in state.items()}


def _state_dict(content: Any, path: Path) -> Mapping[str, torch_tensors.Tensor]:
    """The state dict that a PyTorch file is, or has inside.

    Whatever is beside it may be `Inert`; in it nothing may.

    Raises:
      UserError: there is none, or there are two.
    """
    for _ in STATE_DICTS:
        held = content if isinstance(content, Mapping) else {}
        inner = [key for key in STATE_DICTS if isinstance(held.get(key), Mapping)]
        inner = [key for key in inner if _holds_tensors(held[key])] or inner[:1]
        if len(inner) > 1:
            raise UserError(
                f"weights file {path} holds {len(inner)} state dicts ({', '.join(inner)}), but "
                "one is wanted; save that alone: torch.save(state_dict, 'weights.pth')"
            )
        if not inner:
            break
        content = held[inner[0]]
    if isinstance(content, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, torch_tensors.Tensor)
        for name, tensor in content.items()
    ):
        return content
    raise _no_state_dict(content, path)


def _holds_tensors(state: Mapping) -> bool:
    return any(
        isinstance(value, torch_tensors.Tensor)
        or (name in STATE_DICTS and isinstance(value, Mapping))
        for name, value in state.items()
    )


def _no_state_dict(content: Any, path: Path) -> UserError:
    """Why there is none: what is in its place."""
    items = content if isinstance(content, Mapping) else {"": content}
    first = sorted(items, key=lambda name: name not in STATE_DICTS)  # else in their order
    foreign = (x for name in first for x in (name, items[name]) if isinstance(x, pickles.Inert))
    elsewhere = [n for n, x in items.items() if isinstance(x, Mapping) and _holds_tensors(x)]
    if elsewhere:
        return UserError(
            f"weights file {path} holds no state dict by any of {', '.join(STATE_DICTS)}, but "
            f"tensors by {named(map(str, elsewhere))}; save the network's alone: "
            "torch.save(state_dict, 'weights.pth')"
        )
    if (inert := next(foreign, None)) is not None:
        return UserError(
            f"weights file {path} holds more than tensors (a whole module?): "
            f"{named([inert.name])}, of which nothing is read or executed; where its code is, save "
            "torch.save(model.state_dict(), 'weights.pth')"
        )
    return UserError(
        f"weights file {path} holds no state dict (names → tensors); save "
        "torch.save(model.state_dict(), 'weights.pth')"
    )


# By a file's suffix: what reads it.
READERS: dict[str, Callable[[Path], Tensors]] = {
    ".npz": _read_npz,
    ".safetensors": safetensors.numpy.load_file,
    ".pth": _read_torch,
    ".pt": _read_torch,
}
# Other suffixes of those formats.
_FORMATS = dict.fromkeys((".bin", ".ckpt", ".tar"), ".pth")


# -- several files -----------------------------------------------------------------------------


def _read_shards(index: Path) -> Tensors:
    """The tensors of all files that an index names.

    Raises:
      UserError: the index or one of the files cannot be read or is missing, or one has other
        tensors than the index says.
    """
    places = _weight_map(index)
    tensors = {}
    for name in sorted(set(places.values())):
        shard = index.with_name(name)
        if not shard.is_file():
            raise UserError(
                f"weights file {shard} is not there, which {index} names; fetch it into that folder"
            )
        found = _quietly(READERS[_format(shard)], shard)
        here = {tensor for tensor, place in places.items() if place == name}
        missing, others = sorted(here - found.keys()), sorted(found.keys() - here)
        if missing or others:
            what = f"has no {named(missing)}" if missing else f"has {named(others)}, too"
            if not missing and others[0] in places:
                what += f", which is to be in {places[others[0]]}"
            raise UserError(
                f"weights file {shard} {what}; {index} says otherwise: fetch both again, of one "
                "version"
            )
        tensors |= found
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """By tensor the name of the file, which is in the index's folder.

    Raises:
      UserError: the index cannot be read, is none, or names what is no weights file there.
    """
    places = _read_json(index, "index").get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(n, str) for n in places.values()):
        raise UserError(
            f"index {index} has no weight_map of tensors' names to files' names; fetch it again, "
            "or name a weights file"
        )
    for name in places.values():
        known = _format(Path(name)) in READERS and not is_ours(Path(name))
        if not known or not _FILE.fullmatch(name):
            raise UserError(
                f"index {index} names {named([name])!r}, which is no weights file of its folder "
                "(.safetensors or .bin), and nothing else is read; fetch it again"
            )
    return places


def _read_json(path: Path, kind: str) -> dict[str, Any]:
    """The object that a JSON file holds; no name twice in it.

    Raises:
      UserError: it holds none.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"larger than {_LARGEST >> 20} MiB")
        found = json.loads(path.read_bytes(), object_pairs_hook=_once)
        if not isinstance(found, dict):
            raise ValueError("no object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{kind} {path} is no JSON ({reason(error)}); fetch it again") from error
    return found


def _once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        twice, _ = collections.Counter(name for name, _ in items).most_common(1)[0]
        raise ValueError(f"{named([twice])} is in it twice")
    return found
