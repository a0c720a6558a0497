"""Tiles: they cover an image, overlap as asked, and each pixel belongs to the one nearest to it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protoseg_jax.data.labels import VOID
from protoseg_jax.data.tiles import Tiled, cuts, moved, own_parts, starts
from protoseg_jax.errors import UserError


@given(data=st.data(), tile=st.integers(1, 40), extra=st.integers(0, 100))
def test_tiles_along_a_line(data, tile, extra):
    overlap, length = data.draw(st.integers(0, tile - 1)), tile + extra
    at = starts(length, tile, overlap)
    assert at[0] == 0 and at[-1] == length - tile
    assert all(a + tile - b >= overlap for a, b in zip(at, at[1:], strict=False))
    fewer = len(at) - 1  # could not cover it
    assert fewer == 0 or tile + (fewer - 1) * (tile - overlap) < length
    middles = [a + tile / 2 for a in at]
    for pixel in range(length):
        (own,) = (n for n, (a, b) in enumerate(own_parts(at, tile, length)) if a <= pixel < b)
        assert at[own] <= pixel < at[own] + tile
        distances = [abs(pixel + 0.5 - m) for m in middles]
        assert distances[own] <= min(distances) + 1  # rounding of a border


class Images:
    """Sections whose labels number their pixels, modulo 251."""

    sizes = ((30, 40), (20, 20), (47, 23))

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        h, w = self.sizes[index]
        label = (np.arange(h * w).reshape(h, w) % 251).astype(np.uint8)
        return {
            "image_id": f"s{index}",
            "image": np.repeat(label[..., None], 3, 2),
            "label": label,
            "parts": label // 2 + 1,
        }


def test_every_pixel_is_labelled_once_and_by_its_own_label():
    source = Images()
    tiled = Tiled(source, (20, 20), 6)
    seen = [np.full(size, VOID, np.uint8) for size in source.sizes]
    for number, place in enumerate(tiled.places):
        tile = tiled[number]
        assert tile["image"].shape == (20, 20, 3) and tile["label"].shape == (20, 20)
        assert tile["image_id"] == f"s{place.image}"
        valid = tile["label"] != VOID
        np.testing.assert_array_equal(tile["image"][valid][:, 0], tile["label"][valid])
        # A part is where its tile's labels are.
        np.testing.assert_array_equal(tile["parts"], np.where(valid, tile["label"] // 2 + 1, 0))
        top, left = place.corner
        whole = seen[place.image][top : top + 20, left : left + 20]
        assert (whole[valid] == VOID).all()
        whole[valid] = tile["label"][valid]
    for number, labels in enumerate(seen):
        np.testing.assert_array_equal(labels, source[number]["label"])
    assert [p.image for p in tiled.places].count(1) == 1  # as large as a tile: one


def test_labels_of_tiles_are_stitched_to_those_of_their_images():
    source = Images()
    tiled = Tiled(source, (20, 20), 6)
    # Only a tile's own part may count, so what else it says is made wrong.
    found = ((n, tiled[n]["label"]) for n in range(len(tiled)))
    whole = dict(tiled.stitch(found))
    assert list(whole) == [0, 1, 2]
    for number, labels in whole.items():
        np.testing.assert_array_equal(labels, source[number]["label"])


def test_cuts_of_an_image_are_its_tiles_or_all_of_it():
    image = Images()[0]["image"]
    ((corner, own, pixels),) = cuts(image, (20, 20), None)
    assert (corner, own) == ((0, 0), (0, 0, 30, 40)) and pixels is image
    tiled = Tiled([Images()[0]], (20, 20), 6)
    for place, (corner, own, pixels) in zip(tiled.places, cuts(image, (20, 20), 6), strict=True):
        assert (corner, own) == (place.corner, place.own)
        np.testing.assert_array_equal(pixels, image[corner[0] :, corner[1] :][:20, :20])
        box = [3, 4, 9, 8]
        top, left, bottom, right = moved(box, corner)
        np.testing.assert_array_equal(pixels[3:9, 4:8], image[top:bottom, left:right])
    with pytest.raises(UserError, match="is 30×40, and tiles of 50×20"):
        next(cuts(image, (50, 20), 4))


def test_what_cannot_be_tiled():
    with pytest.raises(UserError, match="'s1' is 20×20, and tiles of 24×20"):
        Tiled(Images(), (24, 20), 4)
    for overlap in (-1, 20):
        with pytest.raises(UserError, match=f"eval_overlap={overlap}"):
            Tiled(Images(), (20, 20), overlap)
    with pytest.raises(IndexError):
        Tiled(Images(), (20, 20), 4)[99]
