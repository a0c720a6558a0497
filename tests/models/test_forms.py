"""Weights as people have them: names behind others, files in several parts, folders of a hub."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from protoseg_jax.errors import UserError
from protoseg_jax.models import efficientnet, names, readers, resnet, weights
from tests.models import torch_files
from tests.models import weights as made

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
HEAD = {"head.weight": 0, "criterion.weight": 1}


def backbone(naming="torchvision", depth=14):
    return made.backbone(naming, depth, 1, np.random.default_rng(0))


NETWORKS = {
    **{naming: backbone(naming) for naming in ("torchvision", "transformers", "deeplab")},
    "protoseg": made.protoseg(14, 1, (1,), 2, np.arange(3).repeat(2), 3),
}


def below(prefix, tensors):
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def same(a, b):
    assert (a.origin, a.depth) == (b.origin, b.depth)
    jax.tree.map(np.testing.assert_array_equal, (a.params, a.frozen), (b.params, b.frozen))


def bin_file(tensors):
    return torch_files.zip_file(tensors)


# -- names -------------------------------------------------------------------------------------


@given(st.sampled_from(list(NETWORKS)), st.lists(st.sampled_from(names.WRAPPERS), max_size=8))
def test_any_nesting_of_known_prefixes(network, wrappers):
    plain, prefix = NETWORKS[network], "".join(f"{w}." for w in wrappers)
    found = names.within(below(prefix, plain), resnet.ORIGINS, "made")
    assert found.keys() == plain.keys() and all(found[n] is plain[n] for n in plain)
    others = {**below("elsewhere.", HEAD), **below(prefix, plain), "loss": 3}
    within = names.within(others, resnet.ORIGINS, "made")
    assert within == (found if prefix else others)  # without a prefix nothing tells them apart


@pytest.mark.parametrize("prefix", ["", "_orig_mod.module.model.backbone."])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_file_behind_prefixes_is_the_plain_file(network, prefix, tmp_path):
    plain, path = NETWORKS[network], tmp_path / "a.ckpt"
    content = {"state_dict": {**below(prefix, plain), **(below("model.", HEAD) if prefix else {})}}
    content["state_dict"] = {n: np.asarray(t, np.float32) for n, t in content["state_dict"].items()}
    path.write_bytes(torch_files.zip_file(content))
    same(weights.load(path, resnet), resnet.port(plain, "made"))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            below("net.", NETWORKS["torchvision"]),
            r"have no layer1.0.conv1.weight, but net.layer1.0.conv1.weight: save .* .net\.\)",
        ),
        (below("model.student.", NETWORKS["transformers"]), r"before it .model.student\.\)"),
        (
            below("model.", NETWORKS["torchvision"]) | below("ema.", NETWORKS["torchvision"]),
            "hold 2 networks .ema.layer1.0.conv1.weight, model.layer1.0.conv1.weight.",
        ),
        (
            NETWORKS["torchvision"] | below("module.", NETWORKS["torchvision"]),
            "hold 2 networks .layer1.0.conv1.weight, module.layer1.0.conv1.weight.",
        ),
        (
            below("teacher.", NETWORKS["deeplab"]) | below("backbone.", NETWORKS["torchvision"]),
            "hold 2 networks .backbone.layer1.0.conv1.weight, teacher.layer1.conv1.conv.weight.",
        ),
    ],
)
def test_names_that_are_not_clear(tensors, words, tmp_path):
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=words):
        weights.load(tmp_path / "a.safetensors", resnet)


def test_of_a_part_of_the_file_every_tensor_is_accounted_for():
    tensors = {**NETWORKS["torchvision"], "other.weight": np.zeros(1)}
    found = names.within(below("module.", tensors) | HEAD, resnet.ORIGINS, "made")
    with pytest.raises(UserError, match="1 not expected: other.weight"):
        resnet.port(found, "made")


def test_prefixes_of_another_network_and_of_none():
    tensors = {"module._conv_stem.weight": 3, "module.x": 4, "y": 5}
    found = names.within(tensors, efficientnet.ORIGINS, "made")
    assert found == {"_conv_stem.weight": 3, "x": 4}
    assert names.within(tensors, {"unheard of": None}, "made") == tensors


def test_the_nearest_name():
    assert names.nearest("conv1.weight", ["conv1.weights", "a", "net.conv1.weight"]) == (
        "net.conv1.weight"
    )
    assert names.nearest("conv1.weight", ["bias", "conv_1.weight"]) == "conv_1.weight"
    assert names.nearest("conv1.weight", ["a", "x" * 9999]) is None


@pytest.mark.parametrize("depth", [18, 50, 101])
def test_transformers_names(depth):
    ours = resnet.port(backbone(depth=depth), "made")
    tensors = below("resnet.", backbone("transformers", depth))
    tensors["classifier.1.weight"] = np.zeros((5, 8))
    theirs = resnet.port(names.within(tensors, resnet.ORIGINS, "made"), "made")
    assert theirs.origin == "transformers"
    theirs.origin = "torchvision"
    same(theirs, ours)


# -- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.bin", "a.ckpt", "a.pth.tar", "a.tar", "a.PTH", "a.Pt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_names_of_pytorch_s_files(name, zipped, tmp_path):
    content = {"epoch": 3, "best_acc1": np.array(70.0), "state_dict": NETWORKS["torchvision"]}
    (tmp_path / name).write_bytes(torch_files.written(content, zipped))
    same(weights.load(tmp_path / name, resnet), resnet.port(NETWORKS["torchvision"], "made"))
    assert readers.is_weights(tmp_path / name)


def test_the_case_of_other_names(tmp_path):
    safetensors.numpy.save_file(NETWORKS["torchvision"], tmp_path / "a.SafeTensors")
    expected = resnet.port(NETWORKS["torchvision"], "made")
    weights.save(expected, tmp_path / "b.npz")
    shutil.move(tmp_path / "b.npz", tmp_path / "b.NPZ")
    for name in ("a.SafeTensors", "b.NPZ"):
        same(weights.load(tmp_path / name, resnet), expected)


def write_shards(folder, tensors, index=INDEX):
    """Two files and their index, whose value is returned."""
    items = sorted(tensors.items())
    places = {}
    for number, part in enumerate((items[::2], items[1::2]), start=1):
        base, suffix, *_ = index.split(".")
        shard = folder / f"{base}-0000{number}-of-00002.{suffix}"
        write = safetensors.numpy.save if suffix == "safetensors" else bin_file
        shard.write_bytes(write(dict(part)))
        places |= dict.fromkeys(dict(part), shard.name)
    value = {"metadata": {"total_size": 3}, "weight_map": places}
    (folder / index).write_text(json.dumps(value))
    return value


@pytest.mark.parametrize("index", [INDEX, "pytorch_model.bin.index.json"])
def test_shards_by_index_by_one_of_them_and_by_folder(index, tmp_path):
    value = write_shards(tmp_path, below("resnet.", NETWORKS["transformers"]), index)
    expected = resnet.port(NETWORKS["transformers"], "made")
    for path in (tmp_path, tmp_path / index, *{tmp_path / n for n in value["weight_map"].values()}):
        assert readers.is_weights(path)
        same(weights.load(path, resnet), expected)


def test_a_shard_that_is_the_only_one(tmp_path):
    path = tmp_path / "model-00001-of-00001.safetensors"
    safetensors.numpy.save_file(NETWORKS["torchvision"], path)
    same(weights.load(path, resnet), resnet.port(NETWORKS["torchvision"], "made"))


def drop(value, folder):
    (folder / SHARDS[1]).unlink()


def cut(value, folder):
    path = folder / SHARDS[0]
    path.write_bytes(path.read_bytes()[:-9])


def copy(value, folder):
    shutil.copy(folder / SHARDS[0], folder / SHARDS[1])


def place(name, file):
    def change(value, folder):
        value["weight_map"][name] = file
        (folder / INDEX).write_text(json.dumps(value))

    return change


def write(text):
    return lambda value, folder: (folder / INDEX).write_bytes(text)


OUTSIDE = "which is no weights file of its folder"
FIRST, SECOND = sorted(NETWORKS["torchvision"])[:2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop, f"{SHARDS[1]} is not there, which .*{INDEX} names; fetch it"),
        (cut, f"{SHARDS[0]} cannot be read"),
        (copy, f"{SHARDS[1]} has no {SECOND}, .*; .*{INDEX} says otherwise"),
        (place("new.weight", SHARDS[0]), f"{SHARDS[0]} has no new.weight; .* says otherwise"),
        (place(FIRST, SHARDS[1]), f"has {FIRST}, too, which is to be in {SHARDS[1]}"),
        (place(FIRST, "../a.safetensors"), OUTSIDE),
        (place(FIRST, "..\\a.safetensors"), OUTSIDE),
        (place(FIRST, "/a.safetensors"), OUTSIDE),
        (place(FIRST, "a\0.safetensors"), OUTSIDE),
        (place(FIRST, ".safetensors"), OUTSIDE),
        (place(FIRST, "a" * 9999 + ".safetensors"), OUTSIDE),
        (place(FIRST, "config.json"), OUTSIDE),
        (place(FIRST, INDEX), OUTSIDE),
        (place(FIRST, "a.npz"), OUTSIDE),
        (place(FIRST, 3), "has no weight_map of tensors' names"),
        (write(b"{}"), "has no weight_map"),
        (write(b'{"weight_map": [1]}'), "has no weight_map"),
        (write(b'{"weight_map": {}}'), "unknown network"),
        (write(b"[1]"), "is no JSON .no object.; fetch it again"),
        (write(b"<html>404</html>"), "is no JSON"),
        (write(b"\xff\xfe\xfd"), "is no JSON"),
        (write(b"[" * 10**5), "is no JSON"),
        (write(b'{"weight_map": {"a": "b", "a": "c"}}'), "a is in it twice"),
    ],
)
def test_broken_indices(change, words, tmp_path):
    change(write_shards(tmp_path, NETWORKS["torchvision"]), tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        weights.load(tmp_path / INDEX, resnet)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_shard_without_its_index(tmp_path):
    write_shards(tmp_path, NETWORKS["torchvision"])
    (tmp_path / INDEX).unlink()
    with pytest.raises(UserError, match=f"is one of 2, and {INDEX}, .* is not beside it; fetch"):
        weights.load(tmp_path / SHARDS[1], resnet)


# -- folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("config", "origin"),
    [
        ({"downsample_in_bottleneck": False, "layer_type": "bottleneck"}, "transformers"),
        ({"downsample_in_bottleneck": True, "hidden_act": "relu"}, "transformers_1x1"),
        ({"downsample_in_bottleneck": True, "layer_type": "basic"}, "transformers"),
        ({}, "transformers"),
        (None, "transformers"),
    ],
)
def test_a_folder_of_a_hub(file, config, origin, tmp_path):
    """The stride is where its config says."""
    data = (safetensors.numpy.save if "safe" in file else bin_file)(NETWORKS["transformers"])
    (tmp_path / file).write_bytes(data)
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet", **config}))
    for path in (tmp_path, tmp_path / file):
        found = weights.load(path, resnet)
        assert found.origin == origin and readers.is_weights(path)
    assert resnet.ORIGINS[origin].stride_in == ("1x1" if origin.endswith("1x1") else "3x3")


def test_a_folder_of_timm_s(tmp_path):
    """Names are torchvision's; its config is another's, which nobody reads."""
    safetensors.numpy.save_file(NETWORKS["torchvision"], tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "resnet50", "hidden_act": "gelu"}')
    same(weights.load(tmp_path, resnet), resnet.port(NETWORKS["torchvision"], "made"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('{"hidden_act": "gelu"}', "config.json says hidden_act=gelu, .* with hidden_act=relu"),
        ('{"downsample_in_first_stage": true}', "says downsample_in_first_stage=True"),
        ('{"downsample_in_bottleneck": "yes"}', "downsample_in_bottleneck=False or True"),
        ("{", "config .*config.json is no JSON"),
    ],
)
def test_configs_of_other_networks(config, words, tmp_path):
    safetensors.numpy.save_file(NETWORKS["transformers"], tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=words):
        weights.load(tmp_path, resnet)


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")  # as a run of ours has
    assert not readers.is_weights(tmp_path) and readers.in_folder(tmp_path) is None
    with pytest.raises(UserError, match="holds no weights .model.safetensors, .*; name a weights"):
        weights.load(tmp_path, resnet)
