"""Augmentation: scale, padding, crop, flip; image and labels stay together."""

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protoseg_jax import config as configs
from protoseg_jax.data import augment
from protoseg_jax.data.augment import Augment
from protoseg_jax.data.labels import VOID, generic
from protoseg_jax.errors import UserError
from protoseg_jax.images import pad_and_crop, resize_image, resize_labels

GREY = (124, 116, 104)


def example(h, w):
    """Every pixel's label can be read off its image: value 10 · label in every channel."""
    label = (np.arange(h)[:, None] // 4 + np.arange(w)[None] // 4) % 7
    image = np.repeat((10 * label).astype(np.uint8)[..., None], 3, -1)
    return {"image": image, "label": label.astype(np.uint8)}


@given(
    h=st.integers(5, 60),
    w=st.integers(5, 60),
    crop=st.tuples(st.integers(4, 40), st.integers(4, 40)),
    seed=st.integers(0, 2**32 - 1),
)
def test_sizes_padding_and_the_box(h, w, crop, seed):
    aug = Augment(crop, (0.5, 1.5), GREY)
    choice = aug.choose((h, w), np.random.default_rng(seed))
    assert choice.box[2:] == crop
    for n, size in enumerate((h, w)):
        assert size * 0.5 - 1 < choice.size[n] <= size * 1.5
        start = choice.box[n]
        assert start == 0 or start + crop[n] <= choice.size[n]  # padding only where it must be
    out = aug.random_map(example(h, w), np.random.default_rng(seed))
    assert out["image"].shape == (*crop, 3) and out["label"].shape == crop
    assert out["image"].dtype == out["label"].dtype == np.uint8
    inside = np.zeros(crop, bool)
    inside[: choice.size[0] - choice.box[0], : choice.size[1] - choice.box[1]] = True
    inside = inside[:, ::-1] if choice.flip else inside
    np.testing.assert_array_equal(out["label"] == VOID, ~inside)
    assert (out["image"][~inside] == GREY).all()


@given(st.tuples(st.integers(5, 60), st.integers(5, 60)), st.integers(0, 2**32 - 1))
@hypothesis.example((5, 47), 45149)  # to 5 × 48, but what the crop needs to its own size
def test_a_crop_is_what_is_cut_out_of_the_whole_scaled_example(size, seed):
    """To the bit, though no more is scaled than the crop needs."""
    aug, rng = Augment((24, 20), (0.5, 1.5), GREY), np.random.default_rng(seed)
    source = {k: rng.permuted(v.ravel()).reshape(v.shape) for k, v in example(*size).items()}
    out = aug.random_map(source, np.random.default_rng(seed))
    choice = aug.choose(size, np.random.default_rng(seed))
    for key, resize, fill in (("image", resize_image, GREY), ("label", resize_labels, VOID)):
        whole = pad_and_crop(resize(source[key], choice.size), choice.box, fill)
        np.testing.assert_array_equal(out[key], whole[:, ::-1] if choice.flip else whole)
        assert out[key].flags.c_contiguous


@given(st.tuples(st.integers(5, 90), st.integers(5, 90)), st.integers(0, 99))
def test_images_of_any_size_are_scaled_as_evaluation_sees_them(size, seed):
    """With a size of the whole, what is drawn is the same for every image."""
    aug = Augment((24, 20), (0.5, 1.5), GREY, whole=(40, 33))
    choice = aug.choose(size, np.random.default_rng(seed))
    assert choice == Augment((24, 20), (0.5, 1.5), GREY).choose(
        (40, 33), np.random.default_rng(seed)
    )
    out = aug.random_map(example(*size), np.random.default_rng(seed))
    whole = resize_labels(example(*size)["label"], choice.size)
    whole = pad_and_crop(whole, choice.box, VOID)
    np.testing.assert_array_equal(out["label"], whole[:, ::-1] if choice.flip else whole)


def test_labels_follow_their_pixels_and_both_flips_occur():
    """At scale 1 every pixel still says its label, whatever was cut and flipped."""
    aug, flips = Augment((24, 20), (1.0, 1.0), GREY), set()
    for seed in range(30):
        out = aug.random_map(example(40, 33), np.random.default_rng(seed))
        np.testing.assert_array_equal(out["image"][..., 0], 10 * out["label"])
        choice = aug.choose((40, 33), np.random.default_rng(seed))
        top, left, height, width = choice.box
        cut = example(40, 33)["label"][top : top + height, left : left + width]
        np.testing.assert_array_equal(out["label"], cut[:, ::-1] if choice.flip else cut)
        flips.add(choice.flip)
    assert flips == {True, False}


def test_scale_is_uniform_in_its_range_and_every_place_is_cut():
    aug = Augment((50, 50), (0.5, 1.5), GREY)
    rng = np.random.default_rng(0)
    choices = [aug.choose((1000, 1000), rng) for _ in range(4000)]
    scales = np.array([c.size[0] for c in choices]) / 1000
    histogram, _ = np.histogram(scales, bins=10, range=(0.5, 1.5))
    assert histogram.sum() == 4000 and histogram.min() > 320 and histogram.max() < 480
    small = Augment((5, 5), (1.0, 1.0), GREY)
    tops = {small.choose((7, 7), rng).box[0] for _ in range(100)}
    assert tops == {0, 1, 2}


@pytest.mark.parametrize("scale", [0.5, 0.73, 1.0, 1.5])
def test_labels_are_nearest_and_images_bilinear(scale):
    """Literally: half-pixel centres; no label appears that was not at the nearest source pixel."""
    source = example(23, 31)
    h, w = int(23 * scale), int(31 * scale)
    out = Augment((h, w), (scale, scale), GREY).random_map(source, np.random.default_rng(3))
    flip = Augment((h, w), (scale, scale), GREY).choose((23, 31), np.random.default_rng(3)).flip
    label, image = out["label"], out["image"].astype(float)
    if flip:
        label, image = label[:, ::-1], image[:, ::-1]
    for i in range(h):
        for j in range(w):
            y, x = (i + 0.5) * 23 / h - 0.5, (j + 0.5) * 31 / w - 0.5
            rows = {int(np.floor(y + 0.5)), int(np.ceil(y - 0.5 + 1e-9))}  # both, at exact ties
            cols = {int(np.floor(x + 0.5)), int(np.ceil(x - 0.5 + 1e-9))}
            near = {source["label"][r % 23, c % 31] for r in rows for c in cols}
            assert label[i, j] in near
            y, x = np.clip(y, 0, 22), np.clip(x, 0, 30)
            top, left = min(int(y), 21), min(int(x), 29)
            fy, fx = y - top, x - left
            corner = source["image"][top : top + 2, left : left + 2, 0].astype(float)
            value = np.array([1 - fy, fy]) @ corner @ np.array([1 - fx, fx])
            assert abs(image[i, j, 0] - value) <= 1.5  # OpenCV interpolates bytes in fixed point


def test_the_sheet_shows_box_crop_and_label():
    """Eight rows: the scaled image with its box, what is cut from it, its label in colours."""
    source = [example(90 + 2 * n, 100) for n in range(16)]
    aug, labels = Augment((48, 40), (0.8, 1.2), GREY), generic("abcdefg")
    sheet = augment.sheet(source, aug, labels, seed=3)
    red = (sheet == (255, 0, 0)).all(-1)
    assert red.sum() > 8 * 4 * 40  # eight boxes, two pixels wide
    top = 0
    for number in range(8):
        shown = source[2 * number]
        choice = aug.choose(shown["image"].shape[:2], np.random.default_rng([3, number]))
        out = aug.random_map(shown, np.random.default_rng([3, number]))
        boxed, left = red[top : top + choice.size[0], : choice.size[1]], choice.size[1] + 4
        rows, cols = (np.nonzero(boxed.any(axis))[0] for axis in (1, 0))
        ends = rows[0], cols[0], rows[-1], cols[-1]
        expected = np.array(choice.box) + (0, 0, choice.box[0] - 1, choice.box[1] - 1)
        assert np.abs(ends - expected).max() <= 1  # OpenCV's lines of two pixels
        for picture in (out["image"], labels.paint(out["label"], (255, 255, 255))):
            np.testing.assert_array_equal(sheet[top : top + 48, left : left + 40], picture)
            left += 44
        top += choice.size[0] + 4
    assert top == len(sheet)


def test_turns_and_elastic_draw_after_the_rest():
    """Scale, crop and flip do not depend on whether there is more to draw."""
    plain = Augment((24, 24), (0.5, 1.5), GREY)
    more = Augment((24, 24), (0.5, 1.5), GREY, turns=True, elastic=3.0)
    turns = set()
    for seed in range(40):
        a, b = (x.choose((40, 33), np.random.default_rng(seed)) for x in (plain, more))
        assert (a.size, a.box, a.flip) == (b.size, b.box, b.flip)
        assert (a.turns, a.displacements) == (0, None) and b.displacements.shape == (3, 3, 2)
        turns.add(b.turns)
    assert turns == {0, 1, 2, 3}


def test_turned_crops_are_the_crop_turned():
    turned, plain = (Augment((24, 24), (1.0, 1.0), GREY, turns=t) for t in (True, False))
    for seed in range(10):
        out, expected = (
            a.random_map(example(40, 33), np.random.default_rng(seed)) for a in (turned, plain)
        )
        choice = turned.choose((40, 33), np.random.default_rng(seed))
        for key in ("image", "label"):
            np.testing.assert_array_equal(out[key], np.rot90(expected[key], choice.turns))


def test_elastic_moves_image_and_labels_alike_and_smoothly():
    """Labels still fit their pixels but at borders; nothing is moved where nothing is drawn."""
    box = (3, 5, 60, 50)
    cols, rows = augment.displaced(box, np.zeros((3, 3, 2)))
    np.testing.assert_array_equal(rows[:, 0], np.arange(3, 63))
    np.testing.assert_array_equal(cols[0], np.arange(5, 55))
    draws = np.random.default_rng(0).normal(0, 4.0, (3, 3, 2))
    cols, rows = augment.displaced(box, draws)
    moved = np.hypot(rows - np.arange(3, 63)[:, None], cols - np.arange(5, 55))
    assert 1.0 < moved.max() < 16.0
    assert max(np.abs(np.diff(rows, 2, 0)).max(), np.abs(np.diff(cols, 2, 1)).max()) < 0.5

    aug = Augment((60, 60), (1.0, 1.0), GREY, elastic=4.0)
    same = []
    for seed in range(10):
        out = aug.random_map(example(80, 80), np.random.default_rng(seed))
        valid = out["label"] != VOID
        same.append((out["image"][valid][:, 0] == 10 * out["label"][valid]).mean())
        plain = Augment((60, 60), (1.0, 1.0), GREY).random_map(
            example(80, 80), np.random.default_rng(seed)
        )
        assert (out["label"] != plain["label"]).any()
    # Squares of 4 pixels: about half of the pixels are away from a border.
    assert min(same) > 0.4


def test_a_config_s_augmentation_and_only_square_crops_turn():
    config = configs.default()
    config.crop_size, config.augment.elastic = (32, 40), 2.0
    assert augment.from_config(config, GREY) == Augment((32, 40), (0.5, 1.5), GREY, elastic=2.0)
    config.augment.scale_of = "evaluation"
    assert augment.from_config(config, GREY).whole == tuple(config.eval_size)
    config.eval_overlap = 8  # of images at their own size
    assert augment.from_config(config, GREY).whole is None
    config.augment.scale_of = "eval"
    with pytest.raises(UserError, match="scale_of='eval' is unknown; choose one of: image, eval"):
        augment.from_config(config, GREY)
    config.augment.turns = True
    with pytest.raises(UserError, match="not square"):
        augment.from_config(config, GREY)
