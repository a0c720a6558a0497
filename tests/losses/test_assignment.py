"""The assignment loss against a literal loop, over devices, and where it says nothing."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protoseg_jax import config, losses
from protoseg_jax.devices import DevicePool
from protoseg_jax.errors import UserError
from protoseg_jax.losses import assignment
from protoseg_jax.models.protoseg import Output

VOID, CLASSES = 255, 4
OWNERS = np.array([0, 0, 0, 1, 1, 2, 2, 2])  # class 2 has three, class 1 two, class 3 none
SEEDS = st.integers(0, 2**31 - 1)


def make_term(owners=OWNERS, **changes):
    settings_ = config.default().loss
    settings_.terms = ("cross_entropy", "assignment")
    settings_.update({"assignment": 0.3, **changes})
    return losses.terms(settings_, np.asarray(owners), CLASSES)[1]


def slow_assignment(distances, labels, owners, epsilon, steps=3, even=1.0):
    """The assignment at each point by prototype, one number after another."""
    points = [p for p in np.ndindex(labels.shape) if labels[p] != VOID]
    a = {}
    for p in points:
        own = [j for j, c in enumerate(owners) if c == labels[p]]
        least = min((distances[p][j] for j in own), default=0)
        e = [math.exp(-(distances[p][j] - least) / epsilon) for j in own]
        a[p] = {j: x / sum(e) for j, x in zip(own, e, strict=True)}
    share = {}
    for j, c in enumerate(owners):
        held = [p for p in points if j in a[p]]
        natural = sum(a[p][j] for p in held) / max(len(held), 1)
        share[j] = even / list(owners).count(c) + (1 - even) * natural
    for _ in range(steps):
        for j in range(len(owners)):
            held = [p for p in points if j in a[p]]
            total = sum(a[p][j] for p in held)
            for p in held:
                a[p][j] *= share[j] / total
        for p in points:
            total = sum(a[p].values())
            a[p] = {j: x / total for j, x in a[p].items()}
    return a


def slow(distances, labels, owners, epsilon, tau, apart=None, epsilon_t=0.05, even=1.0):
    """(loss at each point, assignment at each point by prototype)."""
    by = (distances, epsilon) if apart is None else (apart, epsilon_t)
    a = slow_assignment(by[0], labels, owners, by[1], even=even)
    points = list(a)
    loss = np.zeros(labels.shape)
    for p in points:
        if len(a[p]) >= 2:
            e = {j: math.exp(-distances[p][j] / tau) for j in a[p]}
            loss[p] = -sum(x * math.log(e[j] / sum(e.values())) for j, x in a[p].items())
            if apart is not None:
                loss[p] += sum(x * apart[p][j] for j, x in a[p].items())
    return loss, a


def make(seed, shape=(4, 5, 6), far=1.0):
    rng = np.random.default_rng(seed)
    distances = (far * rng.random((*shape, len(OWNERS)))).astype(np.float32)
    labels = rng.choice([0, 1, 2, 3, VOID], shape).astype(np.int32)
    return distances, labels


@functools.cache
def mapped(devices, term):
    def both(distances, labels, apart=None):
        # The gradient of this device's part, whose assignment the other devices share in.
        def part(distances, apart):
            return term.total(Output(None, distances, None, None, apart), labels)

        found = jax.lax.psum((part(distances, apart), term.count(labels)), "devices")
        if apart is None:
            return found, jax.grad(part)(distances, None)
        return found, jnp.stack(jax.grad(part, argnums=(0, 1))(distances, apart), -1)

    pool = DevicePool(jax.local_devices()[:devices])
    step = pool.map(both)

    def call(distances, labels, *apart):
        (value, count), gradient = step(*pool.shard((distances, labels, *apart)))
        shape = (*distances.shape, 2) if apart else distances.shape
        return float(value[0]), float(count[0]), np.asarray(gradient).reshape(shape)

    return call


TERM = make_term()


@given(SEEDS)
@settings(max_examples=15, deadline=None)
def test_the_loss_is_its_literal_sum(seed):
    distances, labels = make(seed)
    value, count, _ = mapped(1, TERM)(distances, labels)
    literal, _ = slow(distances.astype(np.float64), labels, OWNERS, 0.05, 0.1)
    assert value == pytest.approx(literal.sum(), rel=1e-4)
    assert count == np.isin(labels, (0, 1, 2)).sum()  # void and the class without prototypes: not


@pytest.mark.parametrize("even", [0.25, 0.75])
def test_shares_that_are_not_equal(even):
    """The literal sum again, also over two devices; and it matters."""
    distances, labels = make(3)
    term = make_term(assignment_even=even)
    literal, _ = slow(distances.astype(np.float64), labels, OWNERS, 0.05, 0.1, even=even)
    for devices in (1, 2):
        value, *_ = mapped(devices, term)(distances, labels)
        assert value == pytest.approx(literal.sum(), rel=1e-4)
    plain, _ = slow(distances.astype(np.float64), labels, OWNERS, 0.05, 0.1)
    assert abs(literal.sum() - plain.sum()) > 1e-2


@pytest.mark.parametrize("even", [0.0, -1.0, 1.5])
def test_shares_that_cannot_be_are_refused(even):
    with pytest.raises(UserError, match="loss.assignment_even=.* must be above 0 and at most 1"):
        make_term(assignment_even=even)


def test_the_gradient_takes_the_assignment_as_it_is():
    """By differences of the literal loss with the assignment held."""
    distances, labels = make(5)
    _, _, gradient = mapped(1, TERM)(distances, labels)
    _, a = slow(distances.astype(np.float64), labels, OWNERS, 0.05, 0.1)
    literal = np.zeros(distances.shape)
    for p, shares in a.items():
        e = {j: math.exp(-float(distances[p][j]) / 0.1) for j in shares}
        for j, x in shares.items():
            literal[p][j] = (x - e[j] / sum(e.values())) / 0.1
    np.testing.assert_allclose(gradient, literal, atol=2e-4)


@given(SEEDS, st.sampled_from([2, 4]))
@settings(max_examples=8, deadline=None)
def test_devices_share_one_assignment(seed, devices):
    distances, labels = make(seed)
    labels[:2][labels[:2] == 2] = VOID  # a class that half of the devices do not see
    one, several = mapped(1, TERM)(distances, labels), mapped(devices, TERM)(distances, labels)
    assert several[0] == pytest.approx(one[0], rel=1e-5) and several[1] == one[1]
    np.testing.assert_allclose(several[2], one[2], atol=1e-5)


@given(SEEDS)
@settings(max_examples=8, deadline=None)
def test_anchors_divide_the_points_instead_and_are_moved_to_their_means(seed):
    distances, labels = make(seed)
    apart, _ = make(seed + 1)
    value, count, gradient = mapped(1, TERM)(distances, labels, apart)
    wide = distances.astype(np.float64), labels, OWNERS, 0.05, 0.1
    literal, a = slow(*wide, apart.astype(np.float64))
    assert value == pytest.approx(literal.sum(), rel=1e-3)
    assert value != pytest.approx(slow(*wide)[0].sum(), rel=1e-3)
    assert count == np.isin(labels, (0, 1, 2)).sum()
    shares = np.zeros(distances.shape)
    for p, of in a.items():
        for j, x in of.items():
            shares[p][j] = x
    # ∂/∂e is the share itself: k-means. The distances learn the shares as they are.
    np.testing.assert_allclose(gradient[..., 1], shares, atol=1e-3)
    several = mapped(4, TERM)(distances, labels, apart)
    assert several[0] == pytest.approx(value, rel=1e-4) and several[1] == count
    np.testing.assert_allclose(several[2], gradient, atol=1e-3)


def assigned(distances, labels, owners=OWNERS, epsilon=0.05, steps=None):
    from protoseg_jax.losses.own_class import of_own_class

    def look(distances, labels):
        own, members, real = of_own_class(distances, labels, owners, CLASSES)
        return assignment.assign(own, members, real, epsilon)

    pool = DevicePool(jax.local_devices()[:1])
    return np.asarray(pool.map(look)(*pool.shard((distances, labels))))[0]


@given(SEEDS, st.sampled_from([0.3, 1.0, 30.0, 3000.0]))
@settings(max_examples=12, deadline=None)
def test_shares_of_a_point_sum_to_1_however_far_its_prototypes_are(seed, far):
    distances, labels = make(seed, far=far)
    a = assigned(distances, labels)
    assert np.isfinite(a).all() and (a >= 0).all()
    known = np.isin(labels, (0, 1, 2)).reshape(len(a), -1)
    np.testing.assert_allclose(a.sum(-1)[known], 1, atol=1e-5)
    assert not a[~known].any()
    assert not a[(labels == 1).reshape(known.shape)][:, 2].any()  # class 1 has two prototypes


def test_a_prototype_far_from_everything_gets_its_share_all_the_same():
    """In float32 exp(−20 / 0.05) is 0: the iteration must be on logarithms."""
    distances, labels = make(1)
    labels[:] = 0
    distances[..., 2] += 20
    a = assigned(distances, labels)[..., :3]
    shares = a.sum((0, 1)) / a.sum()
    assert shares.min() > 0.05  # three steps come so far


def test_it_does_not_matter_in_which_order_prototypes_and_images_come():
    distances, labels = make(2)
    value, count, gradient = mapped(1, TERM)(distances, labels)
    order = np.random.default_rng(0).permutation(len(OWNERS))
    moved = mapped(1, make_term(OWNERS[order]))(distances[..., order], labels[::-1])
    again = mapped(1, make_term(OWNERS[order]))(distances[::-1][..., order], labels[::-1])
    assert moved[0] != pytest.approx(value, rel=1e-3)  # the images alone are another batch
    assert again[0] == pytest.approx(value, rel=1e-5) and again[1] == count
    np.testing.assert_allclose(again[2][::-1], gradient[..., order], atol=1e-5)


def test_nothing_to_assign_is_0_with_a_gradient_of_0():
    distances, labels = make(3)
    for emptied in (np.full_like(labels, VOID), np.full_like(labels, 3)):
        value, count, gradient = mapped(1, TERM)(distances, emptied)
        assert (value, count) == (0, 0) and not gradient.any()
    alone = make_term(np.array([0, 1, 2]))
    assert alone.weight == 0
    assert make_term(np.zeros(0, int)).weight == 0  # the black box
    assert make_term().weight == pytest.approx(0.3)
    one_of_one = make_term(np.array([0, 0, 1]))
    labels[:] = 1  # the only class here has one prototype
    value, count, gradient = mapped(1, one_of_one)(distances[..., :3], labels)
    assert (value, count) == (0, 0) and not gradient.any()


def test_it_makes_points_choose():
    """Gradient steps on the points of a class: at first all alike, then divided evenly."""
    rng = np.random.default_rng(0)
    p = jnp.asarray(rng.random((3, 4)), jnp.float32)
    z = jnp.asarray(0.5 + 0.01 * rng.normal(size=(1, 6, 6, 4)), jnp.float32)
    labels = jnp.zeros((1, 6, 6), jnp.int32)
    term = make_term(np.zeros(3, int))

    def value(z, p):
        distances = jnp.square(z[..., None, :] - p).sum(-1)
        return term.total(Output(None, distances, None, None), labels) / 36

    pool = DevicePool(jax.local_devices()[:1])
    step = pool.map(lambda z, p: jax.value_and_grad(value, argnums=(0, 1))(z, p))
    first = None
    for _ in range(200):
        (loss,), (dz, dp) = step(z[None], p[None])
        first = float(loss) if first is None else first
        z, p = z - 2.0 * dz[0], p - 0.1 * dp[0]
    nearest = np.square(np.asarray(z)[..., None, :] - np.asarray(p)).sum(-1).argmin(-1)
    counts = np.bincount(nearest.ravel(), minlength=3)
    assert float(loss) < 0.2 < 0.9 < first
    assert counts.min() >= 9
