"""Views that a frozen backbone sees once: what it says of them, and nothing else is ever used."""

import shutil
from unittest import mock

import jax
import numpy as np
import pytest

from protoseg_jax import losses, models
from protoseg_jax.errors import UserError
from protoseg_jax.evaluation.score import evaluate
from protoseg_jax.inference import shrink_labels
from protoseg_jax.models import unet
from protoseg_jax.program import Interrupted
from protoseg_jax.run.experiment import Experiment
from protoseg_jax.training import run as runs
from protoseg_jax.training import start as starts
from protoseg_jax.training import step as steps
from protoseg_jax.training import views
from tests import small

SIZE, VIEWS, IMAGES = (40, 48), 2, 8
NEW = {"decoder": 1e-3, "prototypes": 1e-3}


def make_config(root, **changes):
    """A U-Net, whose backbone says two maps of one image, and which nothing trains."""
    config = small.make_config(root)
    config.crop_size = config.eval_size = SIZE
    config.augment.views = VIEWS
    config.model.update({"backbone": "unet", "depth": 1, "width": 4, "output_stride": 1})
    for name in ("warmup", "joint"):
        config.phases[name] = {"steps": 3, "learning_rates": NEW, "schedule": "constant"}
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("views")
    small.make_data(folder / "own")
    return folder


@pytest.fixture(scope="module")
def made(root):
    """An experiment, where it starts, and its views."""
    experiment = small.experiment(make_config(root))
    start = starts.initial(experiment)
    return experiment, start, views._open(experiment, start)


def same(first, second):
    return jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), first, second)


def test_a_record_is_what_the_backbone_says_of_its_view(made):
    experiment, start, found = made
    source, inference = experiment.source("train"), experiment.inference(start.prototypes)
    encode = jax.jit(inference.encode)
    assert len(found.paths) == 1 + VIEWS and found.images == len(source) == IMAGES
    for view in range(1 + VIEWS):
        for number in range(IMAGES):
            example = source[number]
            if view:
                rng = np.random.default_rng([experiment.config.seed, view, number])
                example = experiment.augmentation.random_map(example, rng)
            image = inference.prepare(example["image"])
            maps = encode(start.variables, image[None])
            label = shrink_labels(example["label"][None], None, inference.feature_size)
            record = found.record(view, number)
            np.testing.assert_array_equal(record["label"], label[0])
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b[0], rtol=1e-5, atol=1e-5),
                record["maps"],
                maps,
            )
    crops = [found.record(view, 0)["maps"] for view in range(1 + VIEWS)]
    assert not any(
        np.array_equal(jax.tree.leaves(crops[0])[0], jax.tree.leaves(c)[0]) for c in crops[1:]
    )


def test_a_step_on_maps_is_the_step_on_their_images(made):
    experiment, start, found = made
    config, pool = experiment.config, experiment.pool
    inference, phase = experiment.inference(start.prototypes), experiment.phases[1]
    rules = models.decay(config.model)
    terms = losses.terms(config.loss, inference.classes, inference.num_classes)
    sizes = inference.feature_sizes(SIZE)
    step = steps.make_step(inference, phase, terms, rules, accumulate=2, feature_sizes=sizes)
    source = experiment.source("train")
    examples = [views._Crops(experiment, 1)[n] for n in range(4)]
    images = {k: np.stack([e[k] for e in examples]) for k in ("image", "label")}
    maps = jax.tree.map(lambda *x: np.stack(x), *(found.record(1, n) for n in range(4)))
    assert len(source) == IMAGES
    params = start.arrays["params"]
    _, frozen = steps.split(params, phase)
    bare = {name: tree for name, tree in frozen.items() if name != "backbone"}
    results = []
    for batch, rest in ((images, frozen), (maps, bare)):  # maps need no backbone at all
        state = pool.replicate(steps.init_state(params, phase, rules))
        state, metrics = pool.map(step)(state, pool.replicate(rest), {}, pool.shard(batch))
        moments = [m.inner_state[1].mu for m in pool.first(state).moments.inner_states.values()]
        results.append((pool.first(metrics), jax.tree.leaves(moments)))
    (a, first), (b, second) = results
    assert a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], rel=1e-5) for k in a)
    assert len(first) == len(second) > 4
    for x, y in zip(first, second, strict=True):
        assert np.linalg.norm(x) > 0
        assert np.linalg.norm(x - y) <= 1e-4 * np.linalg.norm(x)


def test_batches_are_a_function_of_the_seed_and_the_step(made):
    experiment, start, found = made
    draw = views.batches(experiment, start)
    first, again = draw(0), draw(3)
    batches = [next(first) for _ in range(16)]
    same(batches[3], next(again))
    assert set(batches[0]) == {"maps", "label"} and batches[0]["label"].dtype == np.uint8
    # Of each image, in the time of every epoch, exactly one view; in all, every view.
    known = {
        found.record(v, n)["maps"][0].tobytes(): (v, n)
        for v in range(1 + VIEWS)
        for n in range(IMAGES)
    }
    assert len(known) == (1 + VIEWS) * IMAGES
    seen = [known[m.tobytes()] for batch in batches for m in batch["maps"][0]]
    for epoch in range(len(seen) // IMAGES):
        numbers = [n for _, n in seen[epoch * IMAGES : (epoch + 1) * IMAGES]]
        assert sorted(numbers) == list(range(IMAGES))
    assert {v for v, _ in seen} == set(range(1 + VIEWS))


def test_another_program_or_number_of_devices_has_another_cache(made, monkeypatch):
    """Code is not in weights and settings: what the backbone becomes is looked at."""
    experiment, start, found = made
    inference = experiment.inference(start.prototypes)
    variables = {"params": {"backbone": start.arrays["params"]["backbone"]}}
    named = [
        views._fingerprint(experiment, inference, variables, n) for n in ((1, 3), (1, 3), (2, 4))
    ]
    assert named[0] == named[1] != named[2]
    monkeypatch.setattr(unet.nn, "relu", jax.nn.gelu)
    assert views._fingerprint(experiment, inference, variables, (1, 3)) != named[0]


def test_views_that_do_not_fit_on_the_disk_are_refused_beforehand(made, monkeypatch, tmp_path):
    monkeypatch.setattr(views.shutil, "disk_usage", lambda _: mock.Mock(free=10**6))
    with pytest.raises(UserError, match=r"would take 3.0 GB, and 0.0 GB are free"):
        views._require_room(tmp_path, 3 * 10**9)


def test_the_cache_is_used_again_only_for_what_it_was_made_for(made, root, monkeypatch):
    experiment, start, found = made
    with monkeypatch.context() as patch:
        patch.setattr(views, "_make", None)  # a call of it fails
        assert views._open(experiment, start) == found
        other = Experiment(make_config(root, batch_size=4, log_every=2), small.one_device())
        assert views._open(other, start) == found
    changes = (
        {"seed": 1},
        {"compute_dtype": "bfloat16"},
        {"model": {"preprocessing": "caffe"}},
        {"augment": {"scale": (0.5, 1.0)}},
        {"data": {"held_out": "disc"}},
    )
    folders = {found.paths[0].parent}
    for change in changes:
        other = small.experiment(make_config(root, **change))
        opened = views._open(other, start)
        folders.add(opened.paths[0].parent)
        record = opened.record(0, 0)
        if "compute_dtype" in change:
            assert record["maps"][0].dtype == jax.numpy.bfloat16
        if "data" in change:
            assert {1} & set(found.record(0, 0)["label"].ravel().tolist())
            assert not {1} & set(record["label"].ravel().tolist())
    params = jax.tree.map(lambda x: x, start.arrays["params"])
    params["backbone"] = jax.tree.map(lambda x: x * 1.01, params["backbone"])
    weights = type(start)("", 0, True, {**start.arrays, "params": params}, start.prototypes)
    folders.add(views._open(experiment, weights).paths[0].parent)
    params = {**start.arrays["params"], "decoder": None, "prototypes": None, "head": None}
    behind = type(start)("", 0, True, {**start.arrays, "params": params}, start.prototypes)
    folders.add(views._open(experiment, behind).paths[0].parent)
    assert len(folders) == 1 + len(changes) + 1


@pytest.mark.parametrize("damage", ["a byte", "cut short", "gone", "not finished", "no index"])
def test_what_is_damaged_or_unfinished_is_made_again(made, tmp_path, damage, capsys):
    experiment, start, found = made
    folder = found.paths[0].parent
    kept = tmp_path / "kept"
    shutil.copytree(folder, kept)
    path = found.paths[1]
    (folder / f".{path.name}.1.tmp").write_bytes(b"of a process that was killed")
    if damage == "a byte":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "cut short":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "gone":
        path.unlink()
    elif damage == "not finished":
        text = (folder / "index.json").read_text()
        (folder / "index.json").write_text(text.replace(path.name, "other"))
    else:
        (folder / "index.json").write_text("{")
    assert views._open(experiment, start) == found
    for name in (p.name for p in found.paths):
        assert (folder / name).read_bytes() == (kept / name).read_bytes()
    assert ("damaged" in capsys.readouterr().err) == (damage in ("a byte", "cut short"))
    assert not list(folder.glob(".*.tmp"))  # nor what a killed process left


def test_a_view_that_goes_missing_later_is_one_line(made, tmp_path):
    _, _, found = made
    gone = views.Views((tmp_path / "000.maps",), 1, found.dtype, found.tree)
    with pytest.raises(UserError, match="cannot be read"):
        gone.record(0, 0)
    (tmp_path / "000.maps").write_bytes(b"abc")
    with pytest.raises(UserError, match="cannot be read"):
        gone.record(0, 0)


def test_a_cache_that_cannot_be_written_is_one_line(made, root, tmp_path):
    experiment, start, _ = made
    _ = experiment.data
    (tmp_path / "file").write_text("")
    other = small.experiment(make_config(root))
    other.data = experiment.data  # prepared elsewhere
    other.config.data.cache = str(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"):
        views._open(other, start)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["prototypes", "linear", "anchors"])
def test_a_run_that_is_stopped_ends_as_one_that_is_not(root, tmp_path, head, monkeypatch):
    config = make_config(root)
    if head == "anchors":
        head, config.model.anchors, config.loss.assignment = "prototypes", -1, 0.3
    config.model.head = head
    whole = small.begin(config, tmp_path / "whole")
    runs.go(whole)
    broken = small.begin(config, tmp_path / "broken")
    monkeypatch.setattr(broken, "asked_to_stop", lambda: 2)
    with pytest.raises(Interrupted):
        runs.go(broken)
    monkeypatch.undo()
    runs.go(broken)
    last = whole.experiment.phases[-1].name
    ends = [live.workdir.checkpoints.restore(last) for live in (whole, broken)]
    assert small.same_arrays(ends[0].arrays, ends[1].arrays)
    backbones = [end.arrays["params"]["backbone"] for end in ends]
    start = starts.initial(whole.experiment).arrays["params"]
    assert small.same_arrays(backbones[0], start["backbone"])
    moved = [not small.same_arrays(ends[0].arrays["params"][g], start[g]) for g in ("decoder",)]
    assert all(moved)
    # Evaluation knows nothing of views.
    plain = small.experiment(make_config(root, augment={"views": 0}))
    plain.config.model.head, plain.black_box = head, head == "linear"
    assert evaluate(plain, ends[0], "validation") == evaluate(
        whole.experiment, ends[0], "validation"
    )
    for live in (whole, broken):
        live.workdir.release()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"augment": {"views": -1}}, "must be the number of crops"),
        ({"crop_size": (32, 32)}, "of one size"),
        ({"eval_overlap": 8}, "eval_overlap"),
        ({"model": {"msc": (0.5,)}}, "model.msc"),
        (
            {"phases": {"joint": {"learning_rates": {"backbone": 1e-3}}}},
            r"phases\.joint\.learning_rates\.backbone",
        ),
    ],
)
def test_views_are_refused_where_they_would_not_be_what_trains(root, changes, message):
    experiment = small.experiment(make_config(root, **changes))
    with pytest.raises(UserError, match=message):
        runs.check(experiment, new=False)
