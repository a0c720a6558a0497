"""`protoseg_jax.load`: what it says equals the run's own numbers, without the data set."""

import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import protoseg_jax
from protoseg_jax.data.tiles import Tiled
from protoseg_jax.errors import UserError
from protoseg_jax.evaluation import segmentation
from protoseg_jax.files import read_json, write_json


@pytest.fixture(scope="module")
def alone(small_run, tmp_path_factory):
    """The run's folder by itself: config's data.dir and cache lead nowhere."""
    path = tmp_path_factory.mktemp("alone") / "run"
    shutil.copytree(small_run.workdir.path, path)
    config = read_json(path / "config.json")
    config["data"] |= {"dir": "/nowhere", "cache": "/nowhere"}
    write_json(path / "config.json", config)
    return path


@pytest.fixture(scope="module")
def model(alone):
    return protoseg_jax.load(alone)


@pytest.fixture(scope="module")
def image(small_run):
    return small_run.experiment.data.source("validation")[0]["image"]


def test_importing_the_package_brings_no_jax():
    line = "import sys, protoseg_jax; assert 'jax' not in sys.modules; protoseg_jax.load"
    subprocess.run([sys.executable, "-c", line], check=True)
    with pytest.raises(AttributeError, match="nothing"):
        _ = protoseg_jax.nothing


def test_segments_as_evaluation_does(small_run, model, image):
    inference, variables = small_run.inference, small_run.checkpoint.variables
    output = jax.jit(inference)(variables, inference.prepare(image)[None])
    size = image.shape[:2]
    upsample = jax.jit(segmentation.upsample, static_argnums=2)
    full = np.asarray(upsample(output.logits, np.array([size]), size))[0]
    found = model.segment(image)
    np.testing.assert_array_equal(found.labels, full.argmax(-1))
    np.testing.assert_allclose(found.probabilities, jax.nn.softmax(full), atol=1e-5)
    why = model.explain(image)
    np.testing.assert_allclose(why.parts[0].points.similarities, output.similarities[0], atol=1e-4)
    nearest = output.distances[0].min(-1)
    h, w = nearest.shape
    for row, col in [(0, 0), (size[0] - 1, size[1] - 1), (20, 11)]:
        assert why.novelty[row, col] == pytest.approx(
            nearest[row * h // size[0], col * w // size[1]]
        )


def test_an_explanation_holds_the_segmentation(model, image):
    """The same labels and probabilities, of one pass through the network."""
    found, why = model.segment(image), model.explain(image).segmentation
    np.testing.assert_array_equal(why.labels, found.labels)
    np.testing.assert_allclose(why.probabilities, found.probabilities, atol=1e-6)


@pytest.mark.parametrize("size", [(40, 56), (97, 33), (200, 131)])
def test_contributions_add_up_to_the_logits_of_the_segmentation(model, image, size):
    image = np.array(Image.fromarray(image).resize(size[::-1]))
    labels, why = model.segment(image).labels, model.explain(image)
    probabilities = model.segment(image).probabilities
    rng = np.random.default_rng(0)
    for row, col in zip(rng.integers(0, size[0], 20), rng.integers(0, size[1], 20), strict=True):
        pixel = why.at(row, col)
        assert pixel.label == labels[row, col]
        parts = pixel.similarities @ why.kernel
        np.testing.assert_allclose(parts, pixel.logits, atol=1e-4)
        assert pixel.contributions.sum() == pytest.approx(pixel.logits.max(), abs=1e-4)
        top = np.sort(pixel.logits)
        assert pixel.margins.sum() == pytest.approx(top[-1] - top[-2], abs=1e-4)
        np.testing.assert_allclose(jax.nn.softmax(pixel.logits), probabilities[row, col], atol=1e-4)
    with pytest.raises(UserError, match="outside the image"):
        why.at(size[0], 0)


def test_an_array_a_pil_image_and_a_path_are_the_same(model, image, tmp_path):
    Image.fromarray(image).save(tmp_path / "a.png")
    expected = model.segment(image).probabilities
    for other in (Image.fromarray(image), tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_array_equal(model.segment(other).probabilities, expected)
    opaque = Image.fromarray(np.dstack([image, np.full_like(image[..., 0], 255)]))
    opaque.save(tmp_path / "opaque.png")  # as most screenshots are
    for other in (opaque, tmp_path / "opaque.png"):
        np.testing.assert_array_equal(model.segment(other).probabilities, expected)
    grey = image[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    expected = model.segment(np.stack([grey] * 3, -1)).probabilities
    for other in (grey, grey[..., None], Image.fromarray(grey), tmp_path / "grey.png"):
        np.testing.assert_array_equal(model.segment(other).probabilities, expected)


def test_a_picture_of_16_bits_takes_the_run_s_white(alone, image, tmp_path):
    shutil.copytree(alone, tmp_path / "run")
    config = read_json(tmp_path / "run" / "config.json")
    config["data"]["white"] = 255 * 16
    write_json(tmp_path / "run" / "config.json", config)
    model, deep = protoseg_jax.load(tmp_path / "run"), image.astype(np.uint16) * 16
    expected = model.segment(image).labels
    np.testing.assert_array_equal(model.segment(deep).labels, expected)
    np.testing.assert_array_equal(model.explain(deep).segmentation.labels, expected)
    with pytest.raises(UserError, match="16 bits a channel, .* the run has no data.white"):
        protoseg_jax.load(alone).segment(deep)


def test_images_that_are_none_are_refused_in_one_line(model, image, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(np.zeros((4, 4, 4), np.uint8)).save(tmp_path / "alpha.png")
    cases = [
        (tmp_path / "text.png", "text.png does not decode .of no known format."),
        (tmp_path / "none.png", "does not exist"),
        (tmp_path / "alpha.png", "has transparent pixels"),
        (image.astype(np.float32), "is float32"),
        (np.zeros((3, 4, 5), np.uint8), r"is uint8 \[3, 4, 5\]"),
    ]
    for bad, words in cases:
        with pytest.raises(UserError, match=words) as error:
            model.segment(bad)
        assert "\n" not in str(error.value)


def test_a_run_is_told_in_a_line(model):
    assert len(repr(model)) < 300 and "phase projection" in repr(model)
    assert f"{len(model.prototypes)} prototypes of ground, disc, bar" in repr(model)


def test_prototypes_bring_their_patches(small_run, model):
    """Patch and source come with the run; boxes say where the patch lies in both."""
    assert model.projected and len(model.prototypes) == len(model.kernel)
    source = small_run.experiment.data.source("train")
    for prototype in model.prototypes:
        original = source[prototype.image]["image"]
        top, left, bottom, right = prototype.box
        y, x, down, across = prototype.patch_box
        np.testing.assert_array_equal(
            prototype.patch[y:down, x:across], original[top:bottom, left:right]
        )
        assert prototype.source_size == original.shape[:2]
        with Image.open(prototype.source) as kept:
            assert kept.size == original.shape[1::-1]
            difference = np.abs(np.asarray(kept, float) - original)
        assert difference.mean() < 12  # JPEG's loss on noise; another image differs by 13 and more


def test_a_prototype_wins_on_its_own_patch_or_says_so(small_run, model):
    """On its source image the prototype's own point has novelty 0 and similarity log(1/ε)."""
    prototype = model.prototypes[1]
    image = small_run.experiment.data.source("train")[prototype.image]["image"]
    points = model.explain(image).parts[0].points
    place = prototype.row, prototype.col
    assert points.novelty[place] == pytest.approx(0, abs=1e-9)
    assert points.similarities[*place, 1] == pytest.approx(np.log(1e4), abs=1e-3)


def test_tiles_decide_their_own_part(alone, image, tmp_path):
    shutil.copytree(alone, tmp_path / "tiled")
    config = read_json(alone / "config.json") | {"eval_overlap": 9}
    write_json(tmp_path / "tiled" / "config.json", config)
    whole, tiled = protoseg_jax.load(alone), protoseg_jax.load(tmp_path / "tiled")
    big = np.array(Image.fromarray(image).resize((120, 90)))
    example = {"image_id": "", "image": big, "label": np.zeros((90, 120), np.uint8)}
    tiles, why, found = Tiled([example], (49, 57), 9), tiled.explain(big), tiled.segment(big)
    assert len(why.parts) == len(tiles) > 1
    assert why.winning_prototype.shape == why.novelty.shape == (90, 120)
    for number, place in enumerate(tiles.places):
        tile = tiles[number]["image"]
        top, left, bottom, right = place.own
        labels = whole.segment(tile).labels
        (y, x) = place.corner
        np.testing.assert_array_equal(
            found.labels[top:bottom, left:right], labels[top - y : bottom - y, left - x : right - x]
        )
        np.testing.assert_allclose(
            why.at(bottom - 1, left).logits, whole.explain(tile).at(bottom - 1 - y, left - x).logits
        )
    with pytest.raises(UserError, match="tiles of 49×57"):
        tiled.segment(image)


def test_a_phase_can_be_named_and_must_exist(alone, image, tmp_path):
    early = protoseg_jax.load(alone, "joint")
    assert not early.projected and early.prototypes[0].patch is None
    assert early.explain(image).at(3, 4).contributions.shape == (9,)
    with pytest.raises(UserError, match="holds no run"):
        protoseg_jax.load(tmp_path)
    with pytest.raises(UserError, match="has not finished phase 'warmup'"):
        protoseg_jax.load(alone, "warmup")
    shutil.copytree(alone, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "prototypes")
    bare = protoseg_jax.load(tmp_path / "bare")
    assert bare.projected and bare.prototypes[0].patch is None and bare.prototypes[0].source is None
