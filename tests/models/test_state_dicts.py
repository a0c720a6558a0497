"""PyTorch's files of both forms, read without it: what they hold, and what is refused."""

import io
import pickle
import struct
import sys
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest

from protoseg_jax.errors import UserError
from protoseg_jax.models import pickles, readers, resnet, state_dicts, torch_tensors, weights
from tests import mutate_weights
from tests.models import torch_files
from tests.models import weights as made
from tests.models.torch_files import Parameter, Raw, View

FORMS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
SHARED = np.zeros(999)
ORDERED = b"ccollections\nOrderedDict\n"


def read(folder, data):
    """The tensors of a file, as `weights.load` gets them."""
    path = folder / "a.pth"
    path.write_bytes(data)
    return readers.READERS[".pth"](path)


def same(got, expected):
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype, name
        np.testing.assert_array_equal(got[name], array, strict=True)


def numbers(dtype):
    return np.array([[0, 1, -2], [3.5, 100, 7]]).astype(dtype)


@FORMS
@pytest.mark.parametrize("name", torch_tensors.DTYPES)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_every_type_of_numbers(name, zipped, tmp_path):
    values = numbers(torch_tensors.DTYPES[name])
    expected = values.astype(np.float32) if "float" in name else values
    same(read(tmp_path, torch_files.written({"a": values}, zipped)), {"a": expected})


@pytest.mark.parametrize("dtype", [np.float64, np.int16, np.complex64, ml_dtypes.bfloat16])
def test_the_byte_order_of_another_machine(dtype, tmp_path):
    values = numbers(dtype)
    little, big, old = (
        torch_files.zip_file({"a": values}, order) for order in ("little", "big", None)
    )
    assert little.count(values.tobytes()) == 1 and values.tobytes() not in big
    for data in (big, old):
        same(read(tmp_path, data), read(tmp_path, little))


@FORMS
def test_views_of_shared_numbers(zipped, tmp_path):
    base = np.arange(12, dtype=np.float32)
    content = {
        "whole": View(base, 0, (3, 4), (4, 1)),
        "turned": View(base, 0, (4, 3), (1, 4)),
        "column": View(base, 1, (3,), (4,)),
        "repeated": View(base, 11, (2, 2), (0, 0)),
        "one": View(base, 5, (), ()),
        "none": View(base, 12, (0, 3), (3, 1)),
        "alone": np.array(7),
        "empty": np.zeros((2, 0), np.float16),
        "parameter": Parameter(base),
    }
    whole = base.reshape(3, 4)
    expected = {"whole": whole, "turned": whole.T, "column": whole[:, 1]}
    expected |= {"repeated": np.full((2, 2), 11, np.float32), "one": base[5].reshape(())}
    expected |= {"none": np.zeros((0, 3), np.float32), "alone": np.array(7)}
    expected |= {"empty": np.zeros((2, 0), np.float32), "parameter": base}
    data = torch_files.written(content, zipped)
    same(read(tmp_path, data), expected)
    assert data.count(base.tobytes()) == 1


@FORMS
@pytest.mark.parametrize("name", [*readers.STATE_DICTS, None])
def test_a_checkpoint(name, zipped, tmp_path):
    tensor = np.arange(3.0, dtype=np.float32)
    state_dict = {"a": tensor, "b": Parameter(tensor)}
    optimizer = {"state": {0: {"step": np.array(3.0), "momentum_buffer": None}}}
    groups = [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 1], "nesterov": False}]
    counter, size = b"ccollections\nCounter\n}\x85R", b"ctorch\nSize\nK\x03\x85\x85R"
    others = {"epoch": 3, "name": "é", "seed": 2**40, "best": -1.5, "done": True, "log": []}
    others |= {"optimizer": {**optimizer, "param_groups": groups}}
    others |= {"milestones": Raw(counter), "size": Raw(size), "dtype": Raw(b"ctorch\nfloat32\n")}
    content = {**others, name: state_dict} if name else state_dict
    same(read(tmp_path, torch_files.written(content, zipped)), {"a": tensor, "b": tensor})


@FORMS
@pytest.mark.parametrize("name", torch_files.BESIDE)
def test_other_objects_are_inert_beside_a_state_dict_and_refused_within(name, zipped, tmp_path):
    tensors, other = {"a": np.arange(3.0, dtype=np.float32)}, torch_files.BESIDE[name]
    content = {name: other, "state_dict": tensors, "epoch": 3}
    same(read(tmp_path, torch_files.written(content, zipped)), tensors)
    within = {"state_dict": {**tensors, name: other}}
    with pytest.raises(UserError, match="more than tensors|holds no state dict"):
        read(tmp_path, torch_files.written(within, zipped))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model": {"a": SHARED}, "net": {"a": SHARED}}, r"holds 2 state dicts .model, net., but"),
        ({"ema": {"a": SHARED}, "epoch": 3}, "no state dict by any of state_dict, .* by ema; save"),
        ({"model": Raw(b"}q\x01" + torch_files.text("model") + b"h\x01s")}, "holds no state dict"),
        ({"model": {"lr": 1}, "state_dict": {"a": 3}}, "holds no state dict"),
    ],
)
def test_which_state_dict_is_not_clear(content, words, tmp_path):
    with pytest.raises(UserError, match=words):
        read(tmp_path, torch_files.zip_file(content))


def test_the_settings_of_a_model_are_no_second_state_dict(tmp_path):
    tensors = {"a": np.zeros(3, np.float32)}
    content = {"model": {"depth": 50}, "state_dict": tensors, "ema_state_dict": {"a": SHARED}}
    same(read(tmp_path, torch_files.zip_file(content)), tensors)


@FORMS
def test_metadata_of_modules(zipped, tmp_path):
    data = torch_files.written({"state_dict": Raw(ORDERED + b")R}(X\x01\0\0\0v}ub")}, zipped)
    assert read(tmp_path, data) == {}


def test_files_of_python_2_and_of_gpus(tmp_path):
    """Strings are bytes, dicts lists of lists; a storage's class says where it was."""
    storage = b"(U\x07storagectorch.cuda\nFloatStorage\nU\x010U\x06cuda:0K\x02NtQ"
    tensor = b"ctorch._utils\n_rebuild_tensor\n(" + storage + b"K\x00K\x02\x85K\x01\x85tR"
    content = Raw(ORDERED + b"](](U\x01a" + tensor + b"ee\x85R")
    data = torch_files.legacy_file(content)
    keys = data.rindex(pickle.dumps([], 2))
    end = b"\x80\x02](U\x010e." + struct.pack("<q2f", 2, 1.5, -1)
    same(read(tmp_path, data[:keys] + end), {"a": np.array([1.5, -1], np.float32)})


@FORMS
def test_nothing_is_executed(zipped, tmp_path):
    canary = tmp_path / "canary"
    path = tmp_path / "a.pth"
    for act in mutate_weights.canaries(canary):
        opcodes = act.removeprefix(b"\x80\x02").removeprefix(b"\x80\x04")[:-1]
        inside = {"state_dict": {"a": Raw(opcodes)}, "epoch": 3}
        for content in (Raw(opcodes), {"a": Raw(opcodes)}, inside):
            path.write_bytes(torch_files.written(content, zipped))
            with pytest.raises(UserError, match="a.pth (holds more than tensors|cannot be read)"):
                weights.load(path, resnet)
        beside = {"state_dict": {"a": np.zeros(3, np.float32)}, "x": Raw(opcodes)}
        path.write_bytes(torch_files.written(beside, zipped))
        try:
            same(readers.READERS[".pth"](path), {"a": np.zeros(3, np.float32)})
        except ValueError as error:  # opcodes that PyTorch's pickles have not
            assert "its pickle" in str(error)
        path.write_bytes(act)
        with pytest.raises(UserError, match="a.pth (holds more than tensors|cannot be read)"):
            weights.load(path, resnet)
    assert not canary.exists()


@FORMS
@pytest.mark.parametrize(
    "name",
    ["os.system", "argparse.Namespace", "numpy.dtype", "torch.nn.modules.conv.Conv2d"]
    + ["torch.NewStorage", "torch._utils._rebuild_sparse_tensor", "builtins.getattr"],
)
def test_what_would_have_to_be_executed_is_named(name, zipped, tmp_path):
    opcodes = f"c{name.rpartition('.')[0]}\n{name.rpartition('.')[2]}\n)\x81".encode("latin1")
    inside = {"epoch": 3, "state_dict": {"a": np.zeros(3), "b": Raw(opcodes)}}
    for content in (Raw(opcodes), {"model": Raw(opcodes)}, inside):
        (tmp_path / "a.pth").write_bytes(torch_files.written(content, zipped))
        words = rf"whole module\?\): {name}, of which nothing.*torch.save.model.state_dict"
        with pytest.raises(UserError, match=words):
            weights.load(tmp_path / "a.pth", resnet)


@FORMS
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "holds no state dict"),
        ({"a": 3}, "holds no state dict"),
        ({3: np.zeros(1)}, "holds no state dict"),
        ({"a": View(np.zeros(1), 0, (2**40,), (0,))}, "a is larger than the file"),
        ({f"a{n}": View(SHARED, 0, (999,), (1,)) for n in range(9)}, "share their numbers too"),
        ({"a": View(np.zeros(3), 0, (2**62, 2**62), (0, 0))}, "a is larger than the file"),
        ({"a": View(np.zeros(3), 1, (3,), (1,))}, "reaches beyond its storage"),
        ({"a": View(np.zeros(3), 0, (2, 2), (1, 2))}, "reaches beyond its storage"),
        ({"a": View(np.zeros(3), 0, (3,), (2**62,))}, "reaches beyond its storage"),
        ({"a": View(np.zeros(3), 2, (3,), (-1,))}, "sizes that are none"),
        ({"a": View(np.zeros(3), -1, (3,), (1,))}, "sizes that are none"),
        ({"a": View(np.zeros(3), 0, (-3,), (1,))}, "sizes that are none"),
        ({"a": View(np.zeros(3), 0, (3,), (2**64,))}, "sizes that are none"),
        ({"a": View(np.zeros(3), 0, (1.0,), (1,))}, "sizes that are none"),
        ({"a": View(np.zeros(3), 0, (3,), ())}, "cannot be read"),
        ({"a": View(np.zeros(3), 0, [3], [1])}, "its pickle is broken"),
        ({"a": View(np.zeros(3), 0, (1,) * 99, (1,) * 99)}, "cannot be read"),
        ({"a": Parameter("text")}, "its pickle is broken"),
        ({"a": Raw(b"ctorch._utils\n_rebuild_tensor\n(K\x01K\x00))tR")}, "its pickle is broken"),
        ({(): 3}, "neither a name nor a number"),
        ({2**61 - 1: 0, 2**80: 1}, "neither a name nor a number"),
        ({"a": Raw(b"ctorch\nfloat32\n)R")}, "its pickle is broken"),
        ({"a": Raw(b"}}b")}, "its pickle is broken"),
        ({"a": Raw(b"K\x01Q")}, "described as in no file"),
    ],
)
def test_what_is_no_state_dict(content, words, zipped, tmp_path):
    (tmp_path / "a.pth").write_bytes(torch_files.written(content, zipped))
    with pytest.raises(UserError, match=words):
        weights.load(tmp_path / "a.pth", resnet)


def members(**changes):
    """Those of a zip file of four numbers, some changed or, if None, missing."""
    values = np.arange(4, dtype=np.float32)
    file = torch_files.zip_file({"a": values})
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    changes = {f"archive/{name.replace('_', '/')}": value for name, value in changes.items()}
    return {n: value for n, value in {**found, **changes}.items() if value is not None}


def cut(data):
    return data[: len(data) // 2]


def compressed(data):
    return torch_files.archive(members(), zipfile.ZIP_DEFLATED)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (cut, "not a zip file"),
        (compressed, "is compressed or encrypted"),
        (lambda data: data.replace(struct.pack("<f", 3), b"\xff" * 4), "Bad CRC-32"),
        (lambda data: torch_files.archive(members(byteorder=b"middle")), "byte order"),
        (lambda data: torch_files.archive(members(version=b"99")), "but not PyTorch's"),
        (lambda data: torch_files.archive(members(version=None)), "but not PyTorch's"),
        (lambda data: torch_files.archive({"a/b": b"c"}), "but not PyTorch's"),
        (lambda data: torch_files.archive(members(data_0=None)), "numbers of a tensor"),
        (lambda data: torch_files.archive(members(data_0=b"short")), "numbers of a tensor"),
        (lambda data: data.replace(b"archive/version", b"archive/data/00"), "but not PyTorch's"),
        (lambda data: data.replace(b"archive/version", b"archive/data.pk"), "but not PyTorch's"),
    ],
)
def test_broken_archives(change, words, tmp_path):
    data = torch_files.archive(members())
    assert list(read(tmp_path, data)) == ["a"]
    (tmp_path / "a.pth").write_bytes(change(data))
    with pytest.raises(UserError, match=f"a.pth cannot be read .*{words}"):
        weights.load(tmp_path / "a.pth", resnet)


def test_an_archive_of_another_folder_without_checksums(tmp_path):
    values = np.arange(4, dtype=np.float32)
    data = bytearray(torch_files.zip_file({"a": values}, folder="elsewhere é"))
    for signature, offset in ((b"PK\x03\x04", 14), (b"PK\x01\x02", 16)):
        start = data.find(signature)
        while start >= 0:
            data[start + offset : start + offset + 4] = bytes(4)
            start = data.find(signature, start + 4)
    same(read(tmp_path, bytes(data)), {"a": values})


def test_members_that_overlap(tmp_path):
    """Each would be read, as often as the directory says."""
    data = torch_files.archive({"a/b": bytes(9999)})
    start, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    entries = b"".join(data[start:end].replace(b"a/b", b"a/%c" % n) for n in b"bcd")
    count, tail = struct.pack("<HHI", 3, 3, len(entries)), data[end:]
    (tmp_path / "a.pth").write_bytes(data[:start] + entries + tail[:8] + count + tail[16:])
    with pytest.raises(UserError, match="smaller than its members|[Oo]verlap"):
        weights.load(tmp_path / "a.pth", resnet)


def legacy(value):
    return pickle.dumps(value, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[:-1], "numbers of a tensor"),
        (cut, "cannot be read"),
        (lambda data: b"<html>404 not found</html>", "it is no pickle"),
        (lambda data: b"", "it is no pickle"),
        (lambda data: b"cos\nsystem\n(S'true'\ntR.", "it is no pickle"),
        (lambda data: legacy(3) + data, "a pickle, but not PyTorch's"),
        (lambda data: data.replace(legacy(1001), legacy(1002)), "a pickle, but not PyTorch's"),
        (lambda data: data.replace(legacy(["0"]), legacy(["1"])), "list of storages is another"),
        (lambda data: data.replace(legacy(["0"]), legacy(["0", "0"])), "storages is another"),
        (lambda data: data.replace(legacy(["0"]), legacy([])), "list of storages is another"),
        (lambda data: data.replace(legacy(["0"]), legacy([0])), "list of storages is broken"),
        (lambda data: data.replace(legacy(["0"]), legacy("0")), "list of storages is broken"),
        (lambda data: data.replace(struct.pack("<q", 4), struct.pack("<q", 3)), "numbers of"),
        (lambda data: data.replace(struct.pack("<q", 4), struct.pack("<q", -4)), "numbers of"),
    ],
)
def test_broken_files_of_the_form_before(change, words, tmp_path):
    data = torch_files.legacy_file({"a": np.arange(4, dtype=np.float32)})
    same(read(tmp_path, data), {"a": np.arange(4, dtype=np.float32)})
    (tmp_path / "a.pth").write_bytes(change(data))
    with pytest.raises(UserError, match=f"a.pth cannot be read.*{words}|{words}"):
        weights.load(tmp_path / "a.pth", resnet)


DEEP = 3 * 10**5  # tuples in each other, whose hash overflows C's stack
STORAGE = b"(X\x07\0\0\0storagectorch\n%bStorage\nX\x01\0\0\x000X\0\0\0\0K%ctQ"


@pytest.mark.parametrize(
    ("opcodes", "words"),
    [
        (b"}" + b"\x85" * DEEP + b"Ns", "its pickle is broken"),
        (b"})" + b"\x85" * DEEP + b"Ns", "neither a name nor a number"),
        (b"}" * 2**20, "longer than a state dict's"),
        # A function called 2,000 times with the same list or tuple of 2,000 items.
        (
            b"ccollections\nOrderedDict\nq\x00]("
            + b"X\x01\0\0\0aK\x01\x86" * 2000
            + b"e\x85q\x01"
            + b"h\x00h\x01R" * 2000,
            "repeats itself",
        ),
        (
            b"ctorch\nSize\nq\x00(" + b"K\x01" * 2000 + b"t\x85q\x01" + b"h\x00h\x01R" * 2000,
            "repeats itself",
        ),
        (b"]r\xff\xff\xff\xff", None),
        (b"X\xff\xff\xff\x7f", "expected 2147483647 bytes"),
        (b"\x8d" + b"\xff" * 8, "cannot be read"),
        (b"]2a", "has DUP, which a state dict's has not"),
        (b"\x8c\x02os\x8c\x06system\x93", "which a state dict's has not"),
        (b"\x82\x01", "its pickle has EXT1"),
        (b"0", "its pickle has POP"),
        (b"h\x07", "its pickle is broken"),
        (b"u", "its pickle is broken"),
        (b"}(Nu", "cannot be read"),
        (b"]" + STORAGE % (b"Float", 1) + b"a" + STORAGE % (b"Float", 2) + b"a", "in two ways"),
        (b"]" + STORAGE % (b"Float", 1) + b"a" + STORAGE % (b"Int", 1) + b"a", "in two ways"),
    ],
)
@FORMS
def test_pickles_that_would_do_harm(opcodes, words, zipped, tmp_path):
    """Of Python's own reader: crash it, or take any memory; or that are no pickles."""
    (tmp_path / "a.pth").write_bytes(torch_files.written(Raw(opcodes), zipped))
    with pytest.raises(UserError, match=words or "holds no state dict"):
        weights.load(tmp_path / "a.pth", resnet)


def test_a_list_within_itself(tmp_path):
    content = {"log": Raw(b"]q\x01h\x01a"), "model": {"a": np.zeros(3, np.float32)}}
    same(read(tmp_path, torch_files.zip_file(content)), {"a": np.zeros(3, np.float32)})


@FORMS
def test_the_authors_state_dict(zipped, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # to import it is an error
    tensors = made.protoseg(14, 1, (1,), 2, np.arange(3).repeat(2), 3)
    (tmp_path / "a.pt").write_bytes(torch_files.written({"state_dict": tensors}, zipped))
    got, expected = weights.load(tmp_path / "a.pt", resnet), resnet.port(tensors, "made")
    jax.tree.map(np.testing.assert_array_equal, got.params, expected.params)
    np.testing.assert_array_equal(got.prototype_classes, expected.prototype_classes)


def test_a_table_is_asked_for_every_name():
    stream = io.BytesIO(b"\x80\x02ca\nb\nK\x03\x85R.rest")
    assert pickles.load(stream, {"a b": lambda n: n + 1}) == 4
    assert stream.read() == b"rest"
    with pytest.raises(pickles.Foreign, match="^a.b$"):
        pickles.load(io.BytesIO(b"ca\nb\n."), {})
    with pytest.raises(ValueError, match="BINPERSID"):
        pickles.load(io.BytesIO(b"K\x01Q."), {})


def test_no_file_is_no_pickle(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(zipfile.BadZipFile):
        state_dicts.load(tmp_path / "a.pth")
