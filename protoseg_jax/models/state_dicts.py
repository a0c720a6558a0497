"""PyTorch's files of tensors, read without PyTorch; nothing in them is executed.

Both forms are as torch/serialization.py writes and reads them. Since 1.6: a zip archive of one
folder, with `data.pkl`, in which tensors name their storages by keys, `data/KEY` of each storage,
`byteorder` and `version`. Before: five pickles in a row (a magic number, the format's version, the
system, the object, its storages' keys), then of each storage how many numbers it holds (int64) and
these, little-endian.
"""

import functools
import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

from protoseg_jax.models import pickles, torch_tensors

_ZIP = b"PK\x03\x04"
_VERSIONS = range(1, 11)  # of zip archives, which PyTorch reads
_MAGIC_NUMBER, _VERSION = 0x1950A86A20F9469CFC6C, 1001  # of the form before


def load(path: Path) -> Any:
    """What `torch.save` wrote: plain values, lists, tuples and dicts of `torch_tensors.Tensor`s;
    `pickles.Inert` stands for every object of another kind.

    Raises:
      ValueError: it is broken, or no such file; or an error of `zipfile`.
    """
    data = path.read_bytes()
    if data.startswith(_ZIP):
        return _load_zip(data)
    if not data.startswith(b"\x80"):  # a download's error page, say
        raise ValueError("it is no pickle")
    return _load_pickles(data)


def _load_zip(data: bytes) -> Any:
    members, storages = _members(data), {}
    if "data.pkl" not in members or int(bytes(members.get("version", b"0"))) not in _VERSIONS:
        raise ValueError("it is a zip file, but not PyTorch's")
    byteorder = bytes(members.get("byteorder", b"little")).decode()
    if byteorder not in ("little", "big"):
        raise ValueError("its byte order is unknown")
    stream = io.BytesIO(members["data.pkl"])
    content = _load_content(stream, storages)
    for key, storage in storages.items():
        storage.content, storage.byteorder = members.get(f"data/{key}", b""), byteorder
        if len(storage.content) < storage.nbytes:
            raise ValueError("numbers of a tensor in it are missing")
    return content


def _load_pickles(data: bytes) -> Any:
    stream, storages = io.BytesIO(data), {}
    if pickles.load(stream, {}) != _MAGIC_NUMBER or pickles.load(stream, {}) != _VERSION:
        raise ValueError("it is a pickle, but not PyTorch's")
    pickles.load(stream, {})  # the system, on which nothing depends
    content = _load_content(stream, storages)
    keys = pickles.load(stream, {})
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("its list of storages is broken")
    if sorted(keys) != sorted(storages):
        raise ValueError("its list of storages is another than its tensors'")
    start = stream.tell()
    for key in keys:
        storage, begin = storages[key], start + 8
        start = begin + storage.nbytes
        if start > len(data) or data[begin - 8 : begin] != struct.pack("<q", storage.count):
            raise ValueError("numbers of a tensor in it are missing")
        storage.content = memoryview(data)[begin:start]
    return content


def _load_content(stream: io.BytesIO, storages: dict[str, torch_tensors.Storage]) -> Any:
    """The object, and in `storages` those it names."""
    find = functools.partial(torch_tensors.storage, storages)
    return pickles.load(stream, torch_tensors.GLOBALS, find, inert=True)


def _members(data: bytes) -> dict[str, memoryview]:
    """A zip archive's members by their names within its folder: views, no copies.

    None may be compressed or overlap another, by which a small file would be large; checksums are
    looked at, where they were asked for, which PyTorch does not.

    Raises:
      ValueError: it is broken; or an error of `zipfile`.
    """
    infos = zipfile.ZipFile(io.BytesIO(data)).infolist()
    if not infos or sum(info.file_size for info in infos) > len(data):
        raise ValueError("it is smaller than its members")
    if len({info.filename for info in infos}) < len(infos):
        raise ValueError("two of its members have one name")
    folder, found = infos[0].filename.partition("/")[0] + "/", {}
    for info in infos:
        name = info.filename[:50]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ValueError(f"{name} is compressed or encrypted")
        header = data[info.header_offset : info.header_offset + 30]
        if len(header) < 30 or not header.startswith(_ZIP):
            raise ValueError(f"{name} is not where it should be")
        begin = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
        content = memoryview(data)[begin : begin + info.file_size]
        if len(content) < info.file_size:
            raise ValueError(f"{name} is cut short")
        if info.CRC and zlib.crc32(content) != info.CRC:  # 0 where they were not asked for
            raise ValueError(f"Bad CRC-32 for file {name}")
        if info.filename.startswith(folder):
            found[info.filename.removeprefix(folder)] = content
    return found
