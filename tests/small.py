"""A small run: ten hand-made images in three sizes, a narrow network, three steps a phase."""

import pathlib

import jax
import ml_collections
import numpy as np
from PIL import Image

from protoseg_jax import config as configs
from protoseg_jax.devices import DevicePool
from protoseg_jax.run.experiment import Experiment
from protoseg_jax.run.live import Live
from protoseg_jax.run.workdir import Workdir

PHASES = ["warmup", "joint", "projection", "finetune", "pruning", "finetune_pruned"]

SIZES = [(40, 56), (64, 48), (50, 50)]


def make_data(root: pathlib.Path) -> None:
    """Bright discs, dark bars, grey ground; no split lists; some void."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    (root / "classes.txt").write_text("ground\ndisc\nbar\n")
    for n in range(10):
        h, w = SIZES[n % 3]
        y, x = np.mgrid[:h, :w]
        mask = np.zeros((h, w), np.uint8)
        mask[(y - h / 3) ** 2 + (x - w / 3) ** 2 < 120] = 1
        mask[h // 2 + 6 : h // 2 + 16] = 2
        mask[:2] = 255
        colours = np.array([[120, 120, 120], [230, 220, 40], [20, 30, 60]])
        image = colours[np.where(mask == 255, 0, mask)] + rng.normal(0, 12, (h, w, 3))
        Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(
            root / "images" / f"im{n}.png"
        )
        Image.fromarray(mask).save(root / "masks" / f"im{n}.png")


def make_config(root: pathlib.Path) -> ml_collections.ConfigDict:
    """Every phase, on the images of `make_data(root / "own")`."""
    c = configs.default()
    c.batch_size = 2
    c.crop_size, c.eval_size, c.eval_batch_size = (33, 33), (49, 57), 3
    c.data.update({"name": "folder", "dir": str(root / "own"), "cache": str(root / "cache")})
    c.model.update({"depth": 14, "width": 8, "norm": "group", "aspp_rates": (1, 2)})
    c.model.update({"features": 8, "prototypes_per_class": 3})
    c.model.update({"stride_in": "3x3", "preprocessing": "imagenet"})
    training, new = {"steps": 3, "schedule": "constant"}, {"aspp": 1e-3, "prototypes": 1e-3}
    c.phases.warmup.update({**training, "learning_rates": new})
    c.phases.joint.update({**training, "learning_rates": {**new, "backbone": 1e-3}})
    c.phases.finetune.update({**training, "learning_rates": {"head": 1e-3}})
    c.phases.finetune_pruned.update({**training, "learning_rates": {"head": 1e-3}})
    c.log_every, c.eval_every, c.checkpoint_every = 1, 2, 2
    return c


def without(config: ml_collections.ConfigDict, *phases: str) -> ml_collections.ConfigDict:
    """A copy of a config that leaves these phases out."""
    config = config.copy_and_resolve_references()
    for phase in phases:
        config.phases[phase].steps = 0
    return config


def with_unet(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A copy of a config with a network of eight layers, which compiles in half of the time."""
    config = config.copy_and_resolve_references()
    config.model.update({"backbone": "unet", "depth": 1, "output_stride": 2})
    for phase in ("warmup", "joint"):
        rates = config.phases[phase].learning_rates
        rates.decoder = rates.aspp
        del rates.aspp
    return config


def one_device() -> DevicePool:
    return DevicePool(jax.local_devices()[:1])


def experiment(config: ml_collections.ConfigDict) -> Experiment:
    """On one device, whatever their number."""
    return Experiment(config, one_device())


def begin(config: ml_collections.ConfigDict, path: pathlib.Path) -> Live:
    """A run in a new folder, on one device."""
    live = Live(experiment(config), Workdir(path))
    live.workdir.start(config)
    return live


def same_arrays(a, b) -> bool:
    """Whether two trees of arrays are equal, bit for bit."""
    equal = jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b)
    return all(jax.tree.leaves(equal))
