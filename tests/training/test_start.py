"""Where a run starts: PyTorch's weights, another run's network, prototypes on training patches."""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors.numpy

from protoseg_jax.errors import UserError
from protoseg_jax.evaluation.score import score_run
from protoseg_jax.inference import shrink_labels
from protoseg_jax.models import resnet
from protoseg_jax.models.weights import load
from protoseg_jax.program import Interrupted
from protoseg_jax.run.prototypes import classes_of
from protoseg_jax.run.workdir import Workdir
from protoseg_jax.training import run as runs
from protoseg_jax.training import start as starts
from tests.models import weights
from tests.small import PHASES, begin, experiment, same_arrays, with_unet, without


@pytest.fixture(scope="module")
def authors_file(tmp_path_factory):
    """A trained ProtoSeg as the authors' code would save it, 8 prototypes of 3 classes."""
    path = tmp_path_factory.mktemp("weights") / "protoseg.safetensors"
    classes = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    safetensors.numpy.save_file(weights.protoseg(26, 4, (1, 2), 8, classes, 3), path)
    return path


def ported_config(finished):
    config = finished.experiment.config.copy_and_resolve_references()
    config.batch_size = 8
    config.model.update({"depth": 26, "width": 4, "norm": "frozen_batch"})
    config.model.update({"stride_in": "auto", "preprocessing": "auto"})
    return config


@pytest.mark.slow
def test_a_ported_protoseg_is_a_run(finished, authors_file, tmp_path, capsys):
    """Scored as it is, then projected, fine-tuned and pruned."""
    config = ported_config(finished)
    starts.write_ported(config, str(authors_file), str(tmp_path / "work"))
    folder = Workdir(tmp_path / "work")
    assert folder.config().model.stride_in == "1x1"
    assert folder.config().model.preprocessing == "imagenet"
    scores = score_run(str(folder.path), "validation")
    assert scores["phase"] == "joint" and 0 <= scores["miou"] <= 1
    got, expected = folder.checkpoints.restore("joint"), load(authors_file, resnet)
    assert same_arrays(got.arrays["params"], expected.params)
    assert [p.class_ for p in got.prototypes] == [0, 0, 0, 1, 1, 2, 2, 2]
    runs.train(config, str(folder.path))
    assert [e["phase"] for e in folder.summary()] == PHASES[1:]
    runs.train(config, str(folder.path))
    assert "this run is finished" in capsys.readouterr().err
    frozen = folder.checkpoints.restore("finetune_pruned").arrays["frozen"]
    assert same_arrays(frozen, expected.frozen)
    with pytest.raises(UserError, match="holds a run already"):
        starts.write_ported(config, str(authors_file), str(folder.path))


def test_pretrained_weights_are_where_a_run_starts(finished, authors_file, tmp_path, capsys):
    config = ported_config(finished)
    config.pretrained.path = str(authors_file)
    workdir = Workdir(tmp_path / "work")
    starts.settle(config, workdir)
    assert config.model.stride_in == "1x1"
    start, expected = starts.initial(experiment(config)), load(authors_file, resnet)
    assert same_arrays(start.arrays["params"], expected.params)
    # A run that goes on keeps what it was started with, and needs the file no more.
    workdir.start(config)
    again = ported_config(finished)
    again.pretrained.path = "/nowhere.pth"
    starts.settle(again, workdir)
    workdir.start(again)
    workdir.release()

    assert "warning" not in capsys.readouterr().err
    config.model.stride_in = "3x3"
    starts.initial(experiment(config))
    assert "warning: model.stride_in is '3x3', but weights" in capsys.readouterr().err
    config.model.depth = 14
    with pytest.raises(UserError, match="backbone of weights .* does not fit model.depth=14"):
        starts.initial(experiment(config))
    config.model.update({"depth": 26, "head": "linear"})
    with pytest.raises(UserError, match="model.head='linear' has no prototypes"):
        starts.initial(experiment(config))
    config.pretrained.path = None
    starts.initial(experiment(config))
    assert "set --config.pretrained.path" in capsys.readouterr().err


def test_weights_that_lack_something_are_refused(finished, authors_file, tmp_path):
    """What a file does not hold would stay random."""
    config, ported = ported_config(finished), load(authors_file, resnet)
    config.model.update({"stride_in": "1x1", "preprocessing": "imagenet"})
    at = experiment(config)
    without_aspp = {n: tree for n, tree in ported.params.items() if n != "aspp"}
    for change, group in (({"frozen": {}}, "backbone"), ({"params": without_aspp}, "aspp")):
        with pytest.raises(UserError, match=f"the {group} of weights a.npz .* does not fit"):
            starts.with_weights(at, dataclasses.replace(ported, **change), "a.npz")
    more = weights.protoseg(26, 4, (1, 2), 8, np.arange(8), 8)
    with pytest.raises(UserError, match="of weights a.npz .* does not fit .* 3 classes"):
        starts.with_weights(at, resnet.port(more, "a.npz"), "a.npz")


def test_a_run_starts_from_a_black_box(finished, tmp_path, capsys):
    """Its backbone is taken; ASPP, whose channels are classes there, and the head are new."""
    config = finished.experiment.config.copy_and_resolve_references()
    config.model.head, config.seed = "linear", 1
    folder = begin(config, tmp_path / "black box").workdir
    there = starts.initial(experiment(config))
    own = finished.experiment.config.copy_and_resolve_references()
    own.pretrained.path = str(folder.path)
    with pytest.raises(UserError, match="has not finished a phase yet"):
        starts.initial(experiment(own))
    folder.checkpoints.save(dataclasses.replace(there, phase="joint", step=6))
    folder.checkpoints.wait()
    folder.release()

    at = experiment(own)
    got, random = starts.initial(at), starts.random(at, starts.classes_at_start(at))
    assert same_arrays(got.arrays["params"]["backbone"], there.arrays["params"]["backbone"])
    assert not same_arrays(got.arrays["params"]["backbone"], random.arrays["params"]["backbone"])
    for group in ("aspp", "prototypes", "head"):
        assert same_arrays(got.arrays["params"][group], random.arrays["params"][group])
    assert "after its phase joint; new: aspp/" in capsys.readouterr().err

    own.model.width = 16
    with pytest.raises(UserError, match=r"backbone/.* of run .* does not fit this config's"):
        starts.initial(experiment(own))
    own.model.width, own.data.held_out = 8, "disc"
    with pytest.raises(UserError, match="so its network may know that class"):
        starts.initial(experiment(own))
    own.data.held_out, own.pretrained.path = None, str(tmp_path)
    with pytest.raises(UserError, match="is a folder that holds no run"):
        starts.initial(experiment(own))


def test_a_run_starts_from_a_prototype_run(finished, tmp_path):
    """Backbone and ASPP after its last phase; its prototypes stay where they are."""
    config = finished.experiment.config.copy_and_resolve_references()
    config.pretrained.path, config.model.prototypes_per_class = str(finished.workdir.path), 5
    config.model.preprocessing = "auto"
    starts.settle(config)
    assert config.model.preprocessing == "imagenet"
    got = starts.initial(experiment(config))
    last = finished.workdir.checkpoints.restore("finetune_pruned")
    for group in ("backbone", "aspp"):
        assert same_arrays(got.arrays["params"][group], last.arrays["params"][group])
    assert len(got.prototypes) == 5 * finished.experiment.num_classes


def test_a_black_box_that_cannot_come_first(finished, tmp_path):
    """Told before the folder is claimed."""
    config = finished.experiment.config.copy_and_resolve_references()
    config.batch_size, config.pretrained.blackbox = 8, 2
    config.phases.joint.learning_rates = {"prototypes": 1e-3}
    for changes, words in (
        ({"pretrained.blackbox": -1}, "pretrained.blackbox=-1 must not be negative"),
        ({}, "of the black box of pretrained.blackbox: phases.joint trains nothing"),
        ({"model.head": "directions"}, "backbone|to start a ProtoSeg from"),
    ):
        one = config.copy_and_resolve_references()
        one.update_from_flattened_dict(changes)
        with pytest.raises(UserError, match=words):
            runs.train(one, str(tmp_path / "work"))
        assert not (tmp_path / "work" / "config.json").exists()


@pytest.mark.slow
def test_a_black_box_may_come_first(finished, tmp_path, monkeypatch, capsys):
    """Stopped between the two and started again, a run ends as of two commands."""
    left_out = ("warmup", "finetune", "pruning", "finetune_pruned")
    config = with_unet(without(finished.experiment.config, *left_out))
    config.batch_size = 8  # whatever the number of devices
    config.phases.joint.steps = 2

    black_box = config.copy_and_resolve_references()
    black_box.model.head = "linear"
    black_box.phases.projection.steps = 0
    runs.train(black_box, str(tmp_path / "first"))
    second = config.copy_and_resolve_references()
    second.pretrained.path = str(tmp_path / "first")
    runs.train(second, str(tmp_path / "second"))

    config.pretrained.blackbox, folder = 2, Workdir(tmp_path / "one")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(starts, "with_run", lambda *_: (_ for _ in ()).throw(Interrupted(15)))
        runs.train(config, str(folder.path))
    assert [entry["phase"] for entry in Workdir(folder.path / "blackbox").summary()] == ["joint"]
    assert folder.holds_run and not folder.summary()
    capsys.readouterr()
    runs.train(config, str(folder.path))
    told = capsys.readouterr().err
    assert "blackbox is trained" in told and "training a black box" not in told
    got, expected = (
        run.checkpoints.restore("projection") for run in (folder, Workdir(tmp_path / "second"))
    )
    assert same_arrays(got.arrays, expected.arrays)
    assert folder.summary()[-1]["miou"] == Workdir(tmp_path / "second").summary()[-1]["miou"]


def test_prototypes_may_start_on_training_patches(finished, authors_file, tmp_path):
    config = finished.experiment.config.copy_and_resolve_references()
    config.model.prototype_init = "patches"
    config.model.prototypes_per_class = 40  # some classes are in fewer images
    run = experiment(config)
    start = starts.initial(run)
    placed = starts.on_patches(run, start)
    same = {**placed.arrays["params"], "prototypes": start.arrays["params"]["prototypes"]}
    assert same_arrays(same, start.arrays["params"])
    vectors, before = (x.arrays["params"]["prototypes"]["vectors"] for x in (placed, start))

    inference, source = run.inference(start.prototypes), run.source("train")
    infer = jax.jit(lambda image: inference(start.variables, image[None]).features[0])
    points = {c: [] for c in range(run.num_classes)}
    for n in range(len(source)):
        example = source[n]
        image, label = inference.prepare(example["image"]), example["label"]
        z = np.asarray(infer(image))
        labels = shrink_labels(label[None], None, z.shape[:2])[0]
        for c in points:
            if (labels == c).any():
                points[c].append(z[labels == c])
    for c, images in points.items():
        own = classes_of(start.prototypes) == c
        count = len(images)
        np.testing.assert_array_equal(vectors[own][count:], before[own][count:])
        homes = []
        for vector in vectors[own][:count]:
            distances = [np.abs(z - vector).max(-1).min() for z in images]
            homes.append(int(np.argmin(distances)))
            assert min(distances) < 1e-5
        assert sorted(homes) == list(range(count))  # one of each image

    config.model.prototype_init = "elsewhere"
    with pytest.raises(UserError, match="prototype_init='elsewhere' is unknown"):
        runs.check(experiment(config), new=True)
    ported = ported_config(finished)
    ported.pretrained.path, ported.model.prototype_init = str(authors_file), "patches"
    with pytest.raises(UserError, match="are a ProtoSeg, whose prototypes would be lost"):
        starts.initial(experiment(ported))
