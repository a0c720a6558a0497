"""Pictures: what is encoded decodes, what is none is refused, crops know where the patch lies."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from protoseg_jax import decoding, images
from protoseg_jax.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 17, 3)).astype(np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".bmp"])
def test_lossless_formats_give_back_the_pixels(suffix):
    np.testing.assert_array_equal(decoding.decode(images.encode(PIXELS, suffix)), PIXELS)
    grey = PIXELS[..., 0]
    np.testing.assert_array_equal(decoding.decode(images.encode(grey, suffix), grey=True), grey)
    with Image.open(io.BytesIO(images.encode(PIXELS, suffix))) as opened:
        np.testing.assert_array_equal(np.array(opened), PIXELS)  # RGB, not BGR


def test_jpeg_is_of_the_asked_quality():
    smooth = np.repeat(np.mgrid[:64, :64].sum(0)[..., None], 3, 2).astype(np.uint8)
    low, high = (images.encode(smooth, ".jpg", quality) for quality in (20, 95))
    assert len(low) < len(high)
    assert np.abs(decoding.decode(high).astype(int) - smooth).max() <= 4


def test_orientation_is_followed_where_an_image_is_shown_and_no_image_is_a_value_error(tmp_path):
    turned = Image.fromarray(PIXELS)
    exif = turned.getexif()
    exif[0x0112] = 6  # shown turned by a quarter
    for suffix in ("png", "webp", "tiff"):
        path = tmp_path / f"turned.{suffix}"
        turned.save(path, exif=exif, lossless=True)
        np.testing.assert_array_equal(decoding.decode(path.read_bytes()), PIXELS)
        with path.open("rb") as file:
            for read in (decoding.read(path), decoding.read(Image.open(file))):
                np.testing.assert_array_equal(read, np.rot90(PIXELS, -1))
    for data in (b"", b"no image"):
        with pytest.raises(ValueError, match="not an image"):
            decoding.decode(data)


def test_what_can_be_read_as_an_image(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    for image in (PIXELS, Image.fromarray(PIXELS), tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_array_equal(decoding.read(image), PIXELS)
    grey = PIXELS[..., 0]
    for image in (grey, grey[..., None], Image.fromarray(grey)):
        np.testing.assert_array_equal(decoding.read(image), np.stack([grey] * 3, -1))
    (tmp_path / "{text}.png").write_text("no image")
    Image.fromarray(np.zeros((4, 4, 4), np.uint8)).save(tmp_path / "alpha.png")
    for bad, words in (
        (tmp_path / "{text}.png", r"{text}.png does not decode \(of no known format\)"),
        (tmp_path / "none.png", "does not exist"),
        (tmp_path / "alpha.png", "has transparent pixels"),
        (PIXELS.astype(np.float32), "is float32"),
        (np.zeros((3, 4, 5), np.uint8), r"is uint8 \[3, 4, 5\]"),
    ):
        with pytest.raises(UserError, match=words):
            decoding.read(bad)


def test_masks_hold_indices_and_must_be_masks():
    values = PIXELS[..., 0] % 5
    for colours in ((), [(c, 9, 9) for c in (7, 7, 1, 2, 3)]):
        png = images.palette_png(values, colours)
        np.testing.assert_array_equal(decoding.decode_mask(png, "m").values, values)
    np.testing.assert_array_equal(decoding.decode_mask(images.encode(PIXELS), "m").values, PIXELS)
    with pytest.raises(UserError, match="mask {m} does not decode; replace the file"):
        decoding.decode_mask(b"no image", "{m}")


def test_sizes():
    assert images.resize_image(PIXELS, (12, 17)) is PIXELS
    assert images.resize_image(PIXELS, (5, 9)).shape == (5, 9, 3)
    twice = images.resize_labels(PIXELS[..., 0], (24, 34))
    np.testing.assert_array_equal(twice, PIXELS[..., 0].repeat(2, 0).repeat(2, 1))
    assert images.shrink(PIXELS, 17) is PIXELS and images.shrink(PIXELS, 8).shape == (6, 8, 3)
    np.testing.assert_array_equal(
        images.shrink(np.kron(PIXELS[:2, :3], np.ones((4, 4, 1), np.uint8)), 3), PIXELS[:2, :3]
    )
    padded = images.pad_and_crop(PIXELS, (9, 2, 5, 20), (1, 2, 3))
    np.testing.assert_array_equal(padded[:3, :15], PIXELS[9:, 2:])
    assert (padded[3:] == (1, 2, 3)).all() and (padded[:, 15:] == (1, 2, 3)).all()


@pytest.mark.parametrize("box", [[0, 0, 3, 4], [40, 50, 44, 53], [57, 70, 60, 80]])
def test_a_crop_has_surroundings_and_knows_its_patch(box):
    image = np.random.default_rng(1).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    crop, inner = images.crop_with_context(image, box)
    top, left, bottom, right = box
    y, x, down, across = inner
    np.testing.assert_array_equal(crop[y:down, x:across], image[top:bottom, left:right])
    assert inner == images.inner_box(box, (60, 80))
    for least, sides in (
        (2 * (bottom - top), (y, len(crop) - down)),
        (2 * (right - left), (x, crop.shape[1] - across)),
    ):
        assert max(sides) == max(least, 5)  # two patches, or a twelfth of the shorter side


def test_file_names():
    assert images.file_name("a b/c.é-1") == "a_b_c_é_1"


SIDES = st.tuples(st.integers(1, 90), st.integers(1, 90))


@given(SIDES, SIDES, st.booleans(), st.data())
def test_a_box_of_what_is_resized_is_what_is_cut_out_of_the_whole(size, target, halved, data):
    """To the bit; where the box reaches beyond, what lies within."""
    if halved:  # which OpenCV does in its own way
        size = 2 * target[0], 2 * target[1]
    top, left = (data.draw(st.integers(0, n - 1)) for n in target)
    height, width = data.draw(SIDES)
    pixels = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 256, (*size, 3))
    pixels = pixels.astype(np.uint8)
    for resize in (images.resize_image, images.resize_labels):
        for array in (pixels, pixels[..., 0].copy()):
            whole = resize(array, target)[top : top + height, left : left + width]
            np.testing.assert_array_equal(resize(array, target, (top, left, height, width)), whole)


def test_boxes_of_cityscapes_size_over_the_whole_range_of_scales():
    """Where a place is far from the corner, its weights have fewer digits."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (1024, 2048, 3)).astype(np.uint8)
    for scale in (0.5, 0.5004, 0.777, 1.0, 1.2345, 1.5):
        size = int(1024 * scale), int(2048 * scale)
        for resize, array in (
            (images.resize_image, pixels),
            (images.resize_labels, pixels[..., 0]),
        ):
            whole = resize(array, size)
            for _ in range(4):
                top, left = (int(rng.integers(0, max(n - 513, 0) + 1)) for n in size)
                cut = whole[top : top + 513, left : left + 513]
                got = resize(array, size, (top, left, 513, 513))
                np.testing.assert_array_equal(got, cut)


def test_encoded_labels_are_grey_png_and_keep_their_values():
    labels = PIXELS[..., 0]
    data = images.encode_labels(labels)
    np.testing.assert_array_equal(decoding.decode(data, grey=True), labels)
    with Image.open(io.BytesIO(data)) as opened:
        assert (opened.format, opened.mode) == ("PNG", "L")
        np.testing.assert_array_equal(np.array(opened), labels)
