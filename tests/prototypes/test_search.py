"""Search, projection and pruning against a naive NumPy search on the same features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from protoseg_jax import config as configs
from protoseg_jax.data.labels import VOID
from protoseg_jax.devices import DevicePool
from protoseg_jax.inference import Inference, shrink_labels
from protoseg_jax.models.preprocessing import Preprocessing
from protoseg_jax.models.protoseg import Output
from protoseg_jax.prototypes import search
from protoseg_jax.prototypes.project import without_duplicates
from protoseg_jax.prototypes.prune import prune

D = 3


class Pixels(nn.Module):
    """A 'model' whose features are every second pixel, so that ties are exact and plentiful."""

    @nn.compact
    def __call__(self, images):
        features = images[:, ::2, ::2]
        p = self.get_variable("params", "vectors")
        distances = ((features[..., None, :] - p) ** 2).sum(-1)
        return Output(features, distances, distances, features)


INFERENCE = Inference(Pixels(), Preprocessing((0.0,) * 3, (1.0,) * 3), (8, 12), (), 3)


def case(seed, images=11, prototypes=7, classes=3, levels=3):
    """Few grey levels, so that most distances tie, with duplicate images and void."""
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, levels, (images, 8, 12, 3)).astype(np.uint8)
    labels = rng.choice([*range(classes), VOID], (images, 8, 12)).astype(np.uint8)
    pictures[-1], labels[-1] = pictures[0], labels[0]
    vectors = rng.integers(0, levels, (prototypes, D)).astype(np.float32)
    return pictures, labels, vectors, rng.integers(0, classes, prototypes)


class Pictures:
    """What a search needs of an experiment."""

    def __init__(self, pictures, labels, devices, batch=4):
        self.pictures, self.labels, self.eval_batch_size = pictures, labels, batch
        self.config, self.pool = configs.default(), DevicePool(jax.local_devices()[:devices])

    def examples(self, split):
        return self.pictures

    def eval_batches(self, split, start=0):
        count, size = len(self.pictures), self.eval_batch_size
        for first in range(start, count, size):
            index = np.arange(first, first + size)
            index = np.where(index < count, index, -1)
            yield {
                "image": self.pictures[index],
                "label": np.where((index >= 0)[:, None, None], self.labels[index], VOID),
                "size": np.full((size, 2), self.labels.shape[1:], np.int32),
                "index": index.astype(np.int32),
            }


def rule_of(classes, within_class):
    return search.of_own_class(classes) if within_class else search.of_any_class


def naive(pictures, labels, vectors, classes, k, within_class):
    """Every point of every image, in the plainest loops."""
    tables = []
    for p, c in zip(vectors, classes, strict=True):
        best = []
        for i in range(len(pictures)):
            found = None
            for row in range(4):
                for col in range(6):
                    label = labels[i, (2 * row + 1) * 8 // 8, (2 * col + 1) * 12 // 12]
                    if label == VOID or (within_class and label != c):
                        continue
                    z = pictures[i, 2 * row, 2 * col].astype(np.float32)
                    d = float(((z - p) ** 2).sum())
                    if found is None or d < found[0]:
                        found = (d, i, row, col, int(label), tuple(z))
            if found:
                best.append(found)
        tables.append(sorted(best)[:k])
    return tables


def run(pictures, labels, vectors, classes, k, within_class, devices):
    return search.search(
        Pictures(pictures, labels, devices),
        INFERENCE,
        {"params": {"vectors": vectors}},
        rule_of(classes, within_class),
        search.empty(len(vectors), k, D),
        "search",
    )


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize(("k", "within_class"), [(1, True), (6, False)])
@pytest.mark.parametrize("seed", [0, 1])
def test_search_equals_naive_search_with_ties_and_duplicates(seed, k, within_class, devices):
    pictures, labels, vectors, classes = case(seed)
    patches = run(pictures, labels, vectors, classes, k, within_class, devices)
    expected = naive(pictures, labels, vectors, classes, k, within_class)
    for j, rows in enumerate(expected):
        assert np.isfinite(patches.squared_distance[j]).sum() == len(rows)
        for n, (d, image, row, col, label, z) in enumerate(rows):
            assert patches.squared_distance[j, n] == d
            got = (patches.image[j, n], patches.row[j, n], patches.col[j, n], patches.label[j, n])
            assert got == (image, row, col, label)
            np.testing.assert_array_equal(patches.feature[j, n], z)


@pytest.mark.parametrize(("k", "within_class"), [(1, True), (6, False)])
def test_a_search_goes_on_where_it_stopped_on_another_number_of_devices(k, within_class):
    pictures, labels, vectors, classes = case(5)
    found = INFERENCE, {"params": {"vectors": vectors}}, rule_of(classes, within_class)
    four, one = (Pictures(pictures, labels, n) for n in (4, 1))
    so_far, empty = [], search.empty(len(vectors), k, D)
    whole = search.search(
        four, *found, empty, "", after_batch=lambda done, best: so_far.append((done, best()))
    )
    assert [done for done, _ in so_far] == [4, 8]  # not after the last batch
    expected = run(pictures, labels, vectors, classes, k, within_class, 1)
    jax.tree.map(np.testing.assert_array_equal, whole, expected)
    for done, table in so_far:
        got = search.search(one, *found, table, "", done)
        jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_fewer_images_than_k_leave_empty_slots():
    pictures, labels, vectors, classes = case(3, images=2)
    patches = run(pictures, labels, vectors, classes, 6, False, 1)
    assert np.isinf(patches.squared_distance[:, 2:]).all()
    assert np.isfinite(patches.squared_distance[:, :2]).all()


def sample(pictures, labels, k, *, seed=0, devices=1, batch=4):
    variables = {"params": {"vectors": np.zeros((1, D), np.float32)}}
    at = Pictures(pictures, labels, devices, batch)
    rule, empty = search.at_random(3, seed), search.empty(3, k, D)
    return search.search(at, INFERENCE, variables, rule, empty, "sample")


def test_a_sample_is_points_of_each_class_from_different_images():
    pictures, labels, _, _ = case(6)
    got = sample(pictures, labels, 5)
    assert np.isfinite(got.squared_distance).all()
    assert len({(*rows,) for rows in got.image.tolist()}) == 3  # classes draw by themselves
    for c in range(3):
        assert len(set(got.image[c])) == 5
        columns = (x[c] for x in (got.image, got.row, got.col, got.feature))
        for image, row, col, z in zip(*columns, strict=True):
            assert labels[image, 2 * row + 1, 2 * col + 1] == c
            np.testing.assert_array_equal(z, pictures[image, 2 * row, 2 * col])
    other = sample(pictures, labels, 5, seed=1)
    assert (other.image != got.image).any()


@pytest.mark.parametrize(("devices", "batch"), [(4, 4), (1, 1), (2, 8)])
def test_a_sample_is_the_same_on_any_devices(devices, batch):
    pictures, labels, _, _ = case(7)
    jax.tree.map(
        np.testing.assert_array_equal,
        sample(pictures, labels, 6, devices=devices, batch=batch),
        sample(pictures, labels, 6),
    )


def test_every_point_is_as_likely_to_be_sampled():
    """One image of one class: each of its 24 points in some 1/24 of the draws (5 deviations)."""
    step = search.make_step(INFERENCE, search.at_random(1, 0), k=1)
    batch = {
        "image": jnp.zeros((1, 8, 12, 3), jnp.uint8),
        "label": jnp.zeros((1, 8, 12), jnp.uint8),
        "size": jnp.array([[8, 12]]),
    }
    variables = {"params": {"vectors": jnp.zeros((1, D))}}
    table = jax.tree.map(jnp.asarray, search.empty(1, 1, D))
    draw = jax.jit(jax.vmap(lambda n: step(table, variables, {**batch, "index": n[None]})))
    draws = draw(jnp.arange(2400))
    counts = np.bincount((6 * draws.row + draws.col).ravel(), minlength=24)
    assert len(counts) == 24 and abs(counts - 100).max() < 50


def test_fallback_takes_cells_that_contain_any_pixel_of_the_class():
    pictures, labels, vectors, _ = case(4, classes=2)
    labels[labels == 1] = 0
    labels[5, 2, 4] = 1  # even row and column: never a cell's centre
    classes = np.ones(len(vectors), int)
    strict = run(pictures, labels, vectors, classes, 1, True, 1)
    assert np.isinf(strict.squared_distance).all()
    at, variables = Pictures(pictures, labels, 2), {"params": {"vectors": vectors}}
    empty = search.empty(len(vectors), 1, D)
    patches = search.search(at, INFERENCE, variables, search.of_cells_with(1), empty, "search")
    assert (patches.image == 5).all() and (patches.row == 1).all() and (patches.col == 2).all()


# Few shapes, which are compiled; any size of an image, which is data.
MAPS = st.sampled_from([(1, 1), (2, 9), (7, 5), (33, 64), (70, 41)])


@settings(max_examples=40, deadline=None)
@given(MAPS.filter(lambda size: max(size) < 10), st.integers(1, 40), st.integers(1, 40))
def test_contains_class_equals_a_loop_over_pixels(size, height, width):
    h, w = size
    rng = np.random.default_rng(h * 1000 + width)
    label = np.full((1, 40, 40), 7, np.int32)
    label[0, :height, :width] = rng.integers(0, 5, (height, width))
    got = search.contains_class(label, np.array([[height, width]]), (h, w), 3)[0]
    expected = np.zeros((h, w), bool)
    for y in range(height):
        for x in range(width):
            if label[0, y, x] == 3:
                expected[min(y * h // height, h - 1), min(x * w // width, w - 1)] = True
    np.testing.assert_array_equal(got, expected)


@settings(max_examples=60, deadline=None)
@given(MAPS, st.integers(1, 70), st.integers(1, 70))
def test_shrink_labels_takes_cell_centres(size, height, width):
    h, w = size
    label = np.arange(70 * 70).reshape(1, 70, 70)
    got = np.asarray(shrink_labels(label, np.array([[height, width]]), (h, w)))[0]
    for i in range(h):
        for j in range(w):
            assert got[i, j] == label[0, int((i + 0.5) * height / h), int((j + 0.5) * width / w)]


def patches_of(rows, k):
    """A table from rows of (distance, image, row, col, label)."""
    table = search.empty(len(rows), k, D)
    for j, row in enumerate(rows):
        for n, (d, image, y, x, label) in enumerate(row):
            table.squared_distance[j, n] = d
            table.feature[j, n] = (image, y, x)
            for name, value in (("image", image), ("row", y), ("col", x), ("label", label)):
                getattr(table, name)[j, n] = value
    return table


def test_projection_keeps_the_lowest_index_of_duplicates_of_a_class():
    same = [(0.1, 2, 3, 4, 0)]
    table = patches_of([same, [(0.2, 2, 3, 5, 0)], same, same], 1)
    keep, vectors = without_duplicates(table, np.array([0, 0, 0, 1]))
    assert keep.tolist() == [0, 1, 3]  # the same patch in another class is no duplicate
    np.testing.assert_array_equal(vectors, [(2, 3, 4), (2, 3, 5), (2, 3, 4)])


def test_projection_refuses_a_prototype_without_a_patch():
    with pytest.raises(ValueError, match="no candidate"):
        without_duplicates(patches_of([[]], 1), np.array([0]))


@pytest.mark.parametrize(
    ("labels", "stays"),
    [
        ([0, 0, 0, 1, 1, 1], True),
        ([0, 0, 1, 1, 1, 1], False),
        ([0, 0, 1, 1], True),  # fewer than six images: at least half
        ([0, 1, 1], False),
    ],
)
def test_pruning_threshold(labels, stays):
    rows = [[(float(n), n, 0, 0, label) for n, label in enumerate(labels)]]
    rows.append([(0.0, n, 0, 0, 0) for n in range(6)])  # another prototype keeps the class alive
    keep, saved = prune(patches_of(rows, 6), np.array([0, 0]))
    assert (0 in keep) == stays and 1 in keep and saved == []


def test_pruning_keeps_the_best_of_a_class_that_would_vanish():
    def row(own):
        return [(0.0, n, 0, 0, 1 if n < own else 0) for n in range(6)]

    keep, saved = prune(patches_of([row(0), row(2), row(2), row(1)], 6), np.array([0, 1, 1, 1]))
    assert keep.tolist() == [0, 1] and saved == [1]
