"""Eqs 2–8 against literal loops, their gradients, and what must not change them."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from protoseg_jax import config, losses
from protoseg_jax.errors import UserError
from protoseg_jax.losses import cross_entropy as ce
from protoseg_jax.losses import diversity as dj
from protoseg_jax.losses import l1
from protoseg_jax.models.protoseg import Output

VOID = 255
SEEDS = st.integers(0, 2**31 - 1)


# The paper, read literally.


def kl(u, v):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(u, v, strict=True) if a > 0)


def jeffreys_divergence(u, v):
    """Eq. 2."""
    return 0.5 * kl(u, v) + 0.5 * kl(v, u)


def jeffreys_similarity(distributions):
    """Eq. 3."""
    pairs = list(itertools.combinations(distributions, 2))
    return sum(math.exp(-jeffreys_divergence(u, v)) for u, v in pairs) / len(pairs)


def distance_vector(distances):
    """Eq. 4."""
    e = [math.exp(d - max(distances)) for d in distances]
    return [x / sum(e) for x in e]


def slow_diversity(distances, labels, prototype_classes, num_classes):
    """Eq. 5 for each image and class, and whether the pair enters eq. 6."""
    b, h, w, m = distances.shape
    value = np.zeros((b, num_classes))
    present = np.zeros((b, num_classes), bool)
    for i, c in np.ndindex(b, num_classes):
        points = [(y, x) for y, x in np.ndindex(h, w) if labels[i, y, x] == c]
        prototypes = [j for j in range(m) if prototype_classes[j] == c]
        if len(points) < 2 or len(prototypes) < 2:
            continue
        vectors = [
            distance_vector([float(distances[i, y, x, j]) for y, x in points]) for j in prototypes
        ]
        value[i, c] = jeffreys_similarity(vectors)
        present[i, c] = True
    return value, present


def slow_cross_entropy(logits, labels):
    total, count = 0.0, 0
    for index in np.ndindex(labels.shape):
        if labels[index] < logits.shape[-1]:
            scores = [float(s) for s in logits[index]]
            total -= math.log(distance_vector(scores)[labels[index]])
            count += 1
    return total, count


def slow_l1(w_h, prototype_classes):
    """The sum of eq. 8."""
    total = 0.0
    for c in range(w_h.shape[1]):
        for j in range(w_h.shape[0]):
            if prototype_classes[j] != c:
                total += abs(float(w_h[j, c]))
    return total


# One fixed set of shapes, so that nothing compiles per example. Class 3 has one prototype, class 4
# is in no image, the order is mixed and the counts differ, as after pruning.
CLASSES = np.array([0, 2, 1, 1, 0, 3, 2, 2, 2, 4, 4])
NUM_CLASSES = 5
B, H, W, M = 3, 6, 5, len(CLASSES)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _diversity(distances, labels, prototype_classes, num_classes):
    return dj.diversity(distances, labels, np.array(prototype_classes), num_classes)


def diversity(distances, labels, prototype_classes=CLASSES, num_classes=NUM_CLASSES):
    """Compiled once for each set of classes."""
    return _diversity(distances, labels, tuple(np.asarray(prototype_classes).tolist()), num_classes)


@jax.jit
def diversity_gradient(distances, labels):
    return jax.grad(lambda d: diversity(d, labels).sum())(distances)


def example(seed, spread=1.0):
    rng = np.random.default_rng(seed)
    distances = rng.uniform(0, 1, (B, H, W, M)).astype(np.float32) * spread
    labels = rng.choice([0, 1, 2, 3, VOID], (B, H, W), p=[0.3, 0.2, 0.2, 0.1, 0.2])
    labels[0][labels[0] == 1] = VOID
    labels[0, 0, 0] = 1  # a class of a single point
    return distances, labels.astype(np.int32)


@pytest.mark.parametrize("spread", [1.0, 30.0, 300.0])
def test_diversity_is_eqs_2_to_5(spread):
    distances, labels = example(0, spread)
    value, present = slow_diversity(distances, labels, CLASSES, NUM_CLASSES)
    assert present.any() and not present.all()
    assert not present[0, 1] and not present[:, 3].any() and not present[:, 4].any()
    np.testing.assert_allclose(diversity(distances, labels), value, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(dj.present(labels, CLASSES, NUM_CLASSES), present)


def test_diversity_of_disjoint_distributions_is_0():
    distances = np.zeros((1, 1, 2, 2), np.float32)
    distances[0, 0, 0, 0] = distances[0, 0, 1, 1] = 500.0
    value = diversity(distances, np.zeros((1, 1, 2), int), [0, 0], 1)
    assert float(value[0, 0]) == 0.0


def test_distances_are_spread_over_large_ones():
    """Eq. 4 takes the softmax of +‖z − p‖²: the farthest point weighs most."""
    own = jnp.array([[[0.0], [1.0], [3.0]]])
    members = jnp.ones((1, 3, 1), bool)
    vector = jnp.exp(dj.log_distance_vectors(own, members))[0, :, 0]
    np.testing.assert_allclose(vector, distance_vector([0.0, 1.0, 3.0]), rtol=1e-6)
    assert vector[2] > vector[1] > vector[0]


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.floats(0.01, 60.0))
def test_identical_prototypes_have_similarity_1(seed, spread):
    distances, labels = example(seed, spread)
    distances = np.repeat(distances[..., :1], M, axis=-1)
    _, present = slow_diversity(distances, labels, CLASSES, NUM_CLASSES)
    np.testing.assert_allclose(diversity(distances, labels), present, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.floats(0.0, 1000.0))
def test_diversity_is_in_0_1(seed, spread):
    value = np.asarray(diversity(*example(seed, spread)))
    assert (value >= 0).all() and (value <= 1 + 1e-6).all()


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_orders_do_not_matter(seed):
    distances, labels = example(seed, 5.0)
    rng = np.random.default_rng(seed)
    value = np.asarray(diversity(distances, labels))

    points = rng.permutation(H * W)
    moved = diversity(
        distances.reshape(B, -1, M)[:, points].reshape(distances.shape),
        labels.reshape(B, -1)[:, points].reshape(labels.shape),
    )
    np.testing.assert_allclose(moved, value, atol=1e-6)

    images = rng.permutation(B)
    np.testing.assert_allclose(diversity(distances[images], labels[images]), value[images])

    within = np.arange(M)
    for c in range(NUM_CLASSES):
        own = np.flatnonzero(CLASSES == c)
        within[own] = rng.permutation(own)
    np.testing.assert_allclose(diversity(distances[..., within], labels), value, atol=1e-6)


def test_prototypes_may_come_in_any_order():
    distances, labels = example(3, 5.0)
    order = np.random.default_rng(0).permutation(M)
    moved = diversity(distances[..., order], labels, CLASSES[order])
    np.testing.assert_allclose(moved, diversity(distances, labels), atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_a_shift_of_a_prototypes_distances_changes_nothing(seed):
    """The softmax of eq. 4 does not see it."""
    distances, labels = example(seed, 5.0)
    shift = np.random.default_rng(seed).uniform(0, 50, M).astype(np.float32)
    np.testing.assert_allclose(
        diversity(distances + shift, labels), diversity(distances, labels), atol=5e-5
    )


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.sampled_from([1e30, np.inf, np.nan]))
def test_void_and_other_classes_never_enter(seed, garbage):
    """Neither the value nor the gradient, whatever the model says there."""
    distances, labels = example(seed, 5.0)
    enters = labels[..., None] == CLASSES
    changed = np.where(enters, distances, np.float32(garbage))
    np.testing.assert_array_equal(diversity(changed, labels), diversity(distances, labels))
    gradient = np.asarray(diversity_gradient(changed, labels))
    np.testing.assert_array_equal(gradient, diversity_gradient(distances, labels))
    _, present = slow_diversity(distances, labels, CLASSES, NUM_CLASSES)
    enters &= present[:, None, None, CLASSES]
    assert (gradient[~enters] == 0).all()
    assert (gradient[enters] != 0).mean() > 0.9


@pytest.mark.parametrize("label", [VOID, 3, 4])
def test_maps_without_pairs_are_0_and_finite(label):
    """All void; all of a class with one prototype; all of a class with two, all alike."""
    distances, labels = np.ones((B, H, W, M), np.float32), np.full((B, H, W), label, np.int32)
    expected = np.zeros((B, NUM_CLASSES))
    expected[:, 4] = label == 4
    np.testing.assert_allclose(diversity(distances, labels), expected, atol=1e-6)
    np.testing.assert_allclose(diversity_gradient(distances, labels), 0.0, atol=1e-7)


@pytest.mark.parametrize("spread", [1.0, 10.0])
def test_diversity_gradient(spread):
    distances, labels = example(5, spread)
    weights = np.random.default_rng(1).uniform(size=(B, NUM_CLASSES))
    check_grads(
        lambda d: (diversity(d, labels) * weights).sum(),
        (jnp.asarray(distances),),
        order=1,
        modes=["fwd", "rev"],
        eps=1e-2,
        atol=5e-3,
        rtol=5e-3,
    )


def test_diversity_gradient_of_single_entries():
    """Each entry against the literal loss in float64, by central differences."""
    distances, labels = example(6, 4.0)
    gradient = np.asarray(diversity_gradient(distances, labels))
    rng = np.random.default_rng(0)
    for index in rng.permutation(list(np.ndindex(distances.shape)))[:40]:
        step = np.zeros(distances.shape)
        step[tuple(index)] = 1e-5
        up, _ = slow_diversity(distances + step, labels, CLASSES, NUM_CLASSES)
        down, _ = slow_diversity(distances - step, labels, CLASSES, NUM_CLASSES)
        expected = (up.sum() - down.sum()) / 2e-5
        np.testing.assert_allclose(gradient[tuple(index)], expected, rtol=1e-4, atol=1e-6)


def test_nearly_alike_prototypes_are_still_pushed_apart():
    """1 − S is about 1e-7 here: without care, the gradient is all rounding."""
    rng = np.random.default_rng(0)
    distances = rng.uniform(0, 20, (1, 6, 5, 1)) + 1e-3 * rng.uniform(size=(1, 6, 5, 4))
    distances = distances.astype(np.float32)
    labels, classes = np.zeros((1, 6, 5), np.int32), np.zeros(4, int)
    gradient = jax.jit(jax.grad(lambda d: diversity(d, labels, classes, 1).sum()))(distances)
    expected = np.zeros(distances.shape)
    for index in np.ndindex(distances.shape):
        step = np.zeros(distances.shape)
        step[index] = 1e-4
        up, _ = slow_diversity(distances + step, labels, classes, 1)
        down, _ = slow_diversity(distances - step, labels, classes, 1)
        expected[index] = (up.sum() - down.sum()) / 2e-4
    np.testing.assert_allclose(gradient, expected, atol=0.02 * np.abs(expected).max())


def test_low_precision_inputs_are_computed_in_float32():
    distances, labels = example(7, 5.0)
    rounded = jnp.asarray(distances, jnp.bfloat16)
    value = diversity(rounded, labels)
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, diversity(rounded.astype(jnp.float32), labels))
    logits = jnp.asarray(distances[..., :NUM_CLASSES], jnp.bfloat16)
    total = ce.cross_entropy_sum(logits, labels)
    assert total.dtype == jnp.float32
    assert total == ce.cross_entropy_sum(logits.astype(jnp.float32), labels)
    assert l1.last_layer_l1(jnp.ones((M, 5), jnp.bfloat16), CLASSES).dtype == jnp.float32


def test_uint8_labels():
    distances, labels = example(8, 5.0)
    small = labels.astype(np.uint8)
    np.testing.assert_array_equal(diversity(distances, small), diversity(distances, labels))
    logits = distances[..., :NUM_CLASSES]
    assert ce.cross_entropy_sum(logits, small) == ce.cross_entropy_sum(logits, labels)
    assert ce.valid_points(small, NUM_CLASSES) == ce.valid_points(labels, NUM_CLASSES)


def test_cross_entropy_is_the_literal_sum():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(B, H, W, NUM_CLASSES)).astype(np.float32) * 20
    _, labels = example(0)
    total, count = slow_cross_entropy(logits, labels)
    np.testing.assert_allclose(ce.cross_entropy_sum(logits, labels), total, rtol=1e-5)
    assert ce.valid_points(labels, NUM_CLASSES) == count
    check_grads(
        lambda x: ce.cross_entropy_sum(x, labels),
        (jnp.asarray(logits / 20),),
        order=1,
        modes=["rev"],
        eps=1e-2,
        atol=1e-2,
        rtol=1e-2,
    )


def test_class_weights_weigh_points_by_their_class():
    """Against a loop over points; a power of 1 gives every class the same weight in all."""
    _, labels = example(0)
    logits = np.random.default_rng(0).normal(size=(B, H, W, NUM_CLASSES)).astype(np.float32)
    weights = ce.class_weights(np.array([100, 400, 25, 100, 1600]), 0.5)
    np.testing.assert_allclose(weights, [1.0, 0.5, 2.0, 1.0, 0.25])
    total = weight = 0.0
    for point in np.ndindex(B, H, W):
        c = labels[point]
        if c < NUM_CLASSES:
            p = np.exp(logits[point]) / np.exp(logits[point]).sum()
            total -= weights[c] * np.log(p[c])
            weight += weights[c]
    np.testing.assert_allclose(ce.cross_entropy_sum(logits, labels, weights), total, rtol=1e-5)
    np.testing.assert_allclose(ce.valid_points(labels, NUM_CLASSES, weights), weight, rtol=1e-6)
    pixels = np.array([7, 90, 3000])
    np.testing.assert_allclose(ce.class_weights(pixels, 1.0) * pixels, 90, rtol=1e-6)
    np.testing.assert_array_equal(ce.class_weights(pixels, 0.0), 1)


def test_cross_entropy_ignores_void():
    _, labels = example(1)
    logits = np.random.default_rng(1).normal(size=(B, H, W, NUM_CLASSES)).astype(np.float32)
    changed = np.where((labels == VOID)[..., None], np.nan, logits)
    value, gradient = jax.value_and_grad(ce.cross_entropy_sum)(jnp.asarray(changed), labels)
    np.testing.assert_allclose(value, ce.cross_entropy_sum(logits, labels), rtol=1e-6)
    void = np.full((B, H, W), VOID)
    assert ce.cross_entropy_sum(changed, void) == 0
    assert ce.valid_points(void, NUM_CLASSES) == 0
    assert (np.asarray(gradient)[labels == VOID] == 0).all()
    assert np.isfinite(gradient).all()


def test_l1_is_the_literal_sum():
    w_h = np.random.default_rng(0).normal(size=(M, NUM_CLASSES)).astype(np.float32)
    value, gradient = jax.value_and_grad(l1.last_layer_l1)(jnp.asarray(w_h), CLASSES)
    np.testing.assert_allclose(value, slow_l1(w_h, CLASSES), rtol=1e-6)
    own = CLASSES[:, None] == np.arange(NUM_CLASSES)
    np.testing.assert_array_equal(gradient, np.where(own, 0, np.sign(w_h)))


def total_loss(distances, logits, labels, points, pairs):
    """Eq. 7 with the counts of the global batch."""
    return ce.cross_entropy_sum(logits, labels) / points + 0.25 * (
        dj.diversity(distances, labels, CLASSES, NUM_CLASSES).sum() / pairs
    )


def test_parts_of_a_batch_add_up_to_the_whole():
    """vmap over devices, then scan over micro-batches, against the whole: value and gradient."""
    parts = [example(seed, 5.0) for seed in range(4)]
    distances, labels = (np.concatenate(x) for x in zip(*parts, strict=True))
    labels[0] = VOID
    logits = np.random.default_rng(0).normal(size=(*labels.shape, NUM_CLASSES))
    points = ce.valid_points(labels, NUM_CLASSES)
    pairs = dj.present(labels, CLASSES, NUM_CLASSES).sum()
    arrays = (jnp.asarray(distances), jnp.asarray(logits, jnp.float32))
    gradient = jax.jit(jax.value_and_grad(total_loss, (0, 1)))
    value, grads = gradient(*arrays, labels, points, pairs)
    expected, _ = slow_diversity(distances, labels, CLASSES, NUM_CLASSES)
    entropy, count = slow_cross_entropy(logits, labels)
    np.testing.assert_allclose(
        value, entropy / count + 0.25 * expected.sum() / float(pairs), rtol=1e-5
    )

    split = [x.reshape(4, B, *x.shape[1:]) for x in (*arrays, labels)]
    mapped = jax.jit(jax.vmap(gradient, (0, 0, 0, None, None)))
    scan = jax.jit(
        lambda s: jax.lax.scan(lambda _, x: (None, gradient(*x, points, pairs)), None, s)
    )
    for values, part_grads in (mapped(*split, points, pairs), scan(split)[1]):
        np.testing.assert_allclose(values.sum(), value, rtol=1e-5)
        for part, whole in zip(part_grads, grads, strict=True):
            np.testing.assert_allclose(part.reshape(whole.shape), whole, atol=1e-7, rtol=1e-5)


def loss_config(**changes):
    c = config.default().loss
    c.update(changes)
    return c


@pytest.mark.parametrize("reduction", ["present", "all_classes"])
def test_means_are_eqs_6_and_7_of_every_output(reduction):
    """Literally, over the batch's points and pairs, and averaged over two outputs."""
    terms = losses.terms(loss_config(diversity_reduction=reduction), CLASSES, NUM_CLASSES)
    assert [(t.name, t.weight) for t in terms] == [
        ("cross_entropy", 1.0),
        ("diversity", 0.25),
        ("l1", 1e-4),
        ("assignment", 0.0),
    ]
    shown, outputs, labels = terms[:2], [], []
    expected = np.zeros(2)
    for seed in (0, 1):
        distances, own = example(seed, 5.0)
        logits = np.random.default_rng(seed).normal(size=(B, H, W, NUM_CLASSES))
        outputs.append(Output(None, jnp.asarray(distances), None, jnp.asarray(logits, jnp.float32)))
        labels.append(own)
        entropy, points = slow_cross_entropy(logits, own)
        value, present = slow_diversity(distances, own, CLASSES, NUM_CLASSES)
        pairs = present.sum() if reduction == "present" else B * NUM_CLASSES
        expected += np.array([entropy / points, value.sum() / pairs]) / 2
    counts = [{t.name: t.count(jnp.asarray(own)) for t in shown} for own in labels]
    found = losses.means(shown, outputs, [jnp.asarray(own) for own in labels], counts)
    np.testing.assert_allclose(list(found.values()), expected, rtol=1e-5)
    assert list(found) == ["cross_entropy", "diversity"]
    w_h = jnp.asarray(np.random.default_rng(0).normal(size=(M, NUM_CLASSES)), jnp.float32)
    found["l1"] = terms[2].value({"head": {"kernel": w_h}})
    assert terms[2].phases == ("finetune", "finetune_pruned")
    found["assignment"] = 0.0
    total = expected[0] + 0.25 * expected[1] + 1e-4 * slow_l1(w_h, CLASSES)
    np.testing.assert_allclose(losses.objective(terms, found), total, rtol=1e-5)


@pytest.mark.parametrize(("weight", "classes"), [(0.0, CLASSES), (0.25, np.zeros(0, int))])
def test_a_term_without_weight_is_not_computed(weight, classes):
    """Diversity with λ_J = 0, and the black box's, which has no distances."""
    terms = losses.terms(loss_config(diversity=weight), classes, NUM_CLASSES)[:2]
    output = Output(None, None, None, jnp.zeros((B, H, W, NUM_CLASSES)))
    labels = jnp.asarray(example(0)[1])
    counts = {t.name: t.count(labels) for t in terms}
    found = losses.means(terms, [output], [labels], [counts])
    assert found["diversity"] == 0
    assert found["cross_entropy"] == pytest.approx(np.log(NUM_CLASSES), rel=1e-6)


def test_a_term_from_outside_the_package(tmp_path, monkeypatch):
    """A module anywhere, by its dotted path; its settings are its own keys of config.loss."""
    (tmp_path / "terms_elsewhere").mkdir()
    (tmp_path / "terms_elsewhere" / "size.py").write_text(
        "from protoseg_jax.losses import Term\n"
        "def make(config, classes, num_classes, weights):\n"
        "    count, total = lambda y: y.size / 2, lambda o, y: o.features.sum()\n"
        "    return Term('size', config.size, count, total)\n"
    )
    (tmp_path / "terms_elsewhere" / "empty.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    c = loss_config(terms=("cross_entropy", "terms_elsewhere.size"))
    with c.unlocked():
        c.size = 2.0
    term = losses.terms(c, CLASSES, NUM_CLASSES)[1]
    output, labels = Output(jnp.ones((1, 2, 3, 4)), None, None, None), jnp.zeros((1, 2, 3), int)
    counts = [{"size": term.count(labels)}]
    found = losses.means([term], [output], [labels], counts)
    assert losses.objective([term], found) == 2.0 * 24 / 3
    for names, words in (
        (("cross_entropy", "terms_elsewhere.none"), "does not import|is unknown"),
        (("cross_entropy", "terms_elsewhere.empty"), "has no 'make'"),
        (("nothing",), "assignment, cross_entropy, diversity, l1"),
        (("l1", "cross_entropy", "l1"), "twice"),
        (("l1",), "no term of the points"),
        ((), "no term of the points"),
    ):
        with pytest.raises(UserError, match=words):
            losses.terms(loss_config(terms=names), CLASSES, NUM_CLASSES)
