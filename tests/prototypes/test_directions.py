"""Directions of a trained linear network: exact sums over them, and the rotation that is sought."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import browser
from protoseg_jax.errors import UserError
from protoseg_jax.evaluation.score import evaluate, measure
from protoseg_jax.explain.model import Model
from protoseg_jax.explain.page import explain_run
from protoseg_jax.files import write_json
from protoseg_jax.models.directions import NO_CLASS
from protoseg_jax.prototypes import directions
from protoseg_jax.run.finished import Finished
from protoseg_jax.run.workdir import Workdir
from protoseg_jax.training import removal
from protoseg_jax.training import run as runs
from protoseg_jax.training import start as starts
from tests import small
from tests.explain.test_page import ROWS, opened

D = 8


def network(seed, points=60, size=5, classes=3):
    rng = np.random.default_rng(seed)
    u = directions.random_rotation(size, seed)
    z, w, b = (rng.normal(size=s) for s in ((points, size), (size, classes), (classes,)))
    return u, z, w, b


# -- the mathematics ---------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_entries_are_exact_sums_with_classes_by_what_they_add(seed):
    u, z, w, b = network(seed)
    vectors, kernel, classes = directions.entries(u, w, b, z)
    s = np.concatenate([z @ vectors[:-1].T, np.ones((len(z), 1))], 1)
    np.testing.assert_allclose(s @ kernel, z @ w + b, atol=1e-9)
    predicted = [int(np.argmax(row)) for row in z @ w + b]
    for d in range(len(u)):
        adds = {}
        for c in set(predicted):
            terms = []
            for n in range(len(z)):
                if predicted[n] == c:
                    zu = sum(z[n, i] * u[i, d] for i in range(len(u)))
                    uw = sum(u[i, d] * w[i, c] for i in range(len(u)))
                    terms.append(zu * uw)
                    assert s[n, d] * kernel[d, c] == pytest.approx(zu * uw, abs=1e-9)
            adds[c] = sum(terms) / len(terms)
        assert adds[classes[d]] == pytest.approx(max(adds.values()))
        assert kernel[d, classes[d]] == pytest.approx(1)  # s is what it adds to its own class
    np.testing.assert_array_equal(kernel[-1], b)
    assert not vectors[-1].any()


def literal_information(u, z, w, predicted, probability):
    """H(d) − H(d | n), one logarithm after another."""
    of_points, use = 0.0, np.zeros(len(u))
    for n, c in enumerate(predicted):
        parts = [abs((z[n] @ u[:, d]) * (u[:, d] @ w[:, c])) for d in range(len(u))]
        shares = [p / sum(parts) for p in parts]
        of_points -= probability[n] * sum(q * np.log(q) for q in shares if q > 0)
        use += probability[n] * np.array(shares)
    return -sum(q * np.log(q) for q in use if q > 0) - of_points


def test_information_is_its_literal_sum_and_so_is_its_gradient():
    u, z, w, b = network(3)
    predicted = (z @ w + b).argmax(1)
    probability = np.random.default_rng(0).dirichlet(np.ones(len(z)))
    with jax.enable_x64(True):
        value, gradient = jax.jit(jax.value_and_grad(directions.information))(
            *map(jnp.asarray, (u, z, w, predicted, probability))
        )
    assert value == pytest.approx(literal_information(u, z, w, predicted, probability), abs=1e-7)
    for at in ((0, 0), (2, 3), (4, 1)):
        step = np.zeros_like(u)
        step[at] = 1e-6
        higher, lower = (
            literal_information(u + sign * step, z, w, predicted, probability) for sign in (1, -1)
        )
        assert gradient[at] == pytest.approx((higher - lower) / 2e-6, rel=1e-4, abs=1e-6)


def test_information_is_most_where_one_direction_decides_each_point_and_all_are_used():
    """The logarithm of the number of directions; one direction for all points has 0."""
    n = 6
    z, w = np.eye(n), np.ones((n, 2))
    arguments = w, np.zeros(n, int), np.full(n, 1 / n)
    information = jax.jit(directions.information)
    most = float(information(np.eye(n), z, *arguments))
    assert most == pytest.approx(np.log(n), abs=1e-4)
    one = float(information(np.eye(n), np.eye(n)[[0] * n], *arguments))
    assert one == pytest.approx(0, abs=1e-4)
    for seed in range(5):
        turned = float(information(directions.random_rotation(n, seed), z, *arguments))
        assert turned < most - 0.1


@given(st.integers(0, 10**6), st.integers(2, 9))
@settings(max_examples=20, deadline=None)
def test_rotations_are_orthogonal(seed, size):
    u = directions.random_rotation(size, seed)
    np.testing.assert_allclose(u @ u.T, np.eye(size), atol=1e-12)
    noisy = u + 1e-6 * np.random.default_rng(seed).normal(size=u.shape)
    near = directions.nearest_rotation(noisy)
    np.testing.assert_allclose(near @ near.T, np.eye(size), atol=1e-12)
    assert np.abs(near - u).max() < 1e-5


# -- a run -------------------------------------------------------------------------------------


def make_config(root, head, **changes):
    config = small.make_config(root)
    model = {"backbone": "efficientnet", "depth": 0, "norm": "frozen_batch", "stages": (1, 2)}
    config.model.update({**model, "width": 8, "head": head})
    training = {"steps": 3, "schedule": "constant", "learning_rates": {"decoder": 3e-3}}
    config.phases.warmup, config.phases.joint = {**training, "steps": 0}, {**training, "steps": 20}
    config.phases.finetune.steps = config.phases.finetune_pruned.steps = 0
    config.phases.directions.steps = 60
    config.batch_size = 8
    config.update(changes)
    return config


def begin(config, path):
    live = small.begin(config, path)
    runs.go(live, runs.check(live.experiment, new=True))
    live.workdir.release()
    return live


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with data and a trained twin."""
    folder = tmp_path_factory.mktemp("directions")
    small.make_data(folder / "own")
    begin(make_config(folder, "linear"), folder / "twin")
    return folder


@pytest.fixture(scope="module")
def explained(root):
    """The folders of its explanations, by the kind of U."""
    found = {}
    for kind in ("trained", "identity", "random"):
        config = make_config(root, "directions", pretrained={"path": str(root / "twin")})
        config.model.directions = kind
        found[kind] = root / kind
        if kind == "trained":
            begin(config, root / kind)
            continue
        live = small.begin(config, root / kind)  # the phase alone, neither scored nor drawn
        start = starts.initial(live.experiment)
        live.workdir.checkpoints.save(directions.run(live, live.experiment.phases[0], start))
        live.workdir.checkpoints.wait()
        write_json(live.workdir.path / "classes.json", vars(live.experiment.labels))
        live.workdir.release()
    return found


def outputs(path, images):
    run = Finished.load(path)
    infer = jax.jit(run.inference)
    return jax.tree.map(np.asarray, infer(run.checkpoint.variables, images))


@pytest.fixture(scope="module")
def images(root):
    run = Finished.load(root / "twin")
    source = run.experiment.data.source("train")
    return np.stack([run.inference.prepare(source[n]["image"]) for n in range(3)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trained", "identity", "random"])
def test_the_network_says_what_it_said(root, explained, images, kind):
    before, after = outputs(root / "twin", images), outputs(explained[kind], images)
    assert np.abs(before.logits).max() > 0.5
    assert np.abs(after.logits - before.logits).max() <= 1e-5 * np.abs(before.logits).max()
    np.testing.assert_array_equal(after.features, before.features)
    run = Finished.load(explained[kind])
    sums = after.similarities @ run.kernel
    np.testing.assert_allclose(sums, after.logits, atol=1e-5 * np.abs(sums).max())
    vectors = run.checkpoint.arrays["params"]["prototypes"]["vectors"][:-1].astype(np.float64)
    u = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(u @ u.T, np.eye(D), atol=1e-5)
    if kind == "identity":
        np.testing.assert_allclose(np.abs(u), np.eye(D), atol=1e-6)
    if kind == "trained":
        both = Finished.load(root / "twin"), run
        scores = [evaluate(x.experiment, x.checkpoint, "validation", overlap=False) for x in both]
        assert scores[0] == scores[1]


@pytest.mark.slow
def test_training_raises_the_information(root, explained):
    live = small.experiment(make_config(root, "linear"))
    run = Finished.load(root / "twin")
    source, inference = live.source("train"), run.inference
    images = np.stack([inference.prepare(source[n]["image"]) for n in range(len(source))])
    z = outputs(root / "twin", images).features.reshape(-1, D)
    head = run.checkpoint.arrays["params"]["head"]
    w, b = (np.asarray(head[n], np.float64) for n in ("kernel", "bias"))
    predicted = (z @ w + b).argmax(1)
    counts = np.bincount(predicted, minlength=3)
    probability = 1 / (counts[predicted] * (counts > 0).sum())
    values = {}
    for kind, path in explained.items():
        vectors = Finished.load(path).checkpoint.arrays["params"]["prototypes"]["vectors"][:-1]
        u = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).T
        values[kind] = float(directions.information(u, z, w, predicted, probability))
    assert values["trained"] > max(values["identity"], values["random"]) + 0.05


@pytest.mark.slow
def test_each_direction_has_the_patch_where_it_adds_most(root, explained):
    run = Finished.load(explained["trained"])
    prototypes = run.checkpoint.prototypes
    assert [p.index for p in prototypes] == list(range(D + 1))
    assert prototypes[-1].class_ == NO_CLASS and not prototypes[-1].projected
    source, infer = run.experiment.data.source("train"), jax.jit(run.inference)
    strongest = np.full(D, -np.inf)
    at = {}
    for n in range(len(source)):
        example = source[n]
        image = run.inference.prepare(example["image"])
        s = np.asarray(infer(run.checkpoint.variables, image[None]).similarities)[0]
        h, w = s.shape[:2]
        height, width = example["label"].shape
        for row in range(h):
            for col in range(w):
                y, x = (2 * row + 1) * height // (2 * h), (2 * col + 1) * width // (2 * w)
                if example["label"][y, x] == 255:
                    continue
                for d in range(D):
                    if s[row, col, d] > strongest[d]:
                        strongest[d], at[d] = s[row, col, d], (n, row, col)
    assert [(p.image, p.row, p.col) for p in prototypes[:-1]] == [at[d] for d in range(D)]
    record = json.loads((explained["trained"] / "prototypes.json").read_text())
    assert [p["index"] for p in record["prototypes"]] == list(range(D))
    assert all((explained["trained"] / "prototypes" / f"{d:03d}.png").exists() for d in range(D))


@pytest.mark.slow
def test_evidence_and_measures(explained, images):
    model = Model.load(explained["trained"])
    why = model.explain(images[0])
    for row, col in ((0, 0), (20, 31), (48, 56)):
        pixel = why.at(row, col)
        label = pixel.logits.argmax()
        assert pixel.contributions.sum() == pytest.approx(pixel.logits[label], abs=1e-4)
        assert pixel.similarities[-1] == pytest.approx(1)  # the bias, at every pixel
        assert pixel.contributions[-1] == pytest.approx(model.kernel[-1, label], abs=1e-5)
    found = measure(model.experiment, model.checkpoint, "validation")
    assert found["bypass"] == 0
    assert 0 < found["sparsity"] <= D + 1 and found["faithfulness"] is not None
    assert found["unused"] <= D and len(found["wins"]) == D + 1 and found["wins"][-1] == 0
    assert found["reach"]["prototypes"][-1] is None
    assert "stability" in found


@pytest.mark.slow
def test_the_page_says_what_it_explains(explained, tmp_path):
    page = explain_run(str(explained["trained"]), "validation", [], str(tmp_path / "page"))
    text = (page.parent / "data" / "run.js").read_text()
    record = json.loads(text[text.index("{") : text.rindex("}") + 1])
    assert record["kind"] == "direction" and record["similarity"] == "linear"
    assert f"{D} directions" in record["facts"]
    assert any("post hoc" in note for note in record["notes"])
    assert [p["class"] for p in record["prototypes"]][-1] == NO_CLASS
    assert all("patch" in p for p in record["prototypes"][:-1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [browser.Chromium, browser.Firefox], ids=lambda k: k.name)
def test_the_page_in_a_browser_shows_what_the_api_says(explained, tmp_path, kind):
    page = explain_run(str(explained["trained"]), "validation", [], str(tmp_path / "page"))
    model = Model.load(explained["trained"])
    why = model.explain(model.experiment.data.source("validation")[0]["image"])
    with opened(kind) as window:
        window.open(page, "image=0&row=20&col=31")
        pixel = why.at(20, 31)
        shown = window.evaluate(ROWS)
        assert D in [index for index, _ in shown]  # the bias, among few
        for index, part in shown:
            assert part == pytest.approx(pixel.contributions[index], abs=1e-4)
        total = window.evaluate("document.querySelector('#total data').value")
        assert float(total) == pytest.approx(pixel.logits.max(), abs=1e-4)
        text = window.evaluate("document.body.innerText")
        assert "direction" in text and "prototype" not in text.replace("without prototypes", "")
        assert "Novelty" not in text and "NaN" not in text and "undefined" not in text
        window.press("6")  # there are five layers
        assert "undefined" not in window.evaluate("location.hash")
        window.open(page, "view=prototypes")
        text = window.evaluate("document.body.innerText")
        assert f"Direction {0}" in text and "adds most" in text and "undefined" not in text
        assert window.problems == []


@pytest.mark.slow
def test_removing_a_direction_takes_away_what_it_added_and_nothing_else(
    explained, images, tmp_path
):
    origin = Finished.load(explained["trained"])
    classes = [p.class_ for p in origin.checkpoint.prototypes]
    gone = next(d for d in range(D) if classes.count(classes[d]) > 1)
    everything = list(map(str, range(D)))
    with pytest.raises(UserError, match="nothing would argue for it any more"):
        removal.remove(str(explained["trained"]), everything, str(tmp_path / "x"), force=True)
    with pytest.raises(UserError, match=f"no prototype {D}"):
        removal.remove(str(explained["trained"]), [str(D)], str(tmp_path / "x"), force=False)
    removal.remove(str(explained["trained"]), [str(gone)], str(tmp_path / "less"), force=False)
    before, after = outputs(explained["trained"], images), outputs(tmp_path / "less", images)
    kept = [d for d in range(D + 1) if d != gone]
    np.testing.assert_allclose(after.similarities, before.similarities[..., kept], atol=1e-5)
    taken = before.similarities[..., gone, None] * origin.kernel[gone]
    np.testing.assert_allclose(after.logits, before.logits - taken, atol=1e-4)
    less = Finished.load(tmp_path / "less")
    assert [p.index for p in less.checkpoint.prototypes] == kept
    assert [e["phase"] for e in Workdir(tmp_path / "less").summary()] == ["directions"]


@pytest.mark.slow
def test_what_cannot_be_taken_apart_is_refused_with_the_reason(root, explained, tmp_path):
    def start(path, **changes):
        config = make_config(root, "directions", pretrained={"path": path}, **changes)
        return starts.initial(small.experiment(config))

    with pytest.raises(UserError, match="set --config.pretrained.path"):
        start(None)
    with pytest.raises(UserError, match="set --config.pretrained.path"):
        start(str(tmp_path / "weights.pth"))
    with pytest.raises(UserError, match="explains itself"):
        start(str(explained["identity"]))
    with pytest.raises(UserError, match="has another model.features"):
        start(str(root / "twin"), model={"features": D + 1})
    with pytest.raises(UserError, match="has another model.backbone"):
        start(str(root / "twin"), model={"backbone": "unet", "depth": 1, "output_stride": 1})
    with pytest.raises(UserError, match="its decoder says the logits itself"):
        config = make_config(root, "directions", model={"backbone": "unet", "depth": 1})
        config.model.output_stride = 1
        small.experiment(config).inference([])
    with pytest.raises(UserError, match="has another model.output_stride, model.stages"):
        start(str(root / "twin"), model={"output_stride": 16, "stages": (1, 3)})
    with pytest.raises(UserError, match="has another eval_size"):
        start(str(root / "twin"), eval_size=(64, 64))
    with pytest.raises(UserError, match="learning_rates.prototypes is missing or 0"):
        start(str(root / "twin"), phases={"directions": {"learning_rates": {"prototypes": 0.0}}})
    unet = make_config(root, "linear")
    unet.model.update({"backbone": "unet", "depth": 1, "output_stride": 2})
    live = small.begin(unet, tmp_path / "unet")
    first = starts.initial(live.experiment)
    live.workdir.checkpoints.save(dataclasses.replace(first, phase="joint", step=20))
    live.workdir.checkpoints.wait()
    live.workdir.release()
    with pytest.raises(UserError, match="no last layer sums over features"):
        start(str(tmp_path / "unet"))
    with pytest.raises(UserError, match="model.directions"):
        start(str(root / "twin"), model={"directions": "best"})
