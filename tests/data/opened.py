"""Data sets as a run opens them."""

import numpy as np
from PIL import Image

from protoseg_jax import config as configs
from protoseg_jax.data import prepare


def config_of(name, root, cache, **options):
    """A config of a data set in a folder, prepared below `cache`; further keys as given."""
    config = configs.default()
    config.data.update(name=name, dir=root and str(root), cache=str(cache))
    config.update_from_flattened_dict(options)
    return config


def load(name, root, tmp_path, **options):
    """The data set, prepared below tmp_path/cache."""
    return prepare.open_data(config_of(name, root, tmp_path / "cache", **options))


def everything(source):
    """All examples of a source."""
    return [source[n] for n in range(len(source))]


SIZES = [(20, 30), (33, 21), (40, 40)]


def make_folder(root, count=10, void=255):
    """Noise in three sizes, laid out for the data set `folder`; every other mask has a palette."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    (root / "classes.txt").write_text("sky\nsea\nland\n")
    for n in range(count):
        size = SIZES[n % 3]
        pixels = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"im{n}.png")
        values = rng.choice([0, 1, 2, void], size).astype(np.uint8)
        mask = Image.fromarray(values)
        if n % 2:
            mask = mask.convert("P")
            mask.putdata(values.ravel().tolist())
            mask.putpalette([7, 7, 7] * 256)  # colours say nothing: indices do
        mask.save(root / "masks" / f"im{n}.png")
    return root
