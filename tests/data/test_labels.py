"""The legend of a label set."""

import numpy as np
import pytest

from protoseg_jax.data import labels


@pytest.mark.parametrize("width", [40, 300, 2000])
def test_a_legend_shows_every_colour_in_as_many_lines_as_it_needs(width):
    long = "a long name that is wider than the narrow legend"
    named = labels.generic(["ground", "disc", long, *map(str, range(10))])
    picture = named.legend(width)
    assert picture.dtype == np.uint8 and picture.shape[1] >= width
    shown = {tuple(c) for c in picture.reshape(-1, 3).tolist()}
    assert set(named.colours) <= shown
    narrow, wide = (named.legend(w).shape[0] for w in (40, 2000))
    assert wide <= picture.shape[0] <= narrow
    assert picture[:, -2:].min() == 255  # no name is cut off
