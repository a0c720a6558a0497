"""Ported weights: every tensor accounted for, files of all kinds, and what is refused."""

import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from protoseg_jax.errors import UserError
from protoseg_jax.models import resnet, unet
from protoseg_jax.models import weights as files
from tests.models import weights

CLASSES = np.arange(4).repeat(3)


def backbone(naming="torchvision", depth=26, width=4):
    tensors = weights.backbone(naming, depth, width, np.random.default_rng(0))
    classifiers = {"torchvision": "fc.weight", "deeplab": "aspp.c0.weight"}
    classifiers["transformers"] = "classifier.1.weight"
    return {**tensors, classifiers[naming]: np.zeros((5, 32 * width), np.float32)}


def protoseg(classes=CLASSES):
    return weights.protoseg(26, 4, (1, 2), 6, classes, 4)


@pytest.mark.parametrize("naming", ["torchvision", "transformers", "deeplab"])
def test_kernels_and_affine_maps(naming):
    tensors = backbone(naming)
    ported = resnet.port(tensors, "made")
    assert (ported.origin, ported.depth, ported.prototype_classes) == (naming, 26, None)
    conv, norm = weights.block_names(naming, 2, 1)[1]
    got = ported.params["backbone"]["layer3_1"]["conv2"]["kernel"]
    for o, i, y, x in ((0, 0, 0, 0), (3, 5, 1, 2), (15, 2, 2, 0)):
        assert got[y, x, i, o] == tensors[f"{conv}.weight"][o, i, y, x]
    affine = ported.frozen["backbone"]["layer3_1"]["norm2"]
    for n in range(16):
        gamma, beta, mean, variance = (
            float(tensors[f"{norm}.{key}"][n])
            for key in ("weight", "bias", "running_mean", "running_var")
        )
        for x in (-2.0, 0.0, 3.0):
            expected = (x - mean) / (variance + 1e-5) ** 0.5 * gamma + beta
            assert affine["scale"][n] * x + affine["bias"][n] == pytest.approx(expected, abs=1e-5)


def test_every_module_has_its_own_tensor():
    """No tensor of ours is filled twice or from the wrong place: names agree between origins."""
    a = resnet.port(backbone("torchvision"), "made")
    for naming in ("transformers", "deeplab"):
        b = resnet.port(backbone(naming), "made")
        assert jax.tree.structure(a.params) == jax.tree.structure(b.params)
        jax.tree.map(np.testing.assert_array_equal, (a.params, a.frozen), (b.params, b.frozen))
    kernels = jax.tree.leaves(a.params)
    assert len({k.tobytes() for k in kernels}) == len(kernels) == 1 + 4 * 7


@pytest.mark.parametrize("depth", [18, 34, 152])
def test_other_depths_fit_their_networks(depth):
    ported = resnet.port(backbone(depth=depth), "made")
    assert (ported.origin, ported.depth) == ("torchvision", depth)
    network, images = resnet.ResNet(depth, width=4), np.zeros((1, 33, 33, 3), np.float32)
    ours = jax.eval_shape(network.init, jax.random.key(0), images)
    theirs = {"params": ported.params["backbone"], "frozen": ported.frozen["backbone"]}
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), dict(ours), theirs)
    channels = 32 if depth in resnet.BASIC else 128
    assert jax.eval_shape(network.apply, theirs, images).shape == (1, 5, 5, channels)


def test_all_kinds_of_files_hold_the_same(tmp_path):
    tensors = protoseg()
    expected = resnet.port(tensors, "made")
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    files.save(expected, tmp_path / "b.npz")
    for name in ("a.safetensors", "b.npz"):
        got = files.load(tmp_path / name, resnet)
        assert (got.origin, got.depth) == ("protoseg", 26)
        np.testing.assert_array_equal(got.prototype_classes, CLASSES)
        same = (got.params, got.frozen), (expected.params, expected.frozen)
        jax.tree.map(np.testing.assert_array_equal, *same)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("layer3.1.bn2.running_var"), "1 missing: layer3.1.bn2.running_var"),
        (lambda t: t.update({"layer3.9.x": np.zeros(1)}), "3, 3 blocks|2, 2, 3, 2"),
        (lambda t: t.update({"classifier.weight": np.zeros(1)}), "1 not expected: classifier"),
        (
            lambda t: t.update({"layer1.0.conv1.weight": np.zeros((4, 9, 1, 1), np.float32)}),
            r"layer1.0.conv1.weight .4×9×1×1, not 4×4×1×1.",
        ),
        (lambda t: t["bn1.weight"].fill(np.nan), "1 not finite: bn1.weight"),
        # Without it the names are those of a ResNet-18.
        (
            lambda t: [t.pop(n) for n in list(t) if "conv3" in n],
            r"torchvision ResNet-18 .*layer1.0.conv1.weight .4×4×1×1, not 4×4×3×3.",
        ),
        (lambda t: t.clear(), "unknown network"),
        (
            lambda t: t.update({"features.bn1.weight": t["bn1.weight"]}),
            "both features.bn1.weight and bn1.weight",
        ),
        (
            lambda t: t.update({"layer1.0.norm1.weight": t.pop("layer1.0.bn1.weight")}),
            "nearest to layer1.0.bn1.weight is layer1.0.norm1.weight",
        ),
        (
            lambda t: t.update({"layer1.0.conv_1.weight": t.pop("layer1.0.conv1.weight")}),
            "unknown network .*nearest to .*layer1.0.conv1.weight is layer1.0.conv_1.weight",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    tensors = backbone()
    change(tensors)
    with pytest.raises(UserError, match=words):
        resnet.port(tensors, "made.pth")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.pth", None, "does not exist"),
        ("weights.h5", b"x", "unknown kind"),
        ("a.safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ", "unknown network"),
        ("a.safetensors", b"no weights at all", "cannot be read"),
        ("a.npz", b"no weights at all", "not one that `protoseg port` wrote"),
    ],
)
def test_files_that_are_no_weights(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        files.load(tmp_path / name, resnet)


def test_a_network_without_foreign_weights_takes_none(tmp_path):
    files.save(resnet.port(backbone(), "made"), tmp_path / "a.npz")
    with pytest.raises(UserError, match="model.backbone is 'unet', for which none are known"):
        files.load(tmp_path / "a.npz", unet)


def test_classes_of_whole_and_pruned_models():
    kernel = resnet.port(protoseg(), "made").params["head"]["kernel"]
    np.testing.assert_array_equal(files.prototype_classes(kernel, ""), CLASSES)
    pruned = [0, 1, 2, 3, 5, 6, 9]
    got = files.prototype_classes(kernel[pruned], "")
    np.testing.assert_array_equal(got, CLASSES[pruned])
    by_chance = [0, 1, 2, 3, 4, 6, 9, 10]  # 8 = 2 · 4, but not in blocks of two
    got = files.prototype_classes(kernel[by_chance], "")
    np.testing.assert_array_equal(got, CLASSES[by_chance])
    unclear = kernel[pruned].copy()
    unclear[2] = 0.1
    with pytest.raises(UserError, match="class of prototype 2 is not clear"):
        files.prototype_classes(unclear, "made.pth")


def command(*arguments):
    line = [sys.executable, "-m", "protoseg_jax", "port", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True)


def test_the_command(tmp_path):
    safetensors.numpy.save_file(backbone(), tmp_path / "resnet.safetensors")
    result = command(tmp_path / "resnet.safetensors", tmp_path / "ours.npz")
    assert result.returncode == 0, result.stderr
    got, expected = files.load(tmp_path / "ours.npz", resnet), resnet.port(backbone(), "made")
    jax.tree.map(np.testing.assert_array_equal, got.params, expected.params)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "SRC DST missing"),
        (["a.pth"], "DST missing"),
        (["a.pth", "b.npz", "c"], "unexpected argument 'c'"),
        (["/nowhere.pth", "b.npz"], "/nowhere.pth does not exist"),
        (["a.pth", "folder"], "give its --config too"),
    ],
)
def test_bad_commands_are_one_line(arguments, words):
    result = command(*arguments)
    assert result.returncode == 2 and words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
