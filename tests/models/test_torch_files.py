"""PyTorch's files, read as PyTorch reads them: what it writes, and what mutants hold."""

import argparse
import collections
import enum
import functools
import pathlib

import numpy as np
import pytest

from protoseg_jax.errors import UserError
from protoseg_jax.models import readers, resnet, torch_tensors, weights
from tests import mutate_weights
from tests.models import torch_files
from tests.models import weights as made

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:.*encountered in cast")]
MUTANTS = 300
FORMS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def theirs(path):
    """The tensors of a file by PyTorch, floating-point numbers as float32."""
    zipped = path.read_bytes()[:4] == b"PK\x03\x04"
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    for key in readers.STATE_DICTS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    return {
        name: np.array((t.float() if t.is_floating_point() else t).detach())
        for name, t in state.items()
    }


def check(path):
    """Both readers find the same; its tensors."""
    got, expected = readers.READERS[path.suffix](path), theirs(path)
    assert list(got) == list(expected)
    for name, array in expected.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape, name
        assert got[name].flags.writeable and got[name].dtype.isnative
        np.testing.assert_array_equal(got[name], array)
    return got


def save(content, path, zipped):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)


@FORMS
@pytest.mark.parametrize("name", torch_tensors.DTYPES)
def test_every_type_of_numbers(name, zipped, tmp_path):
    """Each byte value is among the numbers' bytes: infinities, NaNs, subnormals."""
    dtype = getattr(torch, name)
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.uint8)
    numbers = every[: 2**17 - 2**17 % 16]
    content = {"a": (numbers % 2).to(torch.bool) if name == "bool" else numbers.view(dtype)}
    content["b"] = torch.zeros(3, 2).to(dtype)
    content["c"] = torch.zeros(()).to(dtype)
    content["d"] = torch.zeros(2, 0, 3).to(dtype)
    path = tmp_path / "a.pth"
    save(content, path, zipped)
    if zipped or name in torch_files.STORAGES:
        assert len(check(path)) == 4
        return
    content = {n: t.float() if dtype.is_floating_point else t for n, t in content.items()}
    for n, array in readers.READERS[".pth"](path).items():  # PyTorch itself reads none of these
        np.testing.assert_array_equal(array, content[n].numpy(), strict=True)


@FORMS
def test_views_and_parameters(zipped, tmp_path):
    base = torch.arange(60.0).reshape(3, 4, 5)
    parameter = torch.nn.Parameter(base[1])
    parameter.note = "kept"
    content = collections.OrderedDict(
        whole=base,
        turned=base.permute(2, 0, 1),
        part=base[1:, ::2, 3],
        repeated=base[0, 0, :1].expand(4, 3),
        one=base[2, 3, 4],
        none=base[3:],
        parameter=torch.nn.Parameter(base.half()),
        frozen=torch.nn.Parameter(base, requires_grad=False),
        noted=parameter,
        channels_last=torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
    )
    save(content, tmp_path / "a.pth", zipped)
    assert len(check(tmp_path / "a.pth")) == len(content)


@FORMS
@pytest.mark.parametrize("key", [*readers.STATE_DICTS, None])
def test_a_module_and_its_training(key, zipped, tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.Adam(module.parameters(), amsgrad=True)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 4, 4])
    module(torch.ones(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    content = {
        **{"epoch": 3, "best": 0.5, "name": "é", "seed": torch.initial_seed(), "log": [1.5, None]},
        **{"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()},
        **{"shape": module[0].weight.shape, "random": torch.get_rng_state()},
    }
    state_dict = module.state_dict()
    for kept in (state_dict, module.state_dict(keep_vars=True)):
        save({**content, key: kept} if key else kept, tmp_path / "a.pt", zipped)
        assert len(check(tmp_path / "a.pt")) == len(state_dict) == 7
    save(module, tmp_path / "whole.pth", zipped)
    with pytest.raises(UserError, match="whole module.*torch.nn.modules.container.Sequential"):
        weights.load(tmp_path / "whole.pth", resnet)


class Monitor(enum.Enum):
    LOSS = "loss"


class Settings(dict):
    """As Lightning's AttributeDict: a dict with attributes."""


@FORMS
def test_a_checkpoint_of_lightning(zipped, tmp_path):
    """PyTorch itself reads it by executing it alone; all but the state dict is left out here."""
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(module.parameters())
    settings = Settings(lr=1e-3, optimizer=torch.optim.AdamW, root=pathlib.Path("/data"))
    settings.note = np.float64(0.5)
    content = {
        "epoch": 3,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": module.state_dict(),
        "loops": {"fit_loop": {"state_dict": {}, "progress": {"current": {"ready": 1}}}},
        "callbacks": {Monitor: {"best": torch.tensor(0.5), "mode": Monitor.LOSS}, (1, 2): None},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"lambda": functools.partial(max, 1), "seen": {1, 2}}],
        "hparams_name": "args",
        "hyper_parameters": settings,
        "args": argparse.Namespace(size=np.arange(3), device=torch.device("cpu")),
    }
    save(content, tmp_path / "a.pth", zipped)
    got = readers.READERS[".pth"](tmp_path / "a.pth")
    assert list(got) == list(module.state_dict())
    for name, tensor in module.state_dict().items():
        np.testing.assert_array_equal(got[name], tensor.numpy())


@FORMS
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_what_pytorch_writes_and_we_refuse(zipped, tmp_path):
    ones = torch.ones(4, 3)
    for value, words in (
        (torch.empty(2**40, device="meta"), "_rebuild_meta_tensor_no_storage, of which nothing"),
        (ones.to_sparse(), "_rebuild_sparse_tensor, of which nothing"),
        (
            torch.quantize_per_tensor(ones, 0.1, 0, torch.qint8),
            "_rebuild_qtensor, of which nothing",
        ),
        (ones.to(torch.complex64).conj(), "another's conjugate or negative"),
        (ones[0, :1].expand(2**40), "a is larger than the file"),
        (np.float64(3), "numpy.*of which nothing is read"),
    ):
        save({"a": value}, tmp_path / "a.pth", zipped)
        with pytest.raises(UserError, match=words):
            weights.load(tmp_path / "a.pth", resnet)


def test_a_file_without_checksums(tmp_path):
    tensors = made.backbone("torchvision", 14, 1, np.random.default_rng(0))
    torch.serialization.set_crc32_options(False)
    try:
        save({n: torch.tensor(t) for n, t in tensors.items()}, tmp_path / "a.pth", True)
    finally:
        torch.serialization.set_crc32_options(True)
    assert len(check(tmp_path / "a.pth")) == len(tensors)


@FORMS
def test_files_that_our_tests_write(zipped, tmp_path):
    base = np.arange(12, dtype=np.float32)
    content = {name: base.astype(dtype) for name, dtype in torch_tensors.DTYPES.items()}
    content["view"] = torch_files.View(base, 1, (2, 3), (1, 4))
    content["parameter"] = torch_files.Parameter(base)
    content["one"] = np.array(3)
    old = {n: v for n, v in content.items() if n in (*torch_files.STORAGES, "view", "parameter")}
    path = tmp_path / "a.pth"
    path.write_bytes(torch_files.written(content if zipped else old, zipped))
    assert len(check(path)) == len(content if zipped else old)
    if zipped:  # PyTorch does not swap the bytes of newer types
        path.write_bytes(torch_files.zip_file(old, "big"))
        assert len(check(path)) == len(old)


def test_mutants_hold_what_pytorch_finds_in_them(tmp_path):
    """Or are refused. Of those we read PyTorch refuses some by fields of the archive that `zipfile`
    does not look at, such as how many disks it is on."""
    mutants, path, loaded = mutate_weights.Mutants(".pth", seed=2), tmp_path / "a.pth", 0
    for number in range(MUTANTS):
        done, data = mutants[number]
        path.write_bytes(data)
        try:
            readers.READERS[".pth"](path)
        except Exception:
            continue
        loaded += 1
        try:
            check(path)
        except Exception as error:
            if "failed reading zip archive" not in str(error):
                raise AssertionError(f"mutant {number} ({done})") from error
    assert MUTANTS / 20 < loaded < MUTANTS
