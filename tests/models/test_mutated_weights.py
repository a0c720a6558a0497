"""Broken weight files are loaded or refused in a line; a judge of them that can be wrong."""

import json
import os
import random
import sys
import warnings

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from protoseg_jax.errors import UserError
from protoseg_jax.models import readers, resnet, weights
from tests import mutate_weights
from tests.models import torch_files
from tests.models import weights as made


def judge_all(mutants, path):
    """Some are loaded, some refused, and no more."""
    found = {"loaded": 0, "refused": 0}
    for number, (done, data) in enumerate(mutants):
        path.write_bytes(data)
        verdict, details = mutate_weights.judge(path)
        assert verdict in found, f"{path.name} {number} ({done}): {verdict}: {details}"
        found[verdict] += 1
    assert all(found.values()), found


@pytest.mark.parametrize("suffix", mutate_weights.SAMPLES)
def test_a_hundred_mutants(suffix, tmp_path):
    mutants = mutate_weights.Mutants(suffix, seed=1)
    judge_all((mutants[n] for n in range(100)), tmp_path / f"mutant{suffix}")


@pytest.mark.parametrize("zipped", [True, False])
def test_mutants_with_other_objects_beside(zipped, tmp_path, monkeypatch):
    def write(tensors):
        named = {f"model.backbone.{name}": tensor for name, tensor in tensors.items()}
        return torch_files.written({**torch_files.BESIDE, "state_dict": named}, zipped)

    sample = mutate_weights.Sample(torchvision(), write)
    monkeypatch.setitem(mutate_weights.SAMPLES, ".pth", lambda: [sample])
    mutants = mutate_weights.Mutants(".pth", seed=3)
    judge_all((mutants[n] for n in range(60)), tmp_path / "mutant.ckpt")


def mutated_indices(index, rng):
    """Bytes changed, or a file's name or a tensor's."""
    text = json.dumps(index).encode()
    names = ("../a.bin", "/etc/passwd", "a.npz", "", ".", "b.bin", "\ud800.bin", 3, None, ["a"])
    for _ in range(80):
        if rng.random() < 0.5:
            yield "bytes", rng.choice(mutate_weights.BYTES)(text, rng)
            continue
        places = dict(index["weight_map"])
        tensor = rng.choice(list(places))
        if rng.random() < 0.5:
            places[tensor] = rng.choice(names)
        else:
            places[rng.choice(("", "x", tensor.upper(), tensor))] = places.pop(tensor)
        yield f"{tensor} in {places.get(tensor)}", json.dumps({"weight_map": places}).encode()


def test_mutants_of_an_index(tmp_path):
    items, places = sorted(torchvision().items()), {}
    for name, part in (("a.bin", items[::2]), ("b.bin", items[1::2])):
        (tmp_path / name).write_bytes(torch_files.zip_file(dict(part)))
        places |= dict.fromkeys(dict(part), name)
    mutants = mutated_indices({"metadata": {}, "weight_map": places}, random.Random(0))
    judge_all(mutants, tmp_path / "pytorch_model.bin.index.json")


def test_every_kind_of_file_is_mutated():
    assert mutate_weights.SAMPLES.keys() == readers.READERS.keys()


def raises(path):
    raise IndexError("in our own code")


def shadows(path):
    raise UserError("no file, no reason")


def is_not_finite(path):
    params = {"backbone": {"x": np.full(1, np.nan, np.float32)}}
    return weights.Ported("torchvision", 14, params, {})


@pytest.mark.parametrize(
    ("fault", "verdict"),
    [
        (raises, "traceback"),
        (shadows, "an odd line"),
        (is_not_finite, "nonsense loaded"),
        (lambda path: os.system("true"), "executed"),
        (lambda path: mutate_weights.CANARY.touch(), "executed"),
        (lambda path: os.write(2, b"a library's words"), "printed"),
        (lambda path: warnings.warn("a library's words", stacklevel=1), "printed"),
        (lambda path: print("a library's words", file=sys.__stdout__), "printed"),
    ],
)
def test_what_is_wrong_is_told(fault, verdict, tmp_path, monkeypatch):
    def load(path, network):
        found = fault(path)
        return found if isinstance(found, weights.Ported) else weights.Ported("made", 14, {}, {})

    monkeypatch.setattr(weights, "load", load)
    try:
        assert mutate_weights.judge(tmp_path / "a.npz")[0] == verdict
    finally:
        mutate_weights.CANARY.unlink(missing_ok=True)


def torchvision():
    return made.backbone("torchvision", 14, 1, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("bn1.running_var", np.array([-1], np.float32), "1 without a scale: bn1"),
        ("bn1.weight", np.array([1j], np.complex64), "1 not numbers: bn1.weight"),
        ("bn1.weight", np.array(["a"]), "1 not numbers: bn1.weight"),
        ("bn1.weight", np.array([1e300]), "1 not finite: bn1.weight"),
        ("bn1.weight", np.array(1.0), "1 of another shape: bn1.weight .,"),
        ("conv1.weight", np.zeros((0, 3, 7, 7)), "conv1.weight .0×3×7×7, not 64×3×7×7."),
        ("conv1.weight", np.zeros((2**40, 0, 7, 7)), "conv1.weight .1099511627776×0×7×7, not 64"),
        ("x" * 1000, np.zeros(1), "1 not expected: x{150}…"),
    ],
)
def test_tensors_of_another_kind(name, value, words):
    with warnings.catch_warnings(), pytest.raises(UserError, match=words):
        warnings.simplefilter("error")
        resnet.port({**torchvision(), name: value}, "made.pth")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("origin", None, "it names no origin"),
        ("origin", np.array(["a", "b"]), "it names no origin"),
        ("origin", np.array("elsewhere"), "are of the origin elsewhere"),
        ("depth", np.array(1.5), "it names no depth"),
        ("params/backbone/conv1/kernel", np.zeros(1), "is not of finite float32 numbers"),
        ("params/backbone/conv1/kernel", np.full(1, np.inf, np.float32), "not of finite"),
        ("params/backbone/conv1", np.zeros(1, np.float32), "conv1/ is an array, too"),
        ("params/x", np.zeros(1, np.float32), "params/x is none of its names"),
        ("params/" + "x/" * 99, np.zeros(1, np.float32), "is none of its names"),
        ("params/head/kernel", None, "its prototypes' classes are not those of its last layer"),
        ("prototype_classes", None, "its prototypes' classes are not those of its last layer"),
        ("prototype_classes", np.full(6, 3), "its prototypes' classes are not"),
        ("prototype_classes", np.zeros((6, 1), int), "its prototypes' classes are not"),
        ("prototype_classes", np.zeros(6), "its prototypes' classes are not"),
    ],
)
def test_an_npz_that_port_did_not_write(name, value, words, tmp_path):
    tensors = made.protoseg(14, 1, (1,), 2, np.arange(3).repeat(2), 3)
    weights.save(resnet.port(tensors, "made"), tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        arrays = {**file, name: value}
    np.savez(tmp_path / "a.npz", **{n: a for n, a in arrays.items() if a is not None})
    with pytest.raises(UserError, match=words):
        weights.load(tmp_path / "a.npz", resnet)


def test_bfloat16(tmp_path):
    tensors = {n: t.astype(ml_dtypes.bfloat16) for n, t in torchvision().items()}
    rounded = {n: t.astype(np.float32) for n, t in tensors.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    got = weights.load(tmp_path / "a.safetensors", resnet).params["backbone"]
    expected = resnet.port(rounded, "made").params["backbone"]
    np.testing.assert_array_equal(got["conv1"]["kernel"], expected["conv1"]["kernel"])
