"""Weight files broken in many ways: each must be loaded or refused in a line.

    python -m tests.mutate_weights [--count=10000] [--format=npz …] [--seed=0] [--out=FILE.md]
    python -m tests.mutate_weights --format=npz --seed=0 --first=N --count=1 --keep=FOLDER

Small files of every format that `readers.READERS` reads are changed: their bytes, the structure of
their zip archives, headers and pickles, and what their tensors are. Mutant N of a format and seed
is always the same. Anything but weights or a `UserError` of one line is a failure: another
exception, words of a library on stdout or stderr, an action beyond reading, memory beyond the
file's, a hang, a crash.
"""

import argparse
import collections
import dataclasses
import io
import json
import multiprocessing
import os
import pathlib
import pickletools
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy
from flax import traverse_util

from benchmarks import machine
from protoseg_jax.errors import UserError, one_line
from protoseg_jax.models import readers, resnet, weights
from tests.models import torch_files
from tests.models import weights as made

LONGEST = 1000  # characters of a line
SECONDS, MEMORY = 30, 2**28  # of one file; memory beyond it is absurd
SHOWN = 10  # failures in the report
EXTREMES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1)
EXTREMES += (2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sample:
    """A valid file: its tensors, and how a file is made of such."""

    tensors: Arrays
    write: Callable[[Arrays], bytes]


# -- valid files -------------------------------------------------------------------------------


def _state_dicts() -> list[Arrays]:
    rng = np.random.default_rng(0)
    classes = np.arange(3).repeat(2)
    return [
        {**made.backbone("torchvision", 14, 1, rng), "fc.weight": np.zeros((2, 32), np.float32)},
        {n: t.astype(np.float16) for n, t in made.backbone("deeplab", 14, 1, rng).items()},
        made.protoseg(14, 1, (1,), 2, classes, 3),
    ]


def _npz(save: Callable, order: str = "C") -> Callable[[Arrays], bytes]:
    def write(tensors: Arrays) -> bytes:
        buffer = io.BytesIO()
        save(buffer, **{n: np.asarray(t, order=order) for n, t in tensors.items()})
        return buffer.getvalue()

    return write


def _npz_samples() -> list[Sample]:
    found = []
    for tensors, save, order in zip(
        _state_dicts(),
        (np.savez, np.savez_compressed, np.savez),
        ("C", "C", "F"),
        strict=True,
    ):
        ported = resnet.port(tensors, "made")
        trees = {"params": ported.params, "frozen": ported.frozen}
        arrays = traverse_util.flatten_dict(trees, sep="/")
        if ported.prototype_classes is not None:
            arrays["prototype_classes"] = ported.prototype_classes
        own = {"origin": np.array(ported.origin), "depth": np.array(ported.depth)}
        found.append(Sample({**own, **arrays}, _npz(save, order)))
    return found


def _safetensors_samples() -> list[Sample]:
    def write(tensors: Arrays) -> bytes:
        return safetensors.numpy.save({n: np.ascontiguousarray(t) for n, t in tensors.items()})

    return [Sample(tensors, write) for tensors in _state_dicts()]


def _torch_samples() -> list[Sample]:
    def writer(zipped: bool, nested: bool, dtype: Any) -> Callable:
        def tensor(value: Any) -> Any:
            if dtype and isinstance(value, np.ndarray) and value.dtype.kind == "f":
                return value.astype(dtype)
            return value

        def write(tensors: Arrays) -> bytes:
            content = {n: tensor(t) for n, t in tensors.items()}
            if nested:
                content = {"epoch": 3, "state_dict": {f"module.{n}": t for n, t in content.items()}}
            return torch_files.written(content, zipped)

        return write

    kinds = ((True, False, None), (True, True, ml_dtypes.bfloat16), (False, False, None))
    kinds += ((False, True, np.float64),)
    return [Sample(t, writer(*kind)) for t in _state_dicts() for kind in kinds]


SAMPLES: dict[str, Callable[[], list[Sample]]] = {
    ".npz": _npz_samples,
    ".safetensors": _safetensors_samples,
    ".pth": _torch_samples,
    ".pt": _torch_samples,
}

# -- mutations ---------------------------------------------------------------------------------
# Each takes what it changes and a random.Random, and returns the changed.


def _span(data: bytes, rng: random.Random, longest: int = 64) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.randint(1, longest))


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _replace(data: bytes, rng: random.Random) -> bytes:
    start, end = _span(data, rng, rng.choice((1, 4, 64)))
    return data[:start] + rng.randbytes(end - start) + data[end:]


def _extreme(data: bytes, rng: random.Random) -> bytes:
    size = rng.choice((1, 2, 4, 8))
    start = rng.randrange(max(len(data) - size, 1))
    number = rng.choice(EXTREMES) % 256**size
    return data[:start] + number.to_bytes(size, "little") + data[start + size :]


def _truncate(data: bytes, rng: random.Random) -> bytes:
    anywhere = rng.randrange(len(data) + 1)
    return data[: rng.choice((anywhere, rng.randrange(16), -rng.randint(1, 64)))]


def _insert(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.randbytes(rng.randint(1, 64)) + data[start:]


def _delete(data: bytes, rng: random.Random) -> bytes:
    start, end = _span(data, rng)
    return data[:start] + data[end:]


def _duplicate(data: bytes, rng: random.Random) -> bytes:
    start, end = _span(data, rng, 512)
    return data[:end] + data[start:end] + data[end:]


def _swap(data: bytes, rng: random.Random) -> bytes:
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(4))
    a, b, c, d = (data[i:j] for i, j in zip([0, *cuts[:3]], cuts, strict=True))
    return a + d + c + b + data[cuts[3] :]


def _head(data: bytes, rng: random.Random) -> bytes:
    """Any of these, in the first bytes."""
    end = rng.choice((8, 32, 256))
    return rng.choice((_flip, _replace, _extreme, _insert, _delete))(data[:end], rng) + data[end:]


BYTES = (_flip, _replace, _extreme, _truncate, _insert, _delete, _duplicate, _swap, _head)

# (Offset, size) of the fields of a zip file's records, by their signature.
_FIELDS = {
    b"PK\x03\x04": ((4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)),
    b"PK\x01\x02": (
        *((4, 2), (6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4)),
        *((28, 2), (30, 2), (32, 2), (34, 2), (38, 4), (42, 4)),
    ),
    b"PK\x05\x06": ((4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)),
    b"PK\x06\x06": ((4, 8), (12, 2), (14, 2), (16, 4), (24, 8), (32, 8), (40, 8), (48, 8)),
}
_METHODS = (0, 1, 6, 8, 9, 12, 14, 93, 95, 98, 99)


def _zip_field(data: bytes, rng: random.Random) -> bytes:
    """A field of a record, or the same one in all records of its kind."""
    signature = rng.choice([s for s in _FIELDS if s in data] or [b""])
    if not signature:
        return _flip(data, rng)
    starts = [m.start() for m in re.finditer(re.escape(signature), data)]
    offset, size = rng.choice(_FIELDS[signature])
    number = rng.choice((*EXTREMES, *_METHODS, *(1 << n for n in range(16))))
    changed = bytearray(data)
    for start in starts if rng.random() < 0.3 else [rng.choice(starts)]:
        now = int.from_bytes(data[start + offset : start + offset + size], "little")
        value = (now + rng.choice((-1, 1, 8)) if rng.random() < 0.2 else number) % 256**size
        changed[start + offset : start + offset + size] = value.to_bytes(size, "little")
    return bytes(changed)


def _zip_method(data: bytes, rng: random.Random) -> bytes:
    """One member's method, in the directory and before its data."""
    changed, method = bytearray(data), rng.choice(_METHODS).to_bytes(2, "little")
    infos = _members(data)
    if infos:
        info = rng.choice(infos)
        changed[info.header_offset + 8 : info.header_offset + 10] = method
        name = data.find(info.filename.encode(), data.find(b"PK\x01\x02"))
        changed[name - 36 : name - 34] = method
    return bytes(changed)


def _members(data: bytes) -> list[zipfile.ZipInfo]:
    try:
        return zipfile.ZipFile(io.BytesIO(data)).infolist()
    except Exception:  # mutated before
        return []


def _zip_members(data: bytes, rng: random.Random, change: Callable) -> bytes:
    """The archive written anew, checksums and all, with the content of a member changed."""
    infos = _members(data)
    if not infos:
        return _flip(data, rng)
    archive = zipfile.ZipFile(io.BytesIO(data))
    pickled = [i for i in infos if i.filename.endswith(".pkl")]
    chosen = rng.choice(pickled if pickled and rng.random() < 0.8 else infos)
    method = rng.choice((0, 0, 8, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)) if not pickled else 0
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as written:
        warnings.simplefilter("ignore")  # of names that are there twice
        for info in infos:
            try:
                content = archive.read(info)
            except Exception:
                content = b""
            name = info.filename
            if info is chosen:
                what = rng.random()
                if what < 0.05:
                    continue
                if what < 0.1:
                    name = rng.choice((_odd_name(name, rng), rng.choice(infos).filename))
                elif what < 0.15:
                    written.writestr(zipfile.ZipInfo(name), content)
                else:
                    content = change(content, rng)
            name = name.encode("utf8", "replace").decode()[:60000]
            entry = zipfile.ZipInfo(name or "-")  # Python writes none without a name
            written.writestr(entry, content, method if info is chosen else 0)
    return buffer.getvalue()


def _npy(content: bytes, rng: random.Random) -> bytes:
    """An array's header, edited as text."""
    if content[:6] != b"\x93NUMPY" or rng.random() < 0.1:
        return rng.choice(BYTES)(content, rng) if content else b"x"
    size = int.from_bytes(content[8:10], "little")
    text, data = content[10 : 10 + size].decode("latin1").rstrip(), content[10 + size :]
    number = str(rng.choice((*EXTREMES, -1, "1e3", "10L", "'a'", "1.5", "None", "True", "01")))
    shapes = (f"({number},)", f"({number},{number})", f"({number})", "()", "[]", "(0,)")
    shapes += (f"({','.join(['1'] * rng.choice((33, 65, 3000)))},)", "(0,9223372036854775807)")
    descrs = ("|O", "<c8", "<c16", "<U3", "<U0", "|S0", "|V0", "|V4", ">f4", "<f2", "<f8", "|b1")
    descrs += ("<M8[s]", "<m8", "<f3", "f4,f4", "f", "", "x" * 99, "<U999999999", "|u1", "<i8")
    kind = rng.randrange(9)
    if kind == 0:
        text = re.sub(r"\([^)]*\)", lambda m: rng.choice(shapes), text)
    elif kind == 1:
        texts = [repr(d) for d in descrs]
        texts += ["[('a','<f4')]", "[('a','<f4',(9999999,))]", "[]", "[('a',)]", "{}", "None", "3"]
        texts += ["[('a','|O')]", "[('','|V9')]", "('<f4',2)", "[('a','<f4'),('a','<f4')]"]
        text = re.sub(r"'descr': '[^']*'", lambda m: f"'descr': {rng.choice(texts)}", text)
    elif kind == 2:
        text = text.replace(
            rng.choice("(){}',:"), rng.choice(("", "(", "[", "{", "'", '"""', "\\"))
        )
    elif kind == 3:
        deep = rng.choice((50, 150, 3000, 9000))
        text = rng.choice(("(" * deep, "[" * deep + "]" * deep, "-" * deep + "1", "{" * deep))
    elif kind == 4:
        position = rng.randrange(len(text) + 1)
        words = ("\x00", "\n", "\n  x", "\xff", "#", "lambda:0", "__import__('os')", "9" * 5000)
        text = text[:position] + rng.choice((*words, "  ", "L", ";", "\t", "\f")) + text[position:]
    elif kind == 5:
        text = text.replace(rng.choice(("descr", "shape", "fortran_order")), rng.choice(("", "x")))
    elif kind == 6:
        text = text.replace("False", rng.choice(("True", "1", "None", "'a'", "0")))
    elif kind == 7:
        text = re.sub(r"(\d+)(?=[,)])", r"\1L", text)  # as Python 2 wrote it
    else:
        text = rng.choice(("", "{}", "[]", "1", "{'a': 1}", text * 2, text[: rng.randrange(99)]))
    header = text.encode("latin1", "replace") + rng.choice((b"\n", b"\n", b"\n", b""))
    version = rng.choice(
        (b"\x01\0", b"\x01\0", b"\x01\0", b"\x02\0", b"\x03\0", b"\x04\0", b"\0\0")
    )
    length = len(header) if rng.random() < 0.9 else rng.choice(EXTREMES)
    wide = 2 if version[0] < 2 else 4
    return b"\x93NUMPY" + version + (length % 256**wide).to_bytes(wide, "little") + header + data


def _npz_member(data: bytes, rng: random.Random) -> bytes:
    return _zip_members(data, rng, _npy)


def _safetensors_header(data: bytes, rng: random.Random) -> bytes:
    """The header's JSON edited, its length told or mistold."""
    size = int.from_bytes(data[:8], "little")
    text, rest = data[8 : 8 + size], data[8 + size :]
    try:
        header = json.loads(text)
        name = rng.choice(list(header))
        entry = header[name]
        start, end = entry["data_offsets"]
    except Exception:  # mutated before
        return _flip(data, rng)
    kind, number = rng.randrange(9), rng.choice((*EXTREMES, -1, 1.5, "a", None, [], {}))
    kinds = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "C64")
    kinds += ("I64", "I8", "U64", "BOOL", "X", "", None, 7)
    if kind == 0:
        entry["dtype"] = rng.choice(kinds)
    elif kind == 1:
        shapes = ([number], [number, number], [0, 2**62], [2**32, 2**32], [], number, [1] * 999)
        entry["shape"] = rng.choice(shapes)
    elif kind == 2:
        entry["data_offsets"] = rng.choice(
            ([start, number], [number, end], [end, start], [start], number, [start, end, end])
        )
    elif kind == 3:
        del header[name]
    elif kind == 4:
        header[rng.choice((_odd_name(name, rng), "__metadata__"))] = header.pop(name)
    elif kind == 5:
        header["__metadata__"] = rng.choice((number, {"a": number}, {"a": "b" * 9999}, [1]))
    elif kind == 6:
        del entry[rng.choice(list(entry))]
    elif kind == 7:  # bits as another type of the same size
        same = {"F32": ("I32", "U32"), "F16": ("BF16", "I16"), "F64": ("C64", "I64")}
        for one in header.values():
            one["dtype"] = rng.choice(same.get(one["dtype"], (one["dtype"],)))
    text = json.dumps(header).encode()
    if kind == 8:
        deep = rng.choice((50, 127, 128, 5000, 100000))
        position = rng.randrange(len(text))
        words = (b"[" * deep, b'{"a":' * deep, b"\\ud800", b"\xff", b'"', b"1e999", b"-", b"\0")
        text = text[:position] + rng.choice(words) + text[position:]
    length = len(text) if rng.random() < 0.9 else rng.choice((*EXTREMES, 10**8, len(data)))
    return struct.pack("<Q", length) + text + rest


def canaries(path: pathlib.Path) -> list[bytes]:
    """Pickles that act when they are executed."""
    shell = f"touch {path}".encode()
    code = f"open({str(path)!r}, 'w')".encode()
    return [
        b"cos\nsystem\n(S'" + shell + b"'\ntR.",
        b"cposix\nsystem\n(S'" + shell + b"'\ntR.",
        b"\x80\x02cbuiltins\nexec\n(U" + bytes([len(code)]) + code + b"tR.",
        b'\x80\x02cbuiltins\neval\n(S"' + code + b'"\ntR.',
        b"\x80\x02(S'" + shell + b"'\nios\nsystem\n.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(shell)]) + shell + b"\x85R.",
        b"\x80\x02cbuiltins\ngetattr\n(cbuiltins\n__import__\nS'x'\ntR.",
    ]


def _pickle(data: bytes, rng: random.Random) -> bytes:
    """Other opcodes, other numbers, other names, or code to be executed."""
    try:
        operations = [(op, arg, at) for op, arg, at in pickletools.genops(data)]
    except Exception:  # mutated before, or several pickles
        operations = []
    if len(operations) < 5:
        return rng.choice(BYTES)(data, rng)
    ends = [at for _, _, at in operations[1:]] + [len(data)]
    n = rng.randrange(1, len(operations))
    at, end, kind = operations[n][2], ends[n], rng.randrange(8)
    if kind == 0:
        new = rng.choice(pickletools.opcodes).code.encode("latin1")
        return data[:at] + new + data[at + 1 :]
    if kind == 1:  # a number
        kinds = ("BININT", "BININT1", "BININT2", "LONG1")
        n = rng.choice([i for i, o in enumerate(operations) if o[0].name in kinds] or [n])
        number = rng.choice((*EXTREMES, -1, -(2**31), -(2**63)))
        new = b"\x8a\x09" + number.to_bytes(9, "little", signed=True)
        return data[: operations[n][2]] + new + data[ends[n] :]
    if kind == 2:  # a global
        n = rng.choice([i for i, o in enumerate(operations) if o[0].name == "GLOBAL"] or [n])
        words = ("torch IntStorage", "torch ComplexFloatStorage", "torch BoolStorage", "os system")
        words += ("torch HalfStorage", "torch QInt8Storage", "torch UntypedStorage", "torch Size")
        words += ("torch DoubleStorage", "torch BFloat16Storage", "builtins bytearray")
        words += ("torch._utils _rebuild_parameter", "torch._utils _rebuild_sparse_tensor")
        words += ("torch._utils _rebuild_qtensor", "torch._utils _rebuild_meta_tensor_no_storage")
        words += ("collections Counter", "builtins set", "_codecs encode", "torch serialization")
        words += ("torch._tensor _rebuild_from_type_v2", "torch Tensor", "torch.nn Linear", "x y")
        new = b"c" + rng.choice(words).replace(" ", "\n").encode() + b"\n"
        return data[: operations[n][2]] + new + data[ends[n] :]
    if kind == 3:  # twice, or not at all
        return data[:at] + data[at:end] * rng.choice((0, 2, 3)) + data[end:]
    if kind == 4:
        snippets = (b"N", b"]", b"}", b")", b"(", b"0", b"\x88", b"G\x7f\xf8\0\0\0\0\0\0", b"K\x07")
        snippets += (b"\x8d" + b"\xff" * 8, b"T\xff\xff\xff\x7f", b"r\xff\xff\xff\xff", b"s", b"R")
        snippets += (b"X\xff\xff\xff\xff", b"\x8b\xff\xff\xff\x7f", b"Q", b"b", b"\x81")
        snippets += (b"2" * 3000, b"(" * 3000, b"\x85" * 3000, b"]" + b"2a" * 9)
        return data[:at] + rng.choice(snippets) + data[rng.choice((at, end)) :]
    if kind == 5:
        code = rng.choice(canaries(CANARY))
        return code if rng.random() < 0.5 else data[:at] + code[:-1].lstrip(b"\x80\x02") + data[at:]
    return rng.choice((_flip, _extreme, _replace, _delete, _insert))(data, rng)


def _pickle_member(data: bytes, rng: random.Random) -> bytes:
    return _zip_members(data, rng, _pickle)


def _legacy(data: bytes, rng: random.Random) -> bytes:
    """One of the pickles of a file of PyTorch before 1.6 (magic number, protocol, system, content,
    keys), or the numbers behind them."""
    stream, cuts = io.BytesIO(data), [0]
    try:
        for _ in range(5):
            for _ in pickletools.genops(stream):
                pass
            cuts.append(stream.tell())
    except Exception:  # mutated before
        return _flip(data, rng)
    n = rng.choice((0, 1, 2, 3, 3, 3, 3, 3, 4, 4, 5))
    if n == 5:
        return data[: cuts[5]] + rng.choice(BYTES)(data[cuts[5] :], rng)
    return data[: cuts[n]] + _pickle(data[cuts[n] : cuts[n + 1]], rng) + data[cuts[n + 1] :]


def _odd_name(name: str, rng: random.Random) -> str:
    odd = ("", "/", "a\nb", "\x1b[2J", "\ud800", "é☃", "a" * 5000, "/" * 5000, "..", "\0", "params")
    odd += (f"{name}/x", f"x{name}", name.rpartition("/")[0], f"module.{name}", "params/backbone")
    return rng.choice((*odd, name.upper(), "origin", "depth", "fc.weight", "layer9.9.x"))


def _tensors(sample: Sample, suffix: str, rng: random.Random) -> bytes:
    """A whole file with other tensors."""
    tensors = dict(sample.tensors)
    for _ in range(rng.choice((1, 1, 3))):
        name = rng.choice(list(tensors))
        if rng.random() < 0.3:
            name = rng.choice([n for n in _SPECIAL if n in tensors] or [name])
        value = tensors[name]
        if not isinstance(value, np.ndarray):
            continue
        number = value.dtype.kind in "biuf"
        kind = rng.randrange(10)
        if kind == 0:
            del tensors[name]
        elif kind == 1:
            tensors[_odd_name(name, rng)] = tensors.pop(name)
        elif kind == 2 and number:
            odd = (np.nan, np.inf, -np.inf, -1, 3e38, -3e38, 1e-45, 0, 1e300)
            with np.errstate(over="ignore", invalid="ignore"):
                value = np.array(value, rng.choice((value.dtype, np.float64, np.float32)))
                if value.size and value.dtype.kind == "f":
                    spots = slice(None) if rng.random() < 0.5 else rng.randrange(value.size)
                    value.reshape(-1)[spots] = rng.choice(odd)
            tensors[name] = value
        elif kind == 3 and number:
            with np.errstate(over="ignore", invalid="ignore"):
                types = (np.complex64, np.float16, np.float64, np.int8, np.int64, np.uint8, bool)
                tensors[name] = value.astype(rng.choice(types))
        elif kind == 4:
            shapes = ((), (0,), (1,), (2**40, 0), (1,) * 8, (0, 3, 7, 7), (5, 3, 7, 7), (3, 0))
            tensors[name] = np.zeros(rng.choice(shapes), rng.choice((np.float32, np.int64)))
        elif kind == 5:
            tensors[name] = value.reshape(-1)
        elif kind == 6:
            tensors[name] = value.T if rng.random() < 0.5 else value[None]
        elif kind == 7 and suffix in (".pth", ".pt"):
            tensors[name] = _odd_tensor(rng)
        elif kind == 7 and suffix == ".npz":
            texts = (np.array("x"), np.array(["a", "b"]), np.array(b"x"), np.array("x" * 5000))
            tensors[name] = rng.choice((*texts, np.array([(1, 2)], "i4,f4"), np.array(0, "M8[s]")))
        elif kind == 8:
            tensors[name] = tensors[rng.choice(list(tensors))]
        elif kind == 9 and suffix in (".pth", ".pt"):
            tensors[rng.choice((3, b"x", ("a", 1), None, 1.5, True))] = tensors.pop(name)
        elif kind == 9 and suffix == ".npz":
            tensors[name] = np.array(rng.choice((-1, 3, 2**63 - 1, 2**40)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return sample.write(tensors)
    except Exception:  # of what the library does not write
        return sample.write(sample.tensors)[:-1]


_SPECIAL = ("origin", "depth", "prototype_classes", "params/head/kernel", "conv1.weight")
_SPECIAL += ("features.base.layer1.conv1.conv.weight", "prototype_vectors", "last_layer.weight")


def _odd_tensor(rng: random.Random) -> Any:
    ones, values = np.ones(1, np.float32), np.ones((4, 3), np.float32)
    return rng.choice(
        (
            torch_files.View(ones, 0, (2**40,), (0,)),
            torch_files.View(ones, 0, (2**20, 2**20, 2**10), (0, 0, 0)),
            torch_files.View(ones, 1, (1,), (1,)),
            torch_files.View(values, 0, (3, 4), (1, 3)),
            torch_files.View(values, 11, (4, 3), (-3, -1)),
            torch_files.Parameter(values),
            torch_files.Parameter("text"),
            torch_files.Raw(b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n)R"),
            torch_files.Raw(b"ctorch._utils\n_rebuild_sparse_tensor\n)R"),
            torch_files.Raw(b"ctorch._utils\n_rebuild_qtensor\n)R"),
            values.astype(np.complex64),
            values.astype(ml_dtypes.float8_e4m3fn),
            values.astype(ml_dtypes.bfloat16),
            {"a": values},
            [values],
            "text",
            None,
            3,
        )
    )


STRUCTURE: dict[str, tuple[Callable, ...]] = {
    ".npz": (_zip_field, _zip_method, _npz_member, _npz_member),
    ".safetensors": (_safetensors_header,),
    ".pth": (_zip_field, _zip_method, _pickle_member, _legacy),
}
STRUCTURE[".pt"] = STRUCTURE[".pth"]


class Mutants:
    """The mutants of a format and seed, by number."""

    def __init__(self, suffix: str, seed: int):
        self.suffix, self.seed, self.samples = suffix, seed, SAMPLES[suffix]()
        self.whole = [sample.write(sample.tensors) for sample in self.samples]

    def __getitem__(self, number: int) -> tuple[str, bytes]:
        """(what was done, the file)."""
        rng = random.Random(f"{self.seed}{self.suffix}{number}")
        n = rng.randrange(len(self.samples))
        data, done = self.whole[n], []
        if rng.random() < 0.2:
            data = _tensors(self.samples[n], self.suffix, rng)
            done.append("tensors")
        else:
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                change = rng.choice(BYTES if rng.random() < 0.4 else STRUCTURE[self.suffix])
                if change is _legacy and data[:2] == b"PK":
                    change = _pickle_member
                elif change in (_zip_field, _zip_method, _pickle_member) and data[:2] != b"PK":
                    change = _legacy if self.suffix in (".pth", ".pt") else _flip
                try:
                    data = change(data, rng)
                except Exception:  # what an earlier one left has not the structure
                    continue
                done.append(change.__name__.strip("_").replace("_", " "))
        return ", ".join(done), data


# -- judging -----------------------------------------------------------------------------------

CANARY = pathlib.Path(tempfile.gettempdir()) / "protoseg_jax_executed"
_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen")
_FORBIDDEN += ("os.remove", "os.rename", "os.mkdir", "socket.connect", "pickle.find_class")
_watched: list[str] | None = None  # what is done while a file is read
_watching = False


def _watch() -> None:
    """Hear of every action of the interpreter from now on; hooks stay until it ends."""
    global _watching

    def hook(event: str, arguments: tuple) -> None:
        if _watched is None:
            return
        if event == "open" and isinstance(arguments[1], str) and set("wax+") & set(arguments[1]):
            _watched.append(f"open {arguments[0]} to write")
        elif event in _FORBIDDEN:
            _watched.append(event)

    if not _watching:
        sys.addaudithook(hook)
        _watching = True


def sound(ported: weights.Ported) -> str | None:
    """What is wrong with weights that were loaded."""
    for path, leaf in jax.tree_util.tree_leaves_with_path((ported.params, ported.frozen)):
        if not isinstance(leaf, np.ndarray) or leaf.dtype != np.float32:
            return f"{jax.tree_util.keystr(path)} is {getattr(leaf, 'dtype', type(leaf))}"
        if not np.isfinite(leaf).all():
            return f"{jax.tree_util.keystr(path)} is not finite"
    if ported.prototype_classes is not None:
        count, num_classes = ported.params["head"]["kernel"].shape
        classes = ported.prototype_classes
        if classes.shape != (count,) or classes.min() < 0 or classes.max() >= num_classes:
            return "classes are not those of the head"
    return None


def judge(path: pathlib.Path) -> tuple[str, str]:
    """("loaded", "refused" or what else became of a file, the details)."""
    global _watched
    _watch()
    CANARY.unlink(missing_ok=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sys.stdout.flush(), sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as words, warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")  # each of them, and not the first of its place alone
        for hidden in (ResourceWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", hidden)
        os.dup2(words.fileno(), 1), os.dup2(words.fileno(), 2)
        _watched = []
        try:
            ported = weights.load(path, resnet)
            try:
                wrong = sound(ported)
            except Exception as error:  # it has not even the structure
                wrong = repr(error)
            found = ("nonsense loaded", wrong) if wrong else ("loaded", "")
        except UserError as error:
            line = one_line(error)
            known = str(path) in line and len(line) - len(str(path)) <= LONGEST
            found = "refused" if known and line.isprintable() else "an odd line", line[:200]
        except BaseException as error:  # PyO3's panics are no Exception
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{pathlib.Path(place.filename).name}:{place.lineno}"
            found = "traceback", f"{type(error).__name__} at {where}: {one_line(error)[:120]}"
        finally:
            acts, _watched = _watched, None
            sys.stdout.flush(), sys.stderr.flush()
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
            os.close(kept[0]), os.close(kept[1])
        words.seek(0)
        said = words.read().decode(errors="replace") + " ".join(str(w.message) for w in heard)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if acts or CANARY.exists():
        return "executed", ", ".join(acts) or "the canary"
    if said:
        return "printed", " ".join(said.split())[:200]
    if grown > MEMORY:
        return "memory", f"{grown >> 20} MiB"
    return found


def _limit_memory() -> None:
    """What is mapped now, and 4 GiB."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**32,) * 2)


def _work(suffix: str, seed: int, numbers: range, folder: str, told: Any) -> None:
    """Judge mutants, in a process of their own; SIGALRM ends it at one that hangs."""
    mutants, path = Mutants(suffix, seed), pathlib.Path(folder) / f"mutant{suffix}"
    _limit_memory()
    for number in numbers:
        done, data = mutants[number]
        path.write_bytes(data)
        signal.alarm(SECONDS)
        verdict, details = judge(path)
        signal.alarm(0)
        told.send((number, done, verdict, details))
    told.close()


def trial(suffix: str, seed: int, numbers: range) -> Iterator[tuple[int, str, str, str]]:
    """(number, what was done, verdict, details) of mutants of a format; crashes are verdicts."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        while numbers:
            mine, theirs = context.Pipe(duplex=False)
            arguments = suffix, seed, numbers, folder, theirs
            process = context.Process(target=_work, args=arguments)
            process.start()
            theirs.close()
            try:
                while True:
                    found = mine.recv()
                    numbers = range(found[0] + 1, numbers.stop)
                    yield found
            except EOFError:
                process.join()
            if process.exitcode > 0:
                raise RuntimeError(f"the judge of {suffix} failed")
            if process.exitcode:
                name = signal.Signals(-process.exitcode).name
                verdict = "hang" if name == "SIGALRM" else "crash"
                yield numbers.start, "", verdict, name
                numbers = numbers[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [suffix.removeprefix(".") for suffix in readers.READERS]
    parser.add_argument("--count", type=int, default=10000, help="mutants of each format")
    parser.add_argument("--format", nargs="+", default=names, choices=names)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the first mutant's number")
    parser.add_argument("--keep", type=pathlib.Path, help="a folder for the mutants")
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    numbers = range(arguments.first, arguments.first + arguments.count)
    rows, failures = [], []
    for name in arguments.format:
        suffix, counts, kinds = f".{name}", collections.Counter(), collections.Counter()
        if arguments.keep:
            arguments.keep.mkdir(parents=True, exist_ok=True)
            mutants = Mutants(suffix, arguments.seed)
            for number in numbers:
                (arguments.keep / f"{number}{suffix}").write_bytes(mutants[number][1])
        for number, done, verdict, details in trial(suffix, arguments.seed, numbers):
            good = verdict in ("loaded", "refused")
            counts[verdict if good else "else"] += 1
            if not good:
                kinds[verdict] += 1
                failures.append(f"{name} {number} ({done or 'not known'}): {verdict}: {details}")
                print(failures[-1], file=sys.stderr, flush=True)
        other = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
        what = f"{counts['else']}" + (f" ({other})" if other else "")
        row = f"| `.{name}` | {len(numbers)} | {counts['loaded']} | {counts['refused']} | {what} |"
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    lines = [
        "# Broken weight files",
        "",
        f"`python -m tests.mutate_weights --count={arguments.count} --seed={arguments.seed}`, "
        f"{machine.describe()}",
        "",
        "| format | files | loaded | refused in a line | anything else |",
        "| --- | --- | --- | --- | --- |",
        *rows,
    ]
    if failures:
        again = f"--seed={arguments.seed} --first=NUMBER --count=1 --keep=FOLDER"
        lines += ["", f"The first failures (again: `--format=FORMAT {again}`):", ""]
        lines += [f"* `{failure}`" for failure in failures[:SHOWN]]
    machine.report(lines, arguments.out)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
