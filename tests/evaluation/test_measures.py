"""The measures against literal NumPy versions; permutations, ranges, N devices = 1 device."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import novelty as novelty_benchmark
from protoseg_jax import models
from protoseg_jax.config import default
from protoseg_jax.data.labels import VOID
from protoseg_jax.devices import DevicePool
from protoseg_jax.errors import UserError
from protoseg_jax.evaluation import (
    bypass,
    faithfulness,
    novelty,
    reach,
    report,
    score,
    sparsity,
    utilisation,
)
from protoseg_jax.inference import Inference
from protoseg_jax.models import preprocessing
from protoseg_jax.models.protoseg import Output, ProtoSeg

CLASSES = np.array([0, 0, 0, 1, 1, 2])  # of the prototypes; class 3 has none
C, M, K = 4, len(CLASSES), 5
SEEDS = st.integers(0, 2**32 - 1)


def example(seed, h=6, w=7):
    """(similarities, logits, kernel, labels) with void, of one image."""
    rng = np.random.default_rng(seed)
    similarities = rng.gamma(1.0, 2.0, (h, w, M)).astype(np.float32)
    kernel = np.where(CLASSES[:, None] == np.arange(C), 1.0, -0.5) + rng.normal(0, 0.1, (M, C))
    kernel = kernel.astype(np.float32)
    labels = rng.choice([0, 1, 2, 3, VOID], (h, w))
    return similarities, similarities @ kernel, kernel, labels


def slow_wins(similarities, labels):
    counts = np.zeros(M, int)
    for row, col in np.ndindex(labels.shape):
        own = np.flatnonzero(CLASSES == labels[row, col])
        if len(own):
            counts[own[np.argmax(similarities[row, col, own])]] += 1
    return counts


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_wins(seed):
    similarities, _, _, labels = example(seed)
    got = utilisation.wins(similarities, labels, CLASSES)
    np.testing.assert_array_equal(got, slow_wins(similarities, labels))
    assert got.sum() == np.isin(labels, CLASSES).sum()


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_prototypes_needed(seed):
    similarities, logits, kernel, _ = example(seed)
    got = np.asarray(sparsity.prototypes_needed(similarities, logits, kernel))
    for place in np.ndindex(got.shape):
        winner = logits[place].argmax()
        shares = sorted((x for x in similarities[place] * kernel[:, winner] if x > 0), reverse=True)
        total, count = 0.0, 0
        while shares and total < 0.95 * sum(shares):
            total += shares[count]
            count += 1
        assert got[place] == count
    order = np.random.default_rng(seed).permutation(M)
    moved = sparsity.prototypes_needed(similarities[..., order], logits, kernel[order])
    np.testing.assert_array_equal(moved, got)


def test_nothing_needed_where_nothing_speaks_for_the_winner():
    needed = sparsity.prototypes_needed(np.ones((1, 2)), np.zeros((1, 2)), -np.ones((2, 2)))
    assert needed.tolist() == [0]


by_margin, survivors = jax.jit(faithfulness.by_margin), jax.jit(faithfulness.survivors)


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_survivors_and_their_orders(seed):
    similarities, logits, kernel, _ = example(seed)
    similarities, logits = (x.reshape(-1, x.shape[-1]) for x in (similarities, logits))
    order = np.asarray(by_margin(similarities, kernel))
    got = np.asarray(survivors(similarities, kernel, order))
    assert got.shape == (len(similarities), M + 1)
    for point, values in enumerate(similarities):
        first, second = np.argsort(-logits[point])[:2]
        margins = values * (kernel[:, first] - kernel[:, second])
        assert (np.diff(margins[order[point]]) <= 1e-5).all()
        for k in range(M + 1):
            left = np.setdiff1d(np.arange(M), order[point, :k])
            rest = values[left] @ kernel[left]
            others = np.delete(rest, first)
            if abs(rest[first] - others.max()) > 1e-4:  # else rounding decides
                assert got[point, k] == (rest[first] > others.max())
    assert got[:, 0].all() and not got[:, -1].any()


class Blocks(nn.Module):
    """An image's means over blocks of 4×4."""

    def __call__(self, images):
        b, h, w, _ = images.shape
        return images.reshape(b, h // 4, 4, w // 4, 4, 3).mean((2, 4))


class Model:
    """Features are block means of the image; prototypes are points of colour space."""

    backbone, decoder, scales = Blocks(), staticmethod(lambda maps: maps), ()
    prototypes = np.random.default_rng(5).uniform(-1, 1, (M, 3)).astype(np.float32)
    seen = 0  # how often it was traced

    def apply(self, variables, images):
        self.seen += 1
        features = self.backbone(images)
        distances = jnp.square(features[..., None, :] - self.prototypes).sum(-1)
        similarities = jnp.log((distances + 1) / (distances + 1e-4))
        kernel = variables["params"]["head"]["kernel"]
        return Output(features, distances, similarities, similarities @ kernel)


MODEL = Model()  # one, so that what is compiled for it is shared
CHECKPOINT = SimpleNamespace(
    variables={"params": {"head": {"kernel": example(0)[2]}}}, prototypes=CLASSES
)


def split(count=5, size=(24, 28), seed=0):
    """A source of images in blocks with labels and parts, and its batches of four."""
    rng = np.random.default_rng(seed)
    source = []
    for _ in range(count):
        blocks = rng.choice([0, 1, 2, 3, VOID], (6, 7), p=[0.3, 0.25, 0.2, 0.15, 0.1])
        label = blocks.repeat(4, 0).repeat(4, 1).astype(np.uint8)
        own = np.where(label < 2, rng.integers(0, 3, (6, 7)).repeat(4, 0).repeat(4, 1), 0)
        own = np.where((label == 1) & (own > 0), own + 2, own).astype(np.uint8)
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        source.append({"image": image, "label": label, "parts": own})
    batches = []
    for start in range(0, count, 4):
        numbers = [n if n < count else -1 for n in range(start, start + 4)]
        rows = [source[max(n, 0)] for n in numbers]
        batches.append(
            {
                "image": np.stack([r["image"] for r in rows]),
                "label": np.stack([r["label"] for r in rows]),
                "size": np.tile(np.array(size, np.int32), (4, 1)),
                "index": np.array(numbers, np.int32),
            }
        )
    return source, batches


def experiment(devices, void=VOID, part_names=("none", *"abcde"), names=None, model=MODEL):
    """The split as an experiment, the labels of a class made void."""
    source, batches = split()
    for batch in batches:
        batch["label"][batch["label"] == void] = VOID
    normalise = preprocessing.KNOWN["imagenet"]
    config = default()
    config.measures = names or config.measures
    config.crop_size = (16, 28)
    return SimpleNamespace(
        labels=SimpleNamespace(names=("no", "one", "two", "three")),
        pool=DevicePool(jax.local_devices()[:devices]),
        config=config,
        held_out=None,
        trains_prototypes=True,
        data=SimpleNamespace(part_names=part_names),
        examples=lambda split: source,
        eval_batches=lambda split, held_out=False: batches,
        inference=lambda classes: Inference(model, normalise, (24, 28), tuple(classes), C),
    )


def measured(devices, held_out=None, **changes):
    """All measures of the split."""
    return score.measure(experiment(devices, **changes), CHECKPOINT, "validation", novel=held_out)


def test_a_whole_split_against_a_literal_pass():
    """All measures but the sampled ones, image after image in NumPy; a filling counts nothing."""
    source, _ = split()
    kernel = CHECKPOINT.variables["params"]["head"]["kernel"]
    normalise = preprocessing.KNOWN["imagenet"].normalise
    counts, needed, novelty, held = np.zeros(M, int), [], [], []
    reached, present = np.zeros(M), np.zeros(M)
    for item in source:
        normalised = normalise(item["image"][None])
        output = MODEL.apply(CHECKPOINT.variables, normalised)
        output = jax.tree.map(lambda x: np.asarray(x[0]), output)
        labels = item["label"][2::4, 2::4]
        wins = slow_wins(output.similarities, labels)
        counts += wins
        points = np.array([(labels == c).sum() for c in CLASSES])
        reached += wins >= np.maximum(0.05 * points, 1)
        present += points > 0
        here = np.asarray(sparsity.prototypes_needed(output.similarities, output.logits, kernel))
        needed += here[(labels != VOID) & (labels != 3)].tolist()  # 3 is held out
        novelty += output.distances.min(-1)[labels != VOID].tolist()
        held += (labels == 3)[labels != VOID].tolist()
    got = measured(1, held_out=3)
    assert got["wins"] == counts.tolist() and got["unused"] == (counts == 0).sum()
    entropies = []
    for c in (0, 1):  # class 2 has one prototype
        share = counts[CLASSES == c] / counts[CLASSES == c].sum()
        entropies.append(-sum(p * np.log(p) for p in share if p) / np.log(len(share)))
    assert got["utilisation"] == pytest.approx(np.mean(entropies))
    assert got["sparsity"] == pytest.approx(np.mean([n for n in needed if n]))
    assert got["reach"]["prototypes"] == pytest.approx(reached / present)
    assert got["reach"]["mean"] == pytest.approx(np.mean(reached / present))
    middle = np.sort(reached / present)[2:4].mean()
    assert got["reach"]["median"] == pytest.approx(middle)
    novelty, held = np.array(novelty), np.array(held)
    above = novelty[held][:, None] > novelty[~held]
    assert got["novelty_auroc"] == pytest.approx(above.mean())
    for curve in (got["survival"], got["random_survival"]):
        assert curve[0] == 1.0 and curve[-1] == 0.0 and len(curve) == M + 1
    area = np.mean(np.array(got["random_survival"]) - np.array(got["survival"]))
    assert got["faithfulness"] == pytest.approx(area) and area > 0


def test_devices_do_not_matter():
    one, four = measured(1, held_out=3), measured(4, held_out=3)
    assert one.pop("bypass") == pytest.approx(four.pop("bypass"))  # a sum of float32
    assert one == four
    one, four = (score.evaluate(experiment(n), CHECKPOINT, "validation") for n in (1, 4))
    assert one["iou"] == four["iou"] and 0 < one["overlap"] < 1
    for key in ("miou", "overlap", "overlap_pooled"):
        assert one[key] == pytest.approx(four[key])


def test_the_network_is_asked_once_and_measuring_again_compiles_nothing():
    model = Model()
    changes = {"names": ("sparsity", "stability"), "model": model}
    measured(1, **changes)
    assert model.seen == 2  # also for the noisy image of stability
    score.evaluate(experiment(1, model=model), CHECKPOINT, "validation", overlap=False)
    assert model.seen == 3
    measured(1, **changes)
    again = score.evaluate(experiment(1, model=model), CHECKPOINT, "validation", overlap=False)
    assert model.seen == 3
    assert [*again][-2:] == ["overlap", "overlap_pooled"] and again["overlap"] is None


def test_utilisation_is_1_when_shared_alike_and_0_when_one_wins_all():
    result = utilisation.figures(np.array([5, 5, 5, 8, 0, 3]), CLASSES)
    assert result["utilisation"] == pytest.approx((1.0 + 0.0) / 2)
    assert result["unused"] == 1


def test_nothing_is_measured_where_no_point_has_a_class():
    result = utilisation.figures(np.zeros(M, int), CLASSES)
    assert result == {"utilisation": None, "unused": M, "wins": [0] * M}
    assert sparsity.make(None).finish((0, 0)) == {"sparsity": None}
    curve = np.zeros(M + 1, int)
    assert set(faithfulness.figures((curve, curve, 0)).values()) == {None}
    nothing = {"reached": np.zeros(M, int), "present": np.zeros(C, int)}
    found = reach.figures(nothing, CLASSES)["reach"]
    assert found.pop("prototypes") == [None] * M and set(found.values()) == {None}


MINE = """
from protoseg_jax.evaluation.measures import Measure

TITLES = (("red", "redness", 100),)

def make(context):
    def step(seen):
        image = seen.batch["image"][..., 0] / 255
        return {"red": (image * (seen.batch["index"] >= 0)).sum(), "pixels": seen.batch["twice"]}

    def inputs(batch):
        return {"twice": 2 * (batch["index"] >= 0) * batch["label"][0].size}

    return Measure(step, lambda sums: {"red": 2 * sums["red"] / sums["pixels"]}, inputs=inputs)
"""


def test_a_measure_is_one_file_anywhere(tmp_path, monkeypatch):
    (tmp_path / "my_measures").mkdir()
    (tmp_path / "my_measures" / "redness.py").write_text(MINE)
    (tmp_path / "my_measures" / "empty.py").write_text("TITLES = ()")
    monkeypatch.syspath_prepend(tmp_path)
    names = ("sparsity", "my_measures.redness")
    result = measured(2, names=names)
    assert [*result] == ["sparsity", "red"]
    expected = np.mean([example["image"][..., 0] / 255 for example in split()[0]])
    assert result["red"] == pytest.approx(expected)
    assert report.measure_lines(result, names)[1] == f"redness  {100 * expected:.2f} %"
    for name, words in {
        "my_measures.empty": "has no 'make'",
        "my_measures.absent": "unknown|does not import",
        "sparsly": "unknown; choose one of .*sparsity",
        "score": "has no 'TITLES'",
    }.items():
        with pytest.raises(UserError, match=f"measures='{name}'.*({words})"):
            measured(1, names=(name,))


def test_a_held_out_class_counts_for_novelty_alone():
    """As if its points were void: the sums are those of labels without it."""
    with_it = measured(1, held_out=3)
    with_it.pop("novelty_auroc")
    assert with_it == measured(1, void=3)


class Leaky(ProtoSeg):
    """A head with a way around its prototypes."""

    def classify(self, maps):
        output = super().classify(maps)
        return output.replace(logits=output.logits + maps[..., : self.num_classes])


@pytest.mark.parametrize(
    "kind", ["prototypes", "linear", "leaky", pytest.param("msc", marks=pytest.mark.slow)]
)
def test_nothing_bypasses_the_prototypes(kind):
    """Exactly nothing of ProtoSeg's response to an image; all of the black box's; some of a head
    that looks at the features too."""
    c = default().model
    c.update({"backbone": "unet", "depth": 2, "width": 4, "output_stride": 4, "features": 6})
    c.msc = (0.5,) if kind == "msc" else ()
    c.remat = kind == "msc"
    c.head = "linear" if kind == "linear" else "prototypes"
    model = models.build(c, C, M, jnp.float32)
    if kind == "leaky":
        own = [f.name for f in dataclasses.fields(model) if f.name not in ("parent", "name")]
        model = Leaky(**{name: getattr(model, name) for name in own})
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    images = image[None].astype(np.float32) / 255
    variables = jax.jit(model.init)(jax.random.key(1), images)
    inference = Inference(model, preprocessing.KNOWN["imagenet"], (32, 48), tuple(CLASSES), C)
    held, whole = jax.jit(functools.partial(bypass.responses, inference))(
        variables, image, jax.random.key(2)
    )
    assert whole > 0
    if kind == "leaky":
        assert 0 < held != whole
    else:
        assert held == (whole if kind == "linear" else 0.0)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=40))
def test_auroc_counts_pairs(pairs):
    scores, positive = np.array([s for s, _ in pairs]), np.array([p for _, p in pairs])
    wins = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    got = novelty.auroc(scores, positive)
    assert got == (pytest.approx(np.mean(wins)) if wins else None)


def test_distances_to_a_class_s_gaussian():
    """Of moments added in parts, against the inverse covariance written out."""
    rng = np.random.default_rng(0)
    x, away = rng.normal(size=(50, 4)) @ rng.normal(size=(4, 4)), rng.normal(size=(3, 4))
    moments = novelty_benchmark.Moments.nothing(4)
    for part in (x[:20], x[20:]):
        moments.add(part)
    for part in (slice(None), slice(1, 3)):
        y, at = x[:, part], away[:, part]
        covariance = np.cov(y.T, bias=True)
        covariance += 1e-3 * covariance.diagonal().mean() * np.eye(len(covariance))
        expected = [(a - y.mean(0)) @ np.linalg.inv(covariance) @ (a - y.mean(0)) for a in at]
        np.testing.assert_allclose(moments.mahalanobis(away, part), expected, rtol=1e-8)
