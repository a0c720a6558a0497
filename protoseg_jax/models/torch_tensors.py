"""What pickles in PyTorch's files name: tensors, as views of storages, without PyTorch."""

import collections
import dataclasses
import math
import sys
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np

from protoseg_jax.models import pickles

_NUMPY = ("float64", "float32", "float16", "complex64", "complex128", "bool")
_NUMPY += ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
_OTHERS = ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
_OTHERS += ("float8_e8m0fnu",)

# By PyTorch's names.
DTYPES = {
    **{name: np.dtype(name) for name in _NUMPY},
    **{name: np.dtype(getattr(ml_dtypes, name)) for name in _OTHERS},
}
_STORAGES = {
    **{"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16"},
    **{"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8"},
    **{"Bool": "bool", "ComplexFloat": "complex64", "ComplexDouble": "complex128"},
    # Quantised; what is made of them is not known, only how long they are.
    **{"QInt8": "int8", "QUInt8": "uint8", "QInt32": "int32"},
    **{"QUInt4x2": "uint8", "QUInt2x4": "uint8"},
}


@dataclasses.dataclass
class Storage:
    """A row of numbers of a file, of which tensors are views.

    Attributes:
      dtype: what it is counted in.
      count: how many numbers it is said to hold.
      content: its bytes, once they are found.
      byteorder: "little" or "big".
    """

    dtype: np.dtype
    count: int
    content: memoryview = memoryview(b"")
    byteorder: str = "little"

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor within its storage; offset and strides are in numbers of its dtype."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def array(self) -> np.ndarray:
        """A copy [*shape]: of floating-point numbers as float32, of others as they are."""
        floating = self.dtype.kind in "fV"  # V: those of ml_dtypes
        kind = np.dtype(np.float32) if floating else self.dtype
        if 0 in self.shape:
            return np.zeros(self.shape, kind)
        size = self.dtype.itemsize
        place = self.storage.content, self.offset * size, [n * size for n in self.strides]
        view = np.ndarray(self.shape, self.dtype, *place)
        if self.storage.byteorder != sys.byteorder:
            view = view.byteswap()
        return np.array(view, kind)


def storage(known: dict[str, Storage], identity: Any) -> Storage:
    """The storage of an identity, which `known` is told by its key.

    Identities are ("storage", dtype, key, device, count), in files before 1.6 with None behind it
    (there were views of storages once).

    Raises:
      ValueError: it is no such identity, or another of a known key.
    """
    match identity:
        case ("storage", np.dtype() as dtype, str() as key, _, int() as count, *view):
            if count < 0 or view not in ([], [None]):
                raise ValueError("a storage in it is of an unknown kind")
            found = known.setdefault(key, Storage(dtype, count))
            if (found.dtype, found.count) != (dtype, count):
                raise ValueError("a storage in it is described in two ways")
            return found
    raise ValueError("a storage in it is described as in no file of PyTorch's")


def _tensor(
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    _requires_grad: bool = False,
    _hooks: Any = None,
    metadata: Any = None,
    dtype: np.dtype | None = None,
) -> Tensor:
    dtype = storage.dtype if dtype is None else dtype
    if not isinstance(storage, Storage) or not isinstance(dtype, np.dtype):
        raise TypeError
    if type(shape) is not tuple or type(strides) is not tuple:
        raise TypeError
    if any(type(n) is not int or not 0 <= n < 2**63 for n in (offset, *shape, *strides)):
        raise ValueError("a tensor in it has sizes that are none")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if 0 not in shape and (last + 1) * dtype.itemsize > storage.nbytes:
        raise ValueError("a tensor in it reaches beyond its storage")
    if metadata:
        raise ValueError("a tensor in it is another's conjugate or negative")
    return Tensor(storage, dtype, offset, shape, strides)


def _tensor_v3(storage, offset, shape, strides, grad, hooks, dtype, metadata=None) -> Tensor:
    return _tensor(storage, offset, shape, strides, grad, hooks, metadata, dtype)


def _parameter(data: Tensor, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise TypeError
    return data


def _ordered_dict(items: Iterable[tuple[str, Any]] = ()) -> collections.OrderedDict:
    """Python 2 wrote its items as a list, Python 3 sets them afterwards."""
    found = collections.OrderedDict()
    pickles.update(found, items)
    return found


def _counter(counts: dict[Any, int]) -> dict[Any, int]:
    """In the state of a learning rate's schedule."""
    return counts


def _size(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return sizes


# By "module name": functions that are called in the place of PyTorch's, and what types stand for.
GLOBALS: dict[str, Any] = {
    "collections OrderedDict": _ordered_dict,
    "collections Counter": _counter,
    "torch Size": _size,
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor_v3": _tensor_v3,
    "torch._utils _rebuild_parameter": _parameter,
    "torch._utils _rebuild_parameter_with_state": _parameter,
    "torch.storage UntypedStorage": DTYPES["uint8"],
    **{f"torch {name}": dtype for name, dtype in DTYPES.items()},
    **{f"torch {name}Storage": DTYPES[dtype] for name, dtype in _STORAGES.items()},
    **{f"torch.cuda {name}Storage": DTYPES[dtype] for name, dtype in _STORAGES.items()},
}
