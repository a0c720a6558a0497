"""Every config: a network, phases, nothing that is a default; the paper's rows differ as they
should; a stored config keeps its behaviour."""

import runpy
from pathlib import Path

import ml_collections
import pytest
from absl import flags
from ml_collections import config_flags

from protoseg_jax import config as configs
from protoseg_jax import inference as inferences
from protoseg_jax.data.sets import cityscapes, voc
from protoseg_jax.models.prototypes import equal_blocks
from protoseg_jax.run import phases
from protoseg_jax.training.start import settle

FILES = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.py"))
NAMES = [
    f"{path.stem}:{row}" if row else path.stem
    for path in FILES
    if path.stem != "common"
    for row in runpy.run_path(str(path)).get("ROWS", ("",))
]
ROWS = ("imagenet", "coco", "no_diversity", "deeplab")
KEYS = """seed batch_size accumulate compute_dtype data.name data.dir data.cache crop_size eval_size
model.backbone model.depth model.head model.features model.prototypes_per_class pretrained.path
loss.diversity loss.l1 loss.diversity_reduction log_every eval_every checkpoint_every""".split()


def flat(config, prefix=""):
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.parametrize("name", NAMES)
def test_keys_network_and_phases(name):
    config = configs.load(name)
    for key in KEYS:
        section, _, last = key.rpartition(".")
        assert last in (config[section] if section else config), key
    if config.model.preprocessing == "data":  # which would be measured, of data that is not here
        config.model.mean, config.model.std = (1.0,), (2.0,)
    settle(config)
    of_head = phases.ORDER[1:] if config.model.head == "prototypes" else ("warmup", "joint")
    wanted = [p for p in of_head if config.phases[p].steps]
    assert [p.name for p in phases.from_config(config)] == wanted
    trained = sum(p.steps for p in phases.from_config(config) if p.kind == "train")
    trained += config.pretrained.blackbox
    config.model.head = "linear"  # every config has a twin, of the same budget
    twin = phases.from_config(config)
    assert sum(p.steps for p in twin) == trained and all(p.learning_rates for p in twin)
    assert set(config.phases) == set(phases.ORDER)
    inferences.from_config(config, 3, equal_blocks(30, 3))


@pytest.mark.parametrize("name", NAMES)
def test_a_config_has_the_defaults_keys_and_no_other(name):
    """A misspelt key in a config file would be a new one, and nobody would read it."""
    known = {key for key, _ in flat(configs.default())}
    groups = {f"phases.{p}.{k}" for p in phases.ORDER for k in ("schedule", "steps")}
    own = {key for key, _ in flat(configs.load(name)) if ".learning_rates." not in key}
    assert own <= known | groups


def test_a_stored_config_keeps_its_behaviour():
    """Of a run from before a key: what it said stays, what it lacks is as it was."""
    stored = {
        "batch_size": 3,
        "model": {"backbone": "unet", "preprocessing": "imagenet"},
        "loss": {"terms": ("cross_entropy", "diversity", "l1"), "diversity": 0.25},
        "phases": {"joint": {"steps": 7, "learning_rates": {"decoder": 1.0}, "schedule": "poly"}},
    }
    config = configs.complete(stored)
    assert config.batch_size == 3 and config.model.backbone == "unet"
    assert (config.model.stride_in, config.model.activation) == ("3x3", "sigmoid")
    assert [(p.name, p.steps) for p in phases.from_config(config)] == [("joint", 7)]
    assert dict(phases.from_config(config)[0].learning_rates) == {"decoder": 1.0}
    assert config.loss.terms == configs.default().loss.terms  # a term of weight 0 changes nothing
    assert config.phases.directions == configs.default().phases.directions
    lite = {"model": {"backbone": "efficientnet", "features": 32}, "augment": {"turns": False}}
    assert configs.complete(lite).model.width == 32  # its decoder had as many channels as z
    lite["augment"]["views"] = 0
    assert configs.complete(lite).model.width == 64
    whole = configs.load("camvid")
    assert configs.complete(whole.to_dict()).to_dict() == whole.to_dict()


def test_a_ready_config_is_read_as_a_file_is():
    """By its name, by its path, and as ml_collections' flag reads it."""
    by_name = configs.load("pascal:coco")
    by_path = configs.load(f"{FILES[0].parent}/pascal.py:coco")
    flag = config_flags.DEFINE_config_file("tried_config")
    flags.FLAGS(["test", f"--tried_config={configs.find('pascal:coco')}"])
    assert by_name.to_dict() == by_path.to_dict() == flag.value.to_dict()


@pytest.mark.parametrize(
    ("name", "labels", "training", "evaluation"),
    [
        ("pascal", voc.LABELS, [(41, 41), (21, 21), (31, 31), (41, 41)], (65, 65)),
        ("cityscapes", cityscapes.LABELS, [(65, 65)], (129, 257)),
    ],
)
def test_the_paper_s_sizes(name, labels, training, evaluation):
    config = configs.load(name)
    settle(config)
    assert (config.model.stride_in, config.model.preprocessing) == ("3x3", "imagenet")
    assert config.model.depth == 101
    config.model.depth = 14  # of the same stages' strides
    classes = equal_blocks(10 * len(labels), len(labels))
    inference = inferences.from_config(config, len(labels), classes)
    assert inference.feature_sizes(config.crop_size) == training
    assert inference.feature_size == evaluation


@pytest.mark.parametrize("name", ["pascal", "cityscapes"])
def test_the_paper_s_rows(name):
    rows = {row: configs.load(f"{name}:{row}") for row in ROWS}
    steps = [p.steps for p in phases.from_config(rows["imagenet"])]
    assert steps == [30000, 30000, 1, 2000, 1, 2000]
    assert rows["no_diversity"].loss.diversity == 0.0 and rows["coco"].loss.diversity == 0.25
    twin = phases.from_config(rows["deeplab"])
    assert [(p.name, p.steps) for p in twin] == [("warmup", 30000), ("joint", 34000)]
    with pytest.raises(ValueError, match="there is no row 'nothing', but imagenet, coco"):
        configs.load(f"{name}:nothing")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_an_experiment_is_what_it_changes(path):
    """At most 30 statements' lines for a row, and nothing imported that only a checkout has."""
    text = path.read_text()
    imports = [x for x in text.splitlines() if x.startswith(("import ", "from "))]
    assert all(x.startswith("from protoseg_jax") for x in imports)
    code = text.partition("def get_config")[2].split("\ndef ")
    assert all(sum(bool(x.strip()) for x in part.splitlines()) <= 31 for part in code)
