"""Files as `torch.save` writes them, in both its forms, made without PyTorch."""

import dataclasses
import io
import pickle
import struct
import sys
import zipfile
from typing import Any

import numpy as np

STORAGES = {
    **{"float64": "Double", "float32": "Float", "float16": "Half", "bfloat16": "BFloat16"},
    **{"int64": "Long", "int32": "Int", "int16": "Short", "int8": "Char", "uint8": "Byte"},
    **{"bool": "Bool", "complex64": "ComplexFloat", "complex128": "ComplexDouble"},
}
MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001


@dataclasses.dataclass(frozen=True)
class View:
    """A tensor of numbers of an array, which other tensors may share."""

    base: np.ndarray
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Parameter:
    data: Any


@dataclasses.dataclass(frozen=True)
class Raw:
    """Opcodes that push one object."""

    opcodes: bytes


def written(content: Any, zipped: bool, **settings: Any) -> bytes:
    return (zip_file if zipped else legacy_file)(content, **settings)


def zip_file(content: Any, byteorder: str | None = "little", folder: str = "archive") -> bytes:
    """The form since PyTorch 1.6; without a byteorder, as before 2.1."""
    data, storages = pickled(content, ())
    big = byteorder == "big"
    swap = big != (sys.byteorder == "big")
    members = {"data.pkl": data, "version": b"3\n"}
    if byteorder:
        members["byteorder"] = byteorder.encode()
    for key, array in enumerate(storages):
        members[f"data/{key}"] = (array.byteswap() if swap else array).tobytes()
    return archive({f"{folder}/{name}": value for name, value in members.items()})


def archive(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, value in members.items():
            file.writestr(zipfile.ZipInfo(name), value, method)
    return buffer.getvalue()


def legacy_file(content: Any) -> bytes:
    """The form before PyTorch 1.6."""
    data, storages = pickled(content, (None,))
    system = {"protocol_version": VERSION, "little_endian": True, "type_sizes": {"int": 4}}
    keys = [str(n) for n in range(len(storages))]
    head = b"".join(pickle.dumps(value, 2) for value in (MAGIC, VERSION, system))
    numbers = b"".join(struct.pack("<q", _count(a)) + a.tobytes() for a in storages)
    return head + data + pickle.dumps(keys, 2) + numbers


def _count(storage: np.ndarray) -> int:
    """What a file says: newer types have no class of storages, which are of bytes then."""
    return storage.size if storage.dtype.name in STORAGES else storage.nbytes


def pickled(content: Any, view: tuple) -> tuple[bytes, list[np.ndarray]]:
    """A pickle and the storages that it names, of which `view` is the end."""
    writer = _Writer(view)
    writer.put(content)
    return b"\x80\x02" + bytes(writer.out) + b".", writer.storages


class _Writer:
    def __init__(self, view: tuple):
        self.out, self.storages, self.view = bytearray(), [], view

    def put(self, value: Any) -> None:
        match value:
            case Raw(opcodes):
                self.out += opcodes
            case Parameter(data):
                self._call("torch._utils\n_rebuild_parameter", data, True, _ORDERED)
            case View(base, offset, shape, strides):
                self._tensor(base, offset, shape, strides)
            case np.ndarray():
                value = np.asarray(value, order="C")
                steps = tuple(n // value.itemsize for n in value.strides)
                self._tensor(value, 0, value.shape, steps)
            case dict():
                self.out += b"}("
                for key, item in value.items():
                    self.put(key), self.put(item)
                self.out += b"u"
            case list():
                self.out += b"]("
                for item in value:
                    self.put(item)
                self.out += b"e"
            case tuple():
                self.out += b"("
                for item in value:
                    self.put(item)
                self.out += b"t"
            case _:
                self.out += pickle.dumps(value, 2)[2:-1]

    def _call(self, name: str, *arguments: Any) -> None:
        self.out += f"c{name}\n".encode()
        self.put(arguments)
        self.out += b"R"

    def _tensor(self, base: np.ndarray, *place: Any) -> None:
        known = base.dtype.name in STORAGES
        kind = f"torch\n{STORAGES[base.dtype.name]}Storage" if known else _UNTYPED
        key = next((n for n, s in enumerate(self.storages) if s is base), len(self.storages))
        if key == len(self.storages):
            self.storages.append(base)
        kind = Raw(f"c{kind}\n".encode())
        identity = ("storage", kind, str(key), "cpu", _count(base), *self.view)
        before = len(self.out)
        self.put(identity)
        stored = Raw(bytes(self.out[before:]) + b"Q")
        del self.out[before:]
        if known:
            self._call("torch._utils\n_rebuild_tensor_v2", stored, *place, False, _ORDERED)
        else:
            dtype = Raw(f"ctorch\n{base.dtype.name}\n".encode())
            self._call("torch._utils\n_rebuild_tensor_v3", stored, *place, False, _ORDERED, dtype)


_ORDERED = Raw(b"ccollections\nOrderedDict\n)R")
_UNTYPED = "torch.storage\nUntypedStorage"


def text(value: str) -> bytes:
    """The opcode that pushes it."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


# What Lightning's and others' checkpoints have beside their tensors, as Python pickles it.
BESIDE = {
    name: Raw(opcodes)
    for name, opcodes in {
        "hyper_parameters": b"clightning\nAttributeDict\n)\x81(" + text("lr") + b"K\x01u}b",
        "old_callbacks": b"}(clightning\nModelCheckpoint\n}" + text("a") + b"K\x01su",
        "scalar": b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n("
        + text("f8")
        + b"\x89\x88tR(K\x03"
        + text("<")
        + b"NNNtbc_codecs\nencode\n("
        + text("x" * 8)
        + text("latin1")
        + b"tRtR",
        "path": b"cpathlib\nPosixPath\n(" + text("/") + text("data") + b"tR",
        "set": b"c__builtin__\nset\n](K\x01K\x02e\x85R",
        "list_of_a_kind": b"comegaconf\nListConfig\n)\x81(K\x01K\x02e",
        "class": b"ctorch.optim.adam\nAdam\n",
        "device": b"ctorch\ndevice\n" + text("cuda") + b"\x85R",
        "other_keys": b"}(N)\x88K\x01K\x02K\x03\x86K\x04G" + bytes(8) + b"K\x05u",
        "quantised": b"ctorch._utils\n_rebuild_qtensor\n()tR",
        "storage": b"(" + text("storage") + b"ctorch\nNewStorage\n" + text("9") + b"NK\x01tQ",
    }.items()
}
