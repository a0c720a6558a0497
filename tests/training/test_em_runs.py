"""Whole runs of U-Net on a made-up EM volume, in tiles: split, statistics, places, predictions."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from protoseg_jax import config as configs
from protoseg_jax import inference as inferences
from protoseg_jax.data.prepare import open_data
from protoseg_jax.errors import UserError
from protoseg_jax.evaluation.score import score_run
from protoseg_jax.models.prototypes import similarity
from protoseg_jax.run import phases
from protoseg_jax.run.checkpoints import Checkpoint
from protoseg_jax.run.experiment import Experiment
from protoseg_jax.run.finished import Finished
from protoseg_jax.run.workdir import Workdir
from protoseg_jax.training import run as runs
from protoseg_jax.training import start as starts
from tests.data.sections import make_stacks

pytestmark = pytest.mark.slow

SIZE = 64  # of a section; tiles are smaller


def make_config(root, **changes):
    config = configs.load("isbi_em:cpu")
    config.data.dir, config.data.cache = str(root / "em"), str(root / "cache")
    config.crop_size, config.eval_size, config.eval_overlap = (48, 48), (48, 40), 16
    config.model.update({"depth": 2, "width": 8, "features": 8, "prototypes_per_class": 3})
    config.batch_size = config.eval_batch_size = 8
    phases.smoke(config)
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("em")
    make_stacks(root / "em", count=6, size=SIZE, test=2)
    runs.train(make_config(root), str(root / "work"))
    return root


def test_split_and_statistics_are_in_the_run_s_folder(root):
    split = json.loads((root / "work" / "split.json").read_text())
    assert len(split["train"]) == 4 and len(split["validation"]) == 2
    config = Workdir(root / "work").config()
    source = open_data(config).source("train")
    images = np.stack([source[n]["image"] for n in range(4)]).astype(float)
    np.testing.assert_allclose(config.model.mean, images.mean((0, 1, 2)))
    np.testing.assert_allclose(config.model.std, images.std((0, 1, 2)))


def test_the_same_command_goes_on(root, capsys):
    """Mean and deviation are those of the run, not settled anew against its config."""
    runs.train(make_config(root), str(root / "work"))
    assert "this run is finished" in capsys.readouterr().err


def test_a_prototype_is_a_place_in_a_tile(root):
    """It fires fully there, and the box is that place in the whole section's pixels."""
    run = Finished.load(root / "work")
    checkpoint, inference = run.checkpoint, run.inference
    infer = jax.jit(lambda image: inference(checkpoint.variables, image[None]))
    record = json.loads((root / "work" / "prototypes.json").read_text())["prototypes"]
    tiled, sections = run.experiment.examples("train"), run.experiment.data.source("train")
    by_id = {sections[n]["image_id"]: sections[n] for n in range(len(sections))}
    assert len(tiled) == 4 * 2 * 2
    for j, (prototype, entry) in enumerate(zip(checkpoint.prototypes, record, strict=True)):
        distances = infer(tiled[prototype.image]["image"]).distances
        fired = float(similarity(distances)[0, prototype.row, prototype.col, j])
        assert fired == pytest.approx(np.log(1e4), abs=1e-3)
        top, left, bottom, right = entry["box"]
        assert (bottom - top, right - left) == (1, 1)  # U-Net: a point is a pixel
        corner = tiled.places[prototype.image].corner
        assert (top - corner[0], left - corner[1]) == (prototype.row, prototype.col)
        assert by_id[entry["image_id"]]["label"][top, left] == prototype.class_


@pytest.mark.parametrize("flips", [False, True])
def test_predictions_are_stitched_from_tiles(root, flips):
    """Pixel by pixel the tile that owns it, and its mirror images, says the same."""
    out = root / f"predicted-{flips}"
    result = score_run(str(root / "work"), "validation", None, str(out), flips=flips)
    assert result["flips"] is flips
    name = "validation-finetune_pruned-flips.json" if flips else "validation-finetune_pruned.json"
    assert (root / "work" / "eval" / name).is_file()

    run = Finished.load(root / "work")
    checkpoint, inference = run.checkpoint, run.inference
    tiled = run.experiment.examples("validation")
    sections = run.experiment.data.source("validation")
    infer = jax.jit(lambda image: inference(checkpoint.variables, image[None]).logits[0])
    expected = np.full((2, SIZE, SIZE), 255, np.uint8)
    hits = 0
    for number, place in enumerate(tiled.places):
        image = tiled[number]["image"]
        copies = [()] + ([(0,), (1,), (0, 1)] if flips else [])
        share = np.mean(
            [np.flip(jax.nn.softmax(infer(np.flip(image, c).copy())), c) for c in copies], 0
        )
        (top, left), (y0, x0, y1, x1) = place.corner, place.own
        labels = share.argmax(-1)[y0 - top : y1 - top, x0 - left : x1 - left]
        expected[place.image, y0:y1, x0:x1] = labels
    for number in range(2):
        section = sections[number]
        predicted = np.array(Image.open(out / f"{section['image_id']}.png"))
        np.testing.assert_array_equal(predicted, expected[number])
        hits += (predicted == section["label"]).sum()
    assert result["pixel_accuracy"] == pytest.approx(hits / (2 * SIZE * SIZE))


def test_sections_without_labels_are_predicted(root):
    out = root / "predicted-test"
    assert score_run(str(root / "work"), "test", None, str(out)) is None
    assert {p.name for p in out.iterdir()} == {"test00.png", "test01.png"}
    assert np.array(Image.open(out / "test00.png")).shape == (SIZE, SIZE)


@pytest.fixture(scope="module")
def twin(root):
    config = make_config(root)
    config.model.head = "linear"
    runs.train(config, str(root / "twin"))
    return Workdir(root / "twin")


def test_the_twin(twin):
    (entry,) = twin.summary()
    assert (entry["phase"], entry["steps"]) == ("joint", 9) and entry["num_prototypes"] is None
    assert 0 <= entry["f_error"] <= 1


def test_a_trained_twin_becomes_a_protoseg(root, twin, capsys):
    """All of it but the layer that gives the classes; on the same split alone."""
    config = make_config(root)
    config.pretrained.path, config.model.prototype_init = str(twin.path), "patches"
    capsys.readouterr()
    runs.train(config, str(root / "after"))
    said = capsys.readouterr().err
    assert "phase joint; new: decoder/out/bias, decoder/out/kernel, prototypes, head" in said
    phases_done = [entry["phase"] for entry in Workdir(root / "after").summary()]
    assert phases_done[-1] == "finetune_pruned"

    start = starts.initial(Experiment(config))
    there = twin.checkpoints.restore("joint").arrays["params"]
    taken = {**start.arrays["params"]["decoder"], "out": None}
    assert jax.tree.all(jax.tree.map(np.array_equal, taken, {**there["decoder"], "out": None}))

    config.seed = next(s for s in range(1, 9) if drawn(root, s) != drawn(root, 0))
    with pytest.raises(UserError, match=r"images that run .*twin was trained on validate here"):
        runs.train(config, str(root / "leak"))
    assert not (root / "leak").exists()


def drawn(root, seed):
    config = make_config(root)
    config.seed = seed
    return open_data(config).drawn


def test_tiles_larger_than_the_sections(root):
    config = make_config(root, eval_size=(80, 40))
    with pytest.raises(UserError, match="is 64×64, and tiles of 80×40"):
        runs.train(config, str(root / "large"))
    assert not (root / "large").exists()


def test_weights_of_a_resnet_are_refused(root, tmp_path):
    import safetensors.numpy

    from tests.models import weights

    path = tmp_path / "resnet.safetensors"
    tensors = weights.backbone("torchvision", 50, 8, np.random.default_rng(0))
    safetensors.numpy.save_file(tensors, path)
    config = make_config(root)
    config.pretrained.path = str(path)
    with pytest.raises(UserError, match="model.backbone is 'unet'"):
        runs.train(config, str(root / "ported"))


def test_a_run_of_a_resnet_is_refused(root, tmp_path):
    other = Workdir(tmp_path / "resnet")
    other.start(configs.load("pascal"))
    other.checkpoints.save(
        Checkpoint("joint", 1, True, {"params": {"backbone": {"k": np.ones(2)}}}, [])
    )
    other.checkpoints.wait()
    other.release()
    config = make_config(root)
    starts.settle(config)
    config.pretrained.path = str(other.path)
    with pytest.raises(UserError, match="of run .* does not fit this config's network"):
        starts.initial(Experiment(config))


def test_groups_of_another_network_are_refused(root):
    config = make_config(root)
    config.phases.joint.learning_rates = {"aspp": 1e-3}
    with pytest.raises(UserError, match="its groups are backbone, decoder, prototypes, head"):
        phases.from_config(config)


def test_mirror_images_of_streets_keep_their_sky():
    """Without turns in the augmentation only left and right are exchanged."""
    config = configs.load("isbi_em")
    config.model.preprocessing = "imagenet"
    plain = inferences.from_config(config, 2, (0, 0, 1, 1))
    assert plain.with_flips(config.augment.turns).flips == ((2,), (1,), (1, 2))
    config.augment.turns = False
    assert plain.with_flips(config.augment.turns).flips == ((2,),)
