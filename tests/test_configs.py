"""Every config: the contract's keys, a network, phases; the paper's rows differ as they should."""

import importlib
from pathlib import Path

import pytest

from configs import cityscapes, pascal
from protoseg_jax import inference as inferences
from protoseg_jax.data import label_sets
from protoseg_jax.training import phases
from protoseg_jax.training.start import settle

NAMES = sorted(p.stem for p in (Path(__file__).resolve().parents[1] / "configs").glob("*.py"))
KEYS = """seed batch_size accumulate compute_dtype data.name data.dir data.cache crop_size eval_size
model.backbone model.depth model.head model.features model.prototypes_per_class pretrained.path
loss.diversity loss.l1 loss.diversity_reduction log_every eval_every checkpoint_every""".split()


@pytest.mark.parametrize("name", NAMES)
def test_keys_network_and_phases(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    for key in KEYS:
        section, _, last = key.rpartition(".")
        assert last in (config[section] if section else config), key
    if config.model.preprocessing == "data":  # which would be measured, of data that is not here
        config.model.mean, config.model.std = (1.0,), (2.0,)
    settle(config)
    wanted = [p for p in phases.ORDER if config.phases[p].steps]
    assert [p.name for p in phases.from_config(config)] == wanted
    assert set(config.phases) == set(phases.ORDER)
    inferences.from_config(config, 3, 30)


@pytest.mark.parametrize(
    ("module", "classes", "training", "evaluation"),
    [
        (pascal, label_sets.VOC, [(41, 41), (21, 21), (31, 31), (41, 41)], (65, 65)),
        (cityscapes, label_sets.CITYSCAPES, [(65, 65)], (129, 257)),
    ],
)
def test_the_paper_s_sizes(module, classes, training, evaluation):
    config = module.get_config()
    settle(config)
    assert (config.model.stride_in, config.model.preprocessing) == ("3x3", "imagenet")
    inference = inferences.from_config(config, len(classes), 10 * len(classes))
    assert inference.feature_sizes(config.crop_size) == training
    assert inference.feature_sizes(config.eval_size)[-1] == evaluation


@pytest.mark.parametrize("module", [pascal, cityscapes])
def test_the_paper_s_rows(module):
    rows = {row: module.get_config(row) for row in pascal.ROWS}
    assert [p.steps for p in phases.from_config(rows["imagenet"])] == [
        30000,
        30000,
        1,
        2000,
        1,
        2000,
    ]
    assert rows["no_diversity"].loss.diversity == 0.0 and rows["coco"].loss.diversity == 0.25
    twin = phases.from_config(rows["deeplab"])
    assert [(p.name, p.steps) for p in twin] == [("warmup", 30000), ("joint", 34000)]
