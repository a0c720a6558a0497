"""The measures of parts and their controls against literal NumPy versions."""

import itertools
import math
from fractions import Fraction
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import cluster

from benchmarks import part_table, position
from protoseg_jax.data.labels import VOID
from protoseg_jax.errors import UserError
from protoseg_jax.evaluation import consistency, part_agreement, parts, report, stability
from protoseg_jax.evaluation.measures import Context, Seen
from protoseg_jax.evaluation.overlap import top
from protoseg_jax.models import preprocessing
from tests.evaluation.test_measures import (
    CHECKPOINT,
    CLASSES,
    MODEL,
    SEEDS,
    C,
    K,
    M,
    Model,
    example,
    experiment,
    measured,
    split,
)

PART_CLASSES = np.array([0, 0, 1, 1, -1])  # of the five parts of `split`


def slow_hits(similarities, labels, centroids, classes=CLASSES):
    """Which prototype's active points contain a centroid of which part of its class."""
    hits = np.zeros((K, len(classes)), bool)
    for j, c in enumerate(classes):
        values = similarities[..., j].astype(np.float64)[labels == c]
        if len(values):
            active = (labels == c) & (similarities[..., j] >= np.quantile(values, 0.8))
            for part, row, col in centroids:
                hits[part, j] |= active[row, col] and PART_CLASSES[part] == c
    return hits


def slow_nearness(labels):
    """Of each class and cell, minus the squared distance to the cell's middle, in cells."""
    maps = np.full((*labels.shape, C, 3, 3), -np.inf, np.float32)
    for c in range(C):
        rows, cols = np.nonzero(labels == c)
        if len(rows):
            height, width = np.ptp(rows) + 1, np.ptp(cols) + 1
            for row, col, i, j in itertools.product(*map(range, (*labels.shape, 3, 3))):
                y = 3 * (row + 0.5 - rows.min()) / height
                x = 3 * (col + 0.5 - cols.min()) / width
                maps[row, col, c, i, j] = -((y - i - 0.5) ** 2) - (x - j - 0.5) ** 2
    return maps.reshape(*labels.shape, -1)


def slow_cell(labels, row, col):
    """The cell of a point in the 3 × 3 grid over its class's box."""
    rows, cols = np.nonzero(labels == labels[row, col])
    place = (
        (row - rows.min() + 0.5) / (np.ptp(rows) + 1),
        (col - cols.min() + 0.5) / (np.ptp(cols) + 1),
    )
    return int(place[0] * 3) * 3 + int(place[1] * 3)


def seen(labels, centroids, similarities):
    """One image as a measure sees it."""
    inference = SimpleNamespace(classes=CLASSES, num_classes=C)
    batch = {"centroids": centroids, "part_classes": PART_CLASSES}
    output = SimpleNamespace(similarities=similarities)
    return Seen(inference, None, batch, output, labels, labels != VOID, jax.random.key(0))


@jax.jit
def looked_at(labels, centroids, similarities, key):
    image = seen(labels, centroids, similarities)
    drawn = parts.random_prototypes(image, key)
    return parts.hits(similarities, image), parts.nearness(image), parts.cells(image), drawn


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_hits(seed):
    similarities, _, _, labels = example(seed)
    rng = np.random.default_rng(seed)
    centroids = [(rng.integers(K), rng.integers(6), rng.integers(7)) for _ in range(9)]
    padded = np.array([*centroids, (-1, 0, 0), (-1, 0, 0)])
    found = looked_at(labels, padded, similarities, jax.random.key(seed))
    hits, near, cells, drawn = map(np.asarray, found)
    np.testing.assert_array_equal(hits, slow_hits(similarities, labels, centroids))
    for c in set(labels.ravel().tolist()) - {VOID}:
        np.testing.assert_allclose(
            near[..., 9 * c : 9 * c + 9], slow_nearness(labels)[..., 9 * c : 9 * c + 9], atol=1e-5
        )
    for row, col in zip(*np.nonzero(labels != VOID), strict=True):
        assert cells[row, col] == slow_cell(labels, row, col)
    with_prototypes = np.isin(labels, CLASSES)
    np.testing.assert_array_equal(CLASSES[drawn[with_prototypes]], labels[with_prototypes])
    assert (drawn[labels == 3] == -1).all()


def test_places_that_mirror_each_other_are_equally_near():
    """What is active is what exact fractions say: float32 would break ties at random."""
    for height, width in ((5, 7), (6, 6), (10, 9)):
        labels = np.full((12, 12), VOID)
        labels[1 : 1 + height, 2 : 2 + width] = 0
        near = np.asarray(near_alone(labels))
        for cell in range(9):
            i, j = divmod(cell, 3)
            exact = {
                (y + 1, x + 2): -((Fraction(3 * (2 * y + 1), 2 * height) - i - half) ** 2)
                - (Fraction(3 * (2 * x + 1), 2 * width) - j - half) ** 2
                for y, x in np.ndindex(height, width)
            }
            ordered = sorted(exact.values())
            last = len(ordered) - 1
            expected = {p for p, value in exact.items() if value >= ordered[last - last // 5]}
            active = np.argwhere(top_fifth(near[..., cell], labels == 0))
            assert set(map(tuple, active.tolist())) == expected


half = Fraction(1, 2)
top_fifth = jax.jit(lambda near, inside: top(near, inside, 5))
near_alone = jax.jit(
    lambda labels: parts.nearness(
        SimpleNamespace(labels=labels, inference=SimpleNamespace(num_classes=1))
    )
)


def test_centroids_of_components():
    image = np.zeros((20, 40), np.uint8)
    image[2:5, 3:8] = 2  # middle (3, 5)
    image[10:19, 30:33] = 2  # middle (14, 31)
    image[0, 39] = 4
    image[6] = VOID
    found = parts.centroids_of(image, (5, 10))
    assert sorted(found) == [(1, 0, 1), (1, 3, 7), (3, 0, 9)]
    assert parts.centroids_of(np.zeros((3, 3), np.uint8), (2, 2)) == []


def test_the_oracle_allots_by_area():
    found = parts.Census(np.array([0, 0, 0, 1, 1, 2, -1]), np.array([10, 600, 90, 7, 8, 5, 0]))
    owners = parts.allot(found, np.array([0] * 8 + [1] + [3]))
    rows = [[j for j in row if j >= 0] for row in owners.tolist()]
    assert list(map(len, rows)) == [1, 6, 1, 1, 1, 0, 0]
    assert sorted(sum(rows[:3], [])) == list(range(8))
    assert rows[3] == rows[4] == [8]  # one prototype for two parts
    key = jax.random.key(0)
    image = SimpleNamespace(batch={"allotted": owners})
    part = np.arange(5).repeat(40).reshape(10, 20)
    drawn = np.asarray(parts.oracle_prototypes(image, part, key))
    assert all(set(drawn[part == k].tolist()) == set(rows[k]) for k in range(5))


def test_a_whole_split_against_a_literal_pass():
    """Image after image in NumPy; a filling counts nothing."""
    source, _ = split()
    normalise = preprocessing.KNOWN["imagenet"].normalise
    of_cells = np.arange(C).repeat(9)
    hits, by_place = np.zeros((K, M), int), np.zeros((K, 9 * C), int)
    by_oracle, visible = np.zeros(K, int), np.zeros(K, int)
    tables = {"prototype": np.zeros((K, M), int), "position": np.zeros((K, 9), int)}
    for item in source:
        output = MODEL.apply(CHECKPOINT.variables, normalise(item["image"][None]))
        similarities, labels = np.asarray(output.similarities[0]), item["label"][2::4, 2::4]
        part = item["parts"][2::4, 2::4].astype(int) - 1
        centroids = parts.centroids_of(item["parts"], (6, 7))
        hits += slow_hits(similarities, labels, centroids)
        by_place += slow_hits(slow_nearness(labels), labels, centroids, of_cells)
        by_oracle[list({k for k, row, col in centroids if part[row, col] == k})] += 1
        visible[list({k for k, _, _ in centroids})] += 1
        for row, col in zip(*np.nonzero(part >= 0), strict=True):
            own = np.flatnonzero(CLASSES == labels[row, col])
            winner = own[similarities[row, col, own].argmax()]
            tables["prototype"][part[row, col], winner] += 1
            tables["position"][part[row, col], slow_cell(labels, row, col)] += 1
    context = Context(experiment(1), experiment(1).inference(CLASSES), "validation")
    found = parts.census(context)
    assert found.classes.tolist() == PART_CLASSES.tolist()
    pixels = [sum((x["parts"] == k + 1).sum() for x in source) for k in range(K)]
    assert found.pixels.tolist() == pixels

    def share(hit, classes):
        judged = [
            any(hit[k, j] > 0.8 * visible[k] for k in range(K) if visible[k])
            for j in range(len(classes))
            if classes[j] in (0, 1)
        ]
        return pytest.approx(np.mean(judged))

    got = measured(1, names=("consistency", "part_agreement"))
    assert got["consistency"] == share(hits, CLASSES)
    assert got["consistency_position"] == share(by_place, of_cells)
    owners = parts.allot(found, CLASSES)
    owned = [by_oracle[k] > 0.8 * visible[k] for k in range(K) for j in owners[k] if j >= 0]
    assert got["consistency_oracle"] == pytest.approx(np.mean(owned))
    result = got["part_agreement"]
    for c, name in ((0, "no"), (1, "one")):
        entry = result["classes"][name]
        table = tables["prototype"][PART_CLASSES == c][:, CLASSES == c]
        assert entry["table"] == table.tolist()
        assert entry["prototypes"] == np.flatnonzero(CLASSES == c).tolist()
        assert entry["parts"] == [["a", "b"], ["c", "d"]][c]
        place = part_agreement.agreement(tables["position"][PART_CLASSES == c])[0]
        assert entry["v_position"] == pytest.approx(place)
        assert entry["v"] == pytest.approx(part_agreement.agreement(table)[0])
    both = [entry["v"] for entry in result["classes"].values()]
    assert result["v"] == pytest.approx(np.mean(both)) and result["left_out"] == []
    assert result["v_oracle"] > 0.8 > 0.1 > result["v_random"]
    assert result["prototypes_that_win"] == (tables["prototype"] > 0).any(0).sum()


def slow_expected_information(rows, columns):
    """Over every permutation of the points."""
    part = np.repeat(np.arange(len(rows)), rows)
    prototype = np.repeat(np.arange(len(columns)), columns)
    total = []
    for order in itertools.permutations(range(len(part))):
        table = np.zeros((len(rows), len(columns)))
        np.add.at(table, (part, prototype[list(order)]), 1)
        p = table / table.sum()
        pairs = np.argwhere(p > 0).tolist()
        total.append(
            sum(p[i, j] * math.log(p[i, j] / (p[i].sum() * p[:, j].sum())) for i, j in pairs)
        )
    return np.mean(total)


@pytest.mark.parametrize(("rows", "columns"), [((3, 2, 1), (2, 4)), ((4, 3), (1, 1, 5))])
def test_expected_information_is_the_mean_over_all_permutations(rows, columns):
    got = part_agreement.expected_information(np.array(rows), np.array([*columns, 0]))
    assert got == pytest.approx(slow_expected_information(rows, columns))


counts = st.lists(st.lists(st.integers(0, 2000), min_size=3, max_size=3), min_size=2, max_size=4)


@settings(max_examples=25, deadline=None)
@given(counts, st.randoms(use_true_random=False))
def test_agreement_is_scikit_learns(rows, random):
    table = np.array(rows)
    if min(table.any(1).sum(), table.any(0).sum()) < 2:
        return
    v, h, c = part_agreement.agreement(table)
    part, prototype = np.indices(table.shape).reshape(2, -1).repeat(table.ravel(), 1)
    contingency = cluster.contingency_matrix(part, prototype).astype(np.int64)
    chance = cluster.expected_mutual_information(contingency, int(table.sum()))
    known = cluster.mutual_info_score(part, prototype)
    got = part_agreement.expected_information(table.sum(1), table.sum(0))
    assert got == pytest.approx(chance, rel=1e-6, abs=1e-12)
    assert part_agreement.information(table) == pytest.approx(known, abs=1e-9)
    if known > chance:
        entropies = (
            -sum(p * math.log(p) for p in x[x > 0] / x.sum()) for x in (table.sum(1), table.sum(0))
        )
        sizes = [entropy - chance for entropy in entropies]
        assert [h, c] == pytest.approx([(known - chance) / size for size in sizes], rel=1e-5)
        assert v == pytest.approx(2 * h * c / (h + c))
    else:
        assert (v, h, c) == (0.0, 0.0, 0.0)
    # The names of parts and prototypes do not matter.
    random.shuffle(rows)
    assert part_agreement.agreement(np.array(rows)) == pytest.approx((v, h, c))


def test_expected_information_of_millions_of_points_is_scikit_learns():
    """Where only the middle of each cell's distribution is summed."""
    table = np.array([[900_000, 31, 7], [5_000, 400_000, 2], [1, 3, 250_000]])
    chance = cluster.expected_mutual_information(table, int(table.sum()))
    got = part_agreement.expected_information(table.sum(1), table.sum(0))
    assert got == pytest.approx(chance, rel=1e-4)


def test_agreement_knows_the_perfect_and_the_ignorant():
    assert part_agreement.agreement(np.diag([50, 70, 90])) == pytest.approx((1, 1, 1))
    # Two prototypes for each part: pure, but a part has two.
    v, h, c = part_agreement.agreement(np.array([[50, 50, 0, 0], [0, 0, 50, 50]]))
    assert h == pytest.approx(1) and c == pytest.approx(0.5, abs=0.02) and v < 0.7
    assert part_agreement.agreement(np.full((3, 3), 40)) == (0.0, 0.0, 0.0)
    assert part_agreement.agreement(np.zeros((2, 2), int)) == (0.0, 0.0, 0.0)
    # Where all is as by chance but for rounding.
    for table in ([[1], [4], [1]], [[0, 0, 814, 0], [0, 0, 676, 0], [0, 0, 847, 0]], np.eye(10)):
        assert part_agreement.agreement(np.array(table).astype(int)) == (0.0, 0.0, 0.0)


def test_a_class_that_cannot_be_judged_is_left_out_and_named():
    tables = {name: np.zeros((3, 4), int) for name in ("prototype", "random", "oracle")}
    tables["position"] = np.zeros((3, 9), int)
    tables["prototype"][0, 0], tables["prototype"][1, 0] = 5, 6  # one prototype wins
    tables["prototype"][2, 2] = 7  # one part
    figures = part_agreement.figures(
        tables, np.array([0, 0, 1]), np.array([0, 0, 1, 1]), ("a", "b"), ("none", "x", "y", "z")
    )
    assert figures["left_out"] == ["a", "b"] and figures["v"] is None
    assert figures["prototypes_that_win"] == 2
    assert figures["classes"]["a"]["table"] == [[5, 0], [6, 0]]


def test_what_a_prototype_stands_for():
    """The part with most of its points, of those with more than their area; none by chance."""
    entry = {"parts": ["wall", "door"], "prototypes": [1, 4, 5, 0]}
    # Areas 0.8 and 0.2. The first is as by chance, the second more door than that, the third wall
    # alone; the fourth wins nothing.
    entry["table"] = [[80, 60, 60, 0], [20, 30, 0, 0]]
    got = part_agreement.standing_for({"classes": {"house": entry}}, 6)
    assert got[4] == ("door", pytest.approx(1 / 3), pytest.approx(0.2))
    assert got[5] == ("wall", 1.0, pytest.approx(0.8))
    assert [got[j] for j in (0, 1, 2, 3)] == [None] * 4
    assert part_agreement.standing_for(None, 2) == [None, None]


def test_the_table_of_parts():
    """Recall and precision of a part's prototypes together and of the best; none for the knob."""
    entry = {"parts": ["wall", "door", "knob"], "prototypes": [3, 0, 1]}
    entry["table"] = [[60, 20, 10], [0, 5, 30], [0, 0, 5]]  # prototypes 3, 0, 1
    got = part_table.rows({"classes": {"house": entry}}, [10, 11, 12, 13])
    assert [row[:3] for row in got] == [
        ("wall", pytest.approx(90 / 130), [13, 10]),
        ("door", pytest.approx(35 / 130), [11]),
        ("knob", pytest.approx(5 / 130), []),
    ]
    assert got[0][3:] == (pytest.approx(80 / 90), pytest.approx(80 / 85), 13, 60 / 90, 1.0)
    assert got[1][3:] == (*[pytest.approx(x) for x in (30 / 35, 30 / 45)], 11, 30 / 35, 30 / 45)
    assert got[2][3:] == (None,) * 5


def test_the_page_about_the_place(tmp_path, monkeypatch):
    """Its tables are those of part agreement, its shares those of consistency."""
    run = SimpleNamespace(experiment=experiment(1), checkpoint=CHECKPOINT, phase="joint")
    run.inference = run.experiment.inference(CLASSES)
    run.experiment.black_box = False
    monkeypatch.setattr(position.Finished, "load", lambda _: run)
    found = position.gather(run, "validation")
    judged = measured(1, names=("consistency", "part_agreement"))
    for c, entry in enumerate(judged["part_agreement"]["classes"].values()):
        own = np.flatnonzero(CLASSES == c)
        table = position.table(found, "prototype", c, own)
        assert table.tolist() == entry["table"]
        place = position.table(found, "position", c, np.arange(9))
        assert part_agreement.agreement(place)[0] == pytest.approx(entry["v_position"])
    rates = [position.rates(found, c)["place"][2] for c in (0, 1)]
    assert (judged["consistency_position"] > 0) == (max(rates) > 0.8)
    position.page("run", "validation", "one", tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert f"the place {judged['consistency_position']:.0%} consistent" in text
    for kind in ("consistency", "agreement"):
        assert Image.open(tmp_path / f"page_{kind}.png").size > (500, 300)
    with pytest.raises(
        UserError, match="'three' has no parts in validation; choose one of no, one"
    ):
        position.page("run", "validation", "three", tmp_path / "other.md")
    assert not (tmp_path / "other.md").exists()


def test_nothing_is_measured_without_prototypes_of_classes_with_parts():
    sums = {"hits": np.zeros((1, M)), "random": np.zeros((1, M)), "position": np.zeros((1, 9 * C))}
    sums |= {"oracle": np.zeros(1), "visible": np.zeros(1)}
    owners = parts.allot(parts.Census(np.array([0]), np.array([4])), CLASSES)
    found = consistency.figures(sums, np.array([0]), CLASSES, C, owners)
    assert set(found.values()) == {0.0}
    nobody = parts.allot(parts.Census(np.array([3]), np.array([4])), CLASSES)
    found = consistency.figures(sums, np.array([3]), CLASSES, C, nobody)
    assert found["consistency"] is None and found["consistency_oracle"] is None
    assert stability.figures({"pairs": 0, "unchanged": 0}) == {"stability": None}


def test_without_part_labels_nothing_is_said_of_parts():
    names = ("utilisation", "part_agreement", "consistency", "stability", "novelty")
    result = measured(1, part_names=None, names=names)
    assert all(result[key] is None for key in ("consistency", "stability", "part_agreement"))
    assert "novelty_auroc" not in result  # no class is held out
    lines = report.measure_lines(result, names)
    words = ("consistency", "stability", "part", "homogeneity", "completeness")
    assert lines and not [line for line in lines if line.startswith(words)]
    assert lines[0] == f"utilisation  {100 * result['utilisation']:.2f} %"


def test_consistency_is_never_told_without_its_controls():
    lines = report.measure_lines(measured(1, names=("consistency",)), ["consistency"])
    assert [line.split("  ")[0] for line in lines] == [
        "consistency",
        *(f"consistency: {name}" for name in ("position", "random", "oracle")),
    ]
    older = {"interpretability": {"consistency": 0.5, "stability": 0.4, "sparsity": 3.0}}
    assert report.measures_in(older) == {"sparsity": 3.0}
    assert report.measures_in({"interpretability": {"stability": 0.7}}) == {"stability": 0.7}


def test_without_noise_all_is_stable(monkeypatch):
    for noise in (0.0, 3.0):
        monkeypatch.setattr(stability, "NOISE", (noise,) * 3)
        found = measured(1, names=("stability",), model=Model())["stability"]
        assert found == 1.0 if noise == 0 else found < 1.0


def test_noise_is_on_the_image_whatever_the_preprocessing(monkeypatch):
    """A model that undoes its preprocessing sees the same noise with ImageNet's and Caffe's."""
    found = []
    for name, normal in preprocessing.KNOWN.items():

        class Undoing(Model):
            def apply(self, variables, images, normal=normal):
                images = (images * np.array(normal.std) + np.array(normal.mean)) / 127.5 - 1
                return super().apply(variables, images[..., list(normal.channels)])

        monkeypatch.setitem(preprocessing.KNOWN, "imagenet", normal)
        found.append(measured(1, names=("stability",), model=Undoing())["stability"])
        monkeypatch.undo()
        assert name in preprocessing.KNOWN
    assert found[0] == found[1] < 1
