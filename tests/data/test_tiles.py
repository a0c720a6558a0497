"""Tiles: they cover an image, overlap as asked, and each pixel belongs to the one nearest to it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protoseg_jax.data.label_sets import VOID
from protoseg_jax.data.tiles import Tiled, own_parts, starts
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
        top, left = place.corner
        whole = seen[place.image][top : top + 20, left : left + 20]
        assert (whole[valid] == VOID).all()
        whole[valid] = tile["label"][valid]
    for number, labels in enumerate(seen):
        np.testing.assert_array_equal(labels, source[number]["label"])
    assert [p.image for p in tiled.places].count(1) == 1  # as large as a tile: one


def test_what_cannot_be_tiled():
    with pytest.raises(UserError, match="'s1' is 20×20, and tiles of 24×20"):
        Tiled(Images(), (24, 20), 4)
    for overlap in (-1, 20):
        with pytest.raises(UserError, match=f"eval_overlap={overlap}"):
            Tiled(Images(), (20, 20), overlap)
    with pytest.raises(IndexError):
        Tiled(Images(), (20, 20), 4)[99]
