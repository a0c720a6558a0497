"""A whole run on ten hand-made images in three sizes: every phase, what it leaves, going on."""

import dataclasses
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import ml_collections
import numpy as np
import pytest
import safetensors.numpy
import weights
from discs import make_data
from PIL import Image

from protoseg_jax.devices import DevicePool
from protoseg_jax.errors import UserError, full_disk
from protoseg_jax.inference import shrink_labels
from protoseg_jax.interrupts import Interrupted
from protoseg_jax.models import port_torch
from protoseg_jax.models.prototypes import similarity
from protoseg_jax.training import run as runs
from protoseg_jax.training import scoring
from protoseg_jax.training import start as starts
from protoseg_jax.training.run import Run
from protoseg_jax.workdir import Workdir

ROOT = Path(__file__).resolve().parents[2]
PHASES = ["warmup", "joint", "projection", "finetune", "pruning", "finetune_pruned"]


def make_config(root):
    training = {"steps": 3, "schedule": "constant"}
    new = {"aspp": 1e-3, "prototypes": 1e-3}
    head = {**training, "learning_rates": {"head": 1e-3}}
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "batch_size": 2,
            "accumulate": 1,
            "compute_dtype": "float32",
            "crop_size": (33, 33),
            "eval_size": (49, 57),
            "eval_batch_size": 3,
            "data": {
                "name": "folder",
                "dir": str(root / "own"),
                "cache": str(root / "cache"),
                "workers": 0,
                "train_split": "train",
                "projection_split": "train",
                "void": 255,
            },
            "augment": {"scale": (0.5, 1.5)},
            "model": {
                "backbone": "resnet",
                "depth": 14,
                "width": 8,
                "norm": "group",
                "stride_in": "3x3",
                "output_stride": 8,
                "aspp_rates": (1, 2),
                "head": "prototypes",
                "features": 8,
                "prototypes_per_class": 3,
                "preprocessing": "imagenet",
                "msc": (),
                "remat": False,
            },
            "pretrained": {"path": None},
            "loss": {"diversity": 0.25, "l1": 1e-4, "diversity_reduction": "present"},
            "phases": {
                "warmup": {**training, "learning_rates": new},
                "joint": {**training, "learning_rates": {**new, "backbone": 1e-3}},
                "projection": {"steps": 1},
                "finetune": head,
                "pruning": {"steps": 1},
                "finetune_pruned": head,
            },
            "log_every": 1,
            "eval_every": 2,
            "checkpoint_every": 2,
        }
    )


def one_device():
    return DevicePool(jax.local_devices()[:1])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    make_data(root / "own")
    config = make_config(root)
    workdir = Workdir(root / "work")
    run = Run(config, workdir, one_device())
    workdir.start(config, runs.manifest(config))
    run.go()
    return run


def test_every_phase_is_scored(finished):
    summary = finished.workdir.summary()
    assert [e["phase"] for e in summary] == PHASES
    assert [e["steps"] for e in summary] == [3, 3, None, 3, None, 3]
    counts = [e["num_prototypes"] for e in summary]
    assert counts[0] == counts[1] == 9 >= counts[2] == counts[3] >= counts[4] == counts[5] >= 3
    for entry in summary:
        assert 0 <= entry["miou"] <= 1
        assert entry["pixel_accuracy"] + entry["pixel_error"] == pytest.approx(1)


def test_metrics_have_one_line_a_logged_step(finished):
    text = (finished.workdir.path / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    training = [p for p in PHASES if p not in ("projection", "pruning")]
    assert [(x["phase"], x["step"]) for x in lines] == [(p, s) for p in training for s in (1, 2, 3)]
    keys = {"phase", "step", "time", "loss", "cross_entropy", "diversity", "l1"}
    assert all(set(x) == keys | {"learning_rate", "images_per_second"} for x in lines)


def test_prototypes_are_patches_of_their_class_and_fire_fully_there(finished):
    record = json.loads((finished.workdir.path / "prototypes.json").read_text())
    assert record["classes"] == ["ground", "disc", "bar"]
    checkpoint = finished.workdir.restore("finetune_pruned")
    inference = finished.inference(checkpoint.prototypes)
    source = finished.data.source("train")
    examples = {source[n]["image_id"]: source[n] for n in range(len(source))}
    infer = jax.jit(lambda image: inference(checkpoint.variables, image[None]))
    assert {p["class"] for p in record["prototypes"]} == {0, 1, 2}
    for j, prototype in enumerate(record["prototypes"]):
        example = examples[prototype["image_id"]]
        row, col = prototype["row"], prototype["col"]
        output = infer(inference.prepare(example["image"]))
        fired = float(similarity(output.distances)[0, row, col, j])
        assert fired == pytest.approx(math.log(1e4), abs=1e-3)
        (h, w), (height, width) = record["feature_size"], example["label"].shape
        centre = example["label"][int((row + 0.5) * height / h), int((col + 0.5) * width / w)]
        assert centre == prototype["class"]
        top, left, bottom, right = prototype["box"]
        assert 0 <= top < bottom <= height and 0 <= left < right <= width
        assert (finished.workdir.path / "prototypes" / f"{prototype['index']:03d}.png").is_file()
    pictures = sorted((finished.workdir.path / "prototypes").glob("class_*.png"))
    assert [p.name for p in pictures] == [
        "class_00_ground.png",
        "class_01_disc.png",
        "class_02_bar.png",
    ]


@pytest.mark.slow
def test_bfloat16_is_a_setting_of_the_whole_run(finished, tmp_path):
    """Every phase in bfloat16; a prototype still fires all but fully on its own source patch.

    Not to 1e-3: where a value is rounded to bfloat16 depends on how XLA fuses a program.
    """
    config = finished.config.copy_and_resolve_references()
    config.compute_dtype = "bfloat16"
    run = Run(config, Workdir(tmp_path / "work"), one_device())
    run.workdir.start(config, runs.manifest(config))
    run.go()
    assert [e["phase"] for e in run.workdir.summary()] == PHASES
    manifest = json.loads((run.workdir.path / "manifest.json").read_text())
    assert manifest["compute_dtype"] == "bfloat16"
    checkpoint = run.workdir.restore("finetune_pruned")
    leaves = jax.tree.leaves(checkpoint.arrays["params"])
    assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}
    inference, source = run.inference(checkpoint.prototypes), run.data.source("train")
    infer = jax.jit(lambda image: inference(checkpoint.variables, image[None]))
    for j, prototype in enumerate(checkpoint.prototypes):
        output = infer(inference.prepare(source[prototype["image"]]["image"]))
        fired = float(similarity(output.distances)[0, prototype["row"], prototype["col"], j])
        assert fired == pytest.approx(math.log(1e4), abs=0.1)


def test_scores_equal_a_literal_computation(finished):
    """Validation mIoU from the images one by one, logits resized by OpenCV."""
    import cv2

    checkpoint = finished.workdir.restore("finetune_pruned")
    inference = finished.inference(checkpoint.prototypes)
    infer = jax.jit(lambda image: inference(checkpoint.variables, image[None]).logits[0])
    source, confusion = finished.data.source("validation"), np.zeros((3, 3), np.int64)
    for n in range(len(source)):
        label = source[n]["label"]
        logits = np.asarray(infer(inference.prepare(source[n]["image"])))
        guess = cv2.resize(logits, label.shape[::-1], interpolation=cv2.INTER_LINEAR).argmax(-1)
        for truth, predicted in zip(label.ravel(), guess.ravel(), strict=True):
            if truth != 255:
                confusion[truth, predicted] += 1
    hits = np.diagonal(confusion)
    union = confusion.sum(0) + confusion.sum(1) - hits
    expected = np.mean([h / u for h, u in zip(hits, union, strict=True) if u])
    assert finished.workdir.summary()[-1]["miou"] == pytest.approx(expected, abs=2e-3)


def test_eval_writes_scores_and_predictions(finished, tmp_path):
    path = finished.workdir.path
    result = scoring.score_run(str(path), "validation", None, str(tmp_path / "out"))
    written = json.loads((path / "eval" / "validation-finetune_pruned.json").read_text())
    assert written == result
    assert written["miou"] == pytest.approx(finished.workdir.summary()[-1]["miou"], abs=1e-6)
    source = finished.data.source("validation")
    for n in range(len(source)):
        prediction = np.array(Image.open(tmp_path / "out" / f"{source[n]['image_id']}.png"))
        assert prediction.shape == source[n]["label"].shape and prediction.max() < 3
    with pytest.raises(UserError, match="has not finished phase 'fintune'"):
        scoring.score_run(str(path), "validation", "fintune", None)
    with pytest.raises(UserError, match="split 'test' does not exist"):
        scoring.score_run(str(path), "test", None, None)
    with pytest.raises(UserError, match="holds no run"):
        scoring.score_run(str(tmp_path), "validation", None, None)


def test_a_finished_run_says_so_and_changes_nothing(finished, capsys):
    before = (finished.workdir.path / "summary.json").read_bytes()
    finished.go()
    assert "finished" in capsys.readouterr().err
    assert (finished.workdir.path / "summary.json").read_bytes() == before


def test_another_config_is_refused_naming_the_keys(finished):
    config = finished.config.copy_and_resolve_references()
    config.log_every = 77  # logging may change
    finished.workdir.start(config, {})
    config.loss.diversity = 0.5
    with pytest.raises(UserError, match="loss.diversity"):
        finished.workdir.start(config, {})
    finished.workdir.start(finished.config, {})


def test_a_phase_goes_on_from_its_checkpoint(finished, tmp_path):
    """Joint from step 2 of 3 ends where the undisturbed one ended, bit for bit."""
    first = finished.workdir.restore("warmup")
    phase = finished.phases[1]
    spare = Run(finished.config, Workdir(tmp_path / "spare"), one_device())
    spare.workdir.start(finished.config, {})
    whole = spare.train_phase(phase, first, 3)
    spare.workdir.wait()
    half = spare.workdir.restore(spare.workdir.latest("joint"))
    assert (half.step, half.finished) == (2, False)
    again = spare.train_phase(phase, half, 3)
    expected = finished.workdir.restore("joint")
    for other in (whole, again):
        same = jax.tree.map(
            lambda a, b: bool(np.array_equal(a, b)),
            expected.arrays["params"],
            other.arrays["params"],
        )
        assert all(jax.tree.leaves(same))


def same_params(a, b):
    equal = jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b)
    return all(jax.tree.leaves(equal))


@pytest.mark.parametrize("name", ["projection", "pruning"])
def test_a_search_that_is_interrupted_goes_on(finished, tmp_path, name):
    """SIGTERM in the middle of a search: its best so far is saved, and the rest is searched."""
    position = PHASES.index(name)
    before = finished.workdir.restore(PHASES[position - 1])
    spare = Run(finished.config, Workdir(tmp_path / "spare"), one_device())
    spare.workdir.start(finished.config, {})
    spare.interrupts.pending = signal.SIGTERM
    with pytest.raises(Interrupted) as stopped:
        spare._run_phase(finished.phases[position], before, 0)
    assert stopped.value.code == 143
    spare.workdir.wait()
    spare.interrupts.pending = 0
    half = spare.workdir.newest([name])
    assert (half.phase, half.finished) == (name, False) and 0 < half.step < 8
    again = spare._run_phase(finished.phases[position], half, 0)
    expected = finished.workdir.restore(name)
    assert same_params(again.arrays["params"], expected.arrays["params"])
    assert again.prototypes == expected.prototypes


def test_training_that_is_interrupted_saves_first(finished, tmp_path):
    spare = Run(finished.config, Workdir(tmp_path / "spare"), one_device())
    spare.workdir.start(finished.config, {})
    spare.interrupts.pending = signal.SIGINT
    with pytest.raises(Interrupted) as stopped:
        spare.train_phase(finished.phases[1], finished.workdir.restore("warmup"), 3)
    assert stopped.value.code == 130
    spare.workdir.wait()
    spare.interrupts.pending = 0
    half = spare.workdir.newest(PHASES)
    assert (half.phase, half.step) == ("joint", 1)
    whole = spare.train_phase(finished.phases[1], half, 3)
    expected = finished.workdir.restore("joint").arrays["params"]
    assert same_params(whole.arrays["params"], expected)


def test_a_signal_in_the_last_step_of_a_phase_saves_the_whole_phase(finished, tmp_path):
    config = finished.config.copy_and_resolve_references()
    config.phases.warmup.steps = 1
    run = Run(config, Workdir(tmp_path / "spare"), one_device())
    run.workdir.start(config, {})
    run.interrupts.pending = signal.SIGTERM
    with pytest.raises(Interrupted):
        run.go()
    run.workdir.wait()
    assert run.workdir.newest(PHASES).name == "warmup"


def damage(folder, how):
    """Cut off or change the largest file of a checkpoint, or remove it."""
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 0x10
    largest.write_bytes(content)


@pytest.mark.parametrize(
    "how",
    ["flipped", *(pytest.param(h, marks=pytest.mark.slow) for h in ("truncated", "gone", "meta"))],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(finished, tmp_path, how, capsys):
    root = tmp_path / "work"
    shutil.copytree(finished.workdir.path, root)
    last = root / "checkpoints" / "finetune_pruned"
    if how == "gone":
        shutil.rmtree(last)
    elif how == "meta":
        text = last.with_suffix(".json").read_text()
        last.with_suffix(".json").write_text(text.replace('"class": 0', '"class": 1', 1))
    else:
        damage(last, how)
    with pytest.raises(UserError, match="finetune_pruned is damaged .*start train.py again"):
        scoring.score_run(str(root), "validation", None, None)
    run = Run(finished.config, Workdir(root), one_device())
    run.workdir.start(finished.config, {})
    run.go()
    errors = capsys.readouterr().err
    assert "finetune_pruned is damaged" in errors and "checkpoints/damaged" in errors
    again, expected = (w.restore("finetune_pruned") for w in (run.workdir, finished.workdir))
    assert same_params(again.arrays["params"], expected.arrays["params"])
    scores = [{**e, "seconds": 0} for e in run.workdir.summary()]
    assert scores == [{**e, "seconds": 0} for e in finished.workdir.summary()]
    if how != "gone":
        assert (root / "checkpoints" / "damaged" / "finetune_pruned").is_dir()


def test_a_disk_without_room_for_a_checkpoint_keeps_the_one_before(finished, tmp_path, monkeypatch):
    workdir = Workdir(tmp_path / "work")
    workdir.start(finished.config, {})
    checkpoint = finished.workdir.restore("warmup")
    workdir.save(checkpoint)
    workdir.wait()
    before = sorted(workdir.checkpoints.rglob("*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    workdir.save(dataclasses.replace(checkpoint, phase="joint"))
    with pytest.raises(OSError, match="disk full") as error:
        workdir.wait()
    assert full_disk(error.value)
    assert sorted(workdir.checkpoints.rglob("*")) == before
    assert workdir.newest(PHASES).phase == "warmup"


@pytest.fixture(scope="module")
def authors_file(tmp_path_factory):
    """A trained ProtoSeg as the authors' code would save it, 8 prototypes of 3 classes."""
    path = tmp_path_factory.mktemp("weights") / "protoseg.safetensors"
    classes = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    safetensors.numpy.save_file(weights.protoseg(26, 4, (1, 2), 8, classes, 3), path)
    return path


def ported_config(finished):
    config = finished.config.copy_and_resolve_references()
    config.batch_size = 8
    config.model.update({"depth": 26, "width": 4, "norm": "frozen_batch"})
    config.model.update({"stride_in": "auto", "preprocessing": "auto"})
    return config


@pytest.mark.slow
def test_a_ported_protoseg_is_a_run(finished, authors_file, tmp_path, capsys):
    """Scored as it is, then projected, fine-tuned and pruned."""
    config = ported_config(finished)
    runs.write_ported(config, str(authors_file), str(tmp_path / "work"))
    folder = Workdir(tmp_path / "work")
    assert folder.config().model.stride_in == "1x1"
    assert folder.config().model.preprocessing == "imagenet"
    scores = scoring.score_run(str(folder.path), "validation", None, None)
    assert scores["phase"] == "joint" and 0 <= scores["miou"] <= 1
    got, expected = folder.restore("joint"), port_torch.load(authors_file)
    assert same_params(got.arrays["params"], expected.params)
    assert [p["class"] for p in got.prototypes] == [0, 0, 0, 1, 1, 2, 2, 2]
    runs.train(config, str(folder.path))
    assert [e["phase"] for e in folder.summary()] == PHASES[1:]
    runs.train(config, str(folder.path))
    assert "this run is finished" in capsys.readouterr().err
    frozen = folder.restore("finetune_pruned").arrays["frozen"]
    assert same_params(frozen, expected.frozen)
    with pytest.raises(UserError, match="holds a run already"):
        runs.write_ported(config, str(authors_file), str(folder.path))


def test_pretrained_weights_are_where_a_run_starts(finished, authors_file, tmp_path, capsys):
    config = ported_config(finished)
    config.pretrained.path = str(authors_file)
    run = Run(config, Workdir(tmp_path / "work"), one_device())
    starts.settle(config, run.workdir)
    assert config.model.stride_in == "1x1"
    start, expected = run.initial(), port_torch.load(authors_file)
    assert same_params(start.arrays["params"], expected.params)
    # A run that goes on keeps what it was started with, and needs the file no more.
    run.workdir.start(config, {})
    again = ported_config(finished)
    again.pretrained.path = "/nowhere.pth"
    starts.settle(again, run.workdir)
    run.workdir.start(again, {})
    run.workdir.release()

    assert "warning" not in capsys.readouterr().err
    config.model.stride_in = "3x3"
    Run(config, Workdir(tmp_path / "other"), one_device()).initial()
    assert "warning: model.stride_in is '3x3', but weights" in capsys.readouterr().err
    config.model.depth = 14
    with pytest.raises(UserError, match="backbone of weights .* does not fit model.depth=14"):
        Run(config, Workdir(tmp_path / "other"), one_device()).initial()
    config.model.update({"depth": 26, "head": "linear"})
    with pytest.raises(UserError, match="model.head='linear' has no prototypes"):
        Run(config, Workdir(tmp_path / "other"), one_device()).initial()
    config.pretrained.path = None
    Run(config, Workdir(tmp_path / "other"), one_device()).initial()
    assert "set --config.pretrained.path" in capsys.readouterr().err


def test_a_run_starts_from_a_black_box(finished, tmp_path, capsys):
    """Its backbone is taken; ASPP, whose channels are classes there, and the head are new."""
    config = ml_collections.ConfigDict(finished.config.to_dict())
    config.model.head, config.seed = "linear", 1
    folder = Workdir(tmp_path / "black box")
    folder.start(config, {})
    there = Run(config, folder, one_device()).initial()
    own = ml_collections.ConfigDict(finished.config.to_dict())
    own.pretrained.path = str(folder.path)
    with pytest.raises(UserError, match="has not finished a phase yet"):
        starts.initial(Run(own, Workdir(tmp_path / "work"), one_device()))
    folder.save(dataclasses.replace(there, phase="joint", step=6))
    folder.wait()
    folder.release()

    run = Run(own, Workdir(tmp_path / "work"), one_device())
    got, random = starts.initial(run), starts.random(run, starts.classes_at_start(run))
    assert same_params(got.arrays["params"]["backbone"], there.arrays["params"]["backbone"])
    assert not same_params(got.arrays["params"]["backbone"], random.arrays["params"]["backbone"])
    for group in ("aspp", "prototypes", "head"):
        assert same_params(got.arrays["params"][group], random.arrays["params"][group])
    assert "after its phase joint; new: aspp/" in capsys.readouterr().err

    own.model.width = 16
    with pytest.raises(UserError, match=r"backbone/.* of run .* does not fit this config's"):
        starts.initial(Run(own, Workdir(tmp_path / "work"), one_device()))
    own.model.width, own.data.held_out = 8, "disc"
    with pytest.raises(UserError, match="so its network may know that class"):
        starts.initial(Run(own, Workdir(tmp_path / "work"), one_device()))
    own.data.held_out, own.pretrained.path = None, str(tmp_path)
    with pytest.raises(UserError, match="is a folder that holds no run"):
        starts.initial(Run(own, Workdir(tmp_path / "work"), one_device()))


def test_a_run_starts_from_a_prototype_run(finished, tmp_path):
    """Backbone and ASPP after its last phase; its prototypes stay where they are."""
    config = ml_collections.ConfigDict(finished.config.to_dict())
    config.pretrained.path, config.model.prototypes_per_class = str(finished.workdir.path), 5
    config.model.preprocessing = "auto"
    starts.settle(config)
    assert config.model.preprocessing == "imagenet"
    got = Run(config, Workdir(tmp_path / "work"), one_device()).initial()
    last = finished.workdir.restore("finetune_pruned")
    for group in ("backbone", "aspp"):
        assert same_params(got.arrays["params"][group], last.arrays["params"][group])
    assert len(got.prototypes) == 5 * finished.num_classes


def test_prototypes_may_start_on_training_patches(finished, authors_file, tmp_path):
    config = ml_collections.ConfigDict(finished.config.to_dict())
    config.model.prototype_init = "patches"
    config.model.prototypes_per_class = 40  # some classes are in fewer images
    run = Run(config, Workdir(tmp_path / "work"), one_device())
    start = run.initial()
    placed = starts.on_patches(run, start)
    same = {**placed.arrays["params"], "prototypes": start.arrays["params"]["prototypes"]}
    assert same_params(same, start.arrays["params"])
    vectors, before = (x.arrays["params"]["prototypes"]["vectors"] for x in (placed, start))

    inference, source = run.inference(start.prototypes), run.source("train")
    points = {c: [] for c in range(run.num_classes)}
    for n in range(len(source)):
        example = source[n]
        image, label = inference.prepare(example["image"]), example["label"]
        z = np.asarray(inference(start.variables, image[None]).features[0])
        labels = shrink_labels(label[None], None, z.shape[:2])[0]
        for c in points:
            if (labels == c).any():
                points[c].append(z[labels == c])
    for c, images in points.items():
        own = run.classes_of(start.prototypes) == c
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
        Run(config, Workdir(tmp_path / "work"), one_device()).check()
    ported = ported_config(finished)
    ported.pretrained.path, ported.model.prototype_init = str(authors_file), "patches"
    with pytest.raises(UserError, match="are a ProtoSeg, whose prototypes would be lost"):
        Run(ported, Workdir(tmp_path / "other"), one_device()).initial()


def test_what_a_killed_write_left_is_no_bother(finished, tmp_path, caplog):
    workdir = Workdir(tmp_path / "work")
    workdir.start(finished.config, {})
    left = workdir.checkpoints / "warmup.orbax-checkpoint-tmp"
    left.mkdir(parents=True)
    (left / "half").write_text("written")
    workdir.save(finished.workdir.restore("warmup"))
    workdir.wait()
    assert not left.exists() and not caplog.records
    assert workdir.newest(PHASES).phase == "warmup"


def test_two_trainers_on_one_folder_are_refused(finished, tmp_path):
    first, second = Workdir(tmp_path / "work"), Workdir(tmp_path / "work")
    first.start(finished.config, {})
    with pytest.raises(UserError, match=f"in use by another train.py .process {os.getpid()} on"):
        second.start(finished.config, {})
    first.release()
    second.start(finished.config, {})
    second.release()


@pytest.mark.slow
def test_started_on_four_devices_and_resumed_on_one(finished, tmp_path):
    """The loss goes on as if nothing had happened."""
    config = finished.config.copy_and_resolve_references()
    config.batch_size = 4
    losses = []
    for name, counts in (("same", (1, 1)), ("other", (4, 1))):
        state = finished.workdir.restore("warmup")
        for stop, devices in zip((2, 3), counts, strict=True):
            pool = DevicePool(jax.local_devices()[:devices])
            run = Run(config, Workdir(tmp_path / name), pool)
            phase = dataclasses.replace(run.phases[1], steps=3)
            run.interrupts.pending = 0
            if stop == 2:
                run.train_phase(phase, state, 3)  # leaves joint-0000002 behind
                run.workdir.wait()
                state = run.workdir.restore("joint-0000002")
            else:
                run.train_phase(phase, state, 3)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert len(losses[0]) == 4  # steps 1, 2, 3 and, resumed, 3 again
    assert losses[0][2] == losses[0][3]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_nothing_that_is_read_is_executed(finished, tmp_path, monkeypatch):
    """A run's folder is restored and scored without pickle."""

    def refuse(*_, **__):
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    root = tmp_path / "work"
    shutil.copytree(finished.workdir.path, root)
    assert Workdir(root).newest(PHASES).phase == "finetune_pruned"
    assert Workdir(root).config().to_dict() == finished.workdir.config().to_dict()


def test_a_loss_that_is_not_finite_stops_the_run(finished, tmp_path):
    start = finished.workdir.restore("warmup")
    start.arrays["params"]["head"]["kernel"] = np.full((9, 3), np.nan, np.float32)
    spare = Run(finished.config, Workdir(tmp_path / "spare"), one_device())
    spare.workdir.start(finished.config, {})
    with pytest.raises(UserError, match="loss is nan at step 1 of phase joint"):
        spare.train_phase(finished.phases[1], start, 3)
    assert spare.workdir.latest("joint") is None


@pytest.mark.parametrize(
    ("program", "arguments", "words"),
    [
        ("train.py", ["--config=configs/nothing.py"], "does not exist"),
        ("train.py", ["--config=configs/demo.py", "--config.sed=1"], "sed"),
        ("train.py", ["--config=configs/demo.py", "--config.seed=x"], "seed"),
        ("train.py", ["--config=configs/demo.py", "--smok"], "smok"),
        ("train.py", [], "no --config given"),
        ("train.py", ["--config=configs/pascal.py:nothing"], "no row 'nothing', but imagenet"),
        ("eval.py", ["--workdir=/nowhere/at/all"], "holds no run"),
    ],
)
def test_a_bad_command_line_is_one_line_and_exit_code_2(program, arguments, words, tmp_path):
    command = [sys.executable, str(ROOT / program), *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert words in result.stderr


@pytest.mark.slow
def test_a_class_held_out_is_never_seen(finished, tmp_path):
    """It has no prototypes, and its labels are void but for the novelty test."""
    config = finished.config.copy_and_resolve_references()
    config.data.held_out = "disc"
    workdir = Workdir(tmp_path / "work")
    run = Run(config, workdir, one_device())
    run.check()
    workdir.start(config, runs.manifest(config))
    run.go()
    for phase in ("joint", "finetune_pruned"):
        assert {p["class"] for p in workdir.restore(phase).prototypes} == {0, 2}
    kernel = run.initial().arrays["params"]["head"]["kernel"]
    assert kernel.tolist() == [[1.0, -0.5, -0.5]] * 3 + [[-0.5, -0.5, 1.0]] * 3
    for split in ("train", "validation"):
        raw, seen = run.data.source(split), run.source(split)
        for n in range(len(raw)):
            label = raw[n]["label"]
            np.testing.assert_array_equal(seen[n]["label"], np.where(label == 1, 255, label))
    result = scoring.score_run(str(workdir.path), "validation", None, None, interpretability=True)
    assert result["iou"]["disc"] is None or result["iou"]["disc"] == 0
    assert 0 <= result["interpretability"]["novelty_auroc"] <= 1


def test_a_held_out_class_has_no_say_in_the_others_weights(finished, tmp_path):
    config = finished.config.copy_and_resolve_references()
    config.data.held_out, config.loss.class_balance = "disc", 1.0
    run = Run(config, Workdir(tmp_path / "work"), one_device())
    pixels = run.data.class_pixels("train").astype(float)
    weights, pixels = run.class_weights(), pixels[[0, 2]]
    assert weights[1] == 1.0
    np.testing.assert_allclose(weights[[0, 2]], pixels.mean() / pixels, rtol=1e-6)


def test_a_held_out_class_must_exist(finished, tmp_path):
    config = finished.config.copy_and_resolve_references()
    config.data.held_out = "cube"
    with pytest.raises(UserError, match="data.held_out='cube' is no class of data set 'folder'"):
        Run(config, Workdir(tmp_path / "work"), one_device())


def test_explanations_are_measured_where_there_are_any(finished, capsys):
    """Measures of a run; the black box has none and says so."""
    path = str(finished.workdir.path)
    result = scoring.score_run(path, "validation", None, None, interpretability=True)
    found = result["interpretability"]
    count = len(finished.workdir.restore("finetune_pruned").prototypes)
    assert len(found["wins"]) == count and len(found["survival"]) == count + 1
    assert found["consistency"] is None and "novelty_auroc" not in found
    assert "utilisation" in capsys.readouterr().out
    stored = finished.workdir.path / "eval" / "validation-finetune_pruned.json"
    assert json.loads(stored.read_text())["interpretability"] == found
    # Scoring it again without measuring keeps them.
    assert scoring.score_run(path, "validation", None, None)["interpretability"] == found
    assert json.loads(stored.read_text())["interpretability"] == found
    # A class as if it were held out, though this run has learnt it.
    checkpoint = finished.workdir.restore("finetune_pruned")
    learnt = scoring.measure(finished, checkpoint, "validation", novel=1)
    assert 0 <= learnt["novelty_auroc"] <= 1 and "novelty_auroc" not in found

    config = finished.config.copy_and_resolve_references()
    config.model.head = "linear"
    twin = Workdir(finished.workdir.path.parent / "twin")
    run = Run(config, twin, one_device())
    twin.start(config, runs.manifest(config))
    twin.save(dataclasses.replace(run.initial(), phase="warmup", finished=True))
    twin.wait()
    with pytest.raises(UserError, match="is the black box"):
        scoring.score_run(str(twin.path), "validation", None, None, interpretability=True)
