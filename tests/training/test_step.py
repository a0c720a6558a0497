"""The train step: N devices = 1 device, accumulation changes nothing, frozen groups stay."""

import functools
from unittest import mock

import jax
import numpy as np
import optax
import pytest

from benchmarks.flops import flops
from protoseg_jax import config as configs
from protoseg_jax import inference as inferences
from protoseg_jax import losses, models
from protoseg_jax.devices import DevicePool
from protoseg_jax.errors import UserError
from protoseg_jax.models.prototypes import equal_blocks
from protoseg_jax.run import phases
from protoseg_jax.training import optimizer
from protoseg_jax.training import step as steps

C, K, SIZE = 4, 3, (33, 33)
MAP = (17, 17)


def make_config(reduction="present"):
    """A small U-Net, which compiles fast: what is tested here is the step."""
    config = configs.default()
    config.eval_size = SIZE
    config.model.update({"backbone": "unet", "depth": 1, "width": 8, "output_stride": 2})
    config.model.update({"features": 8, "preprocessing": "imagenet"})
    config.loss.diversity_reduction = reduction
    return config


def make_resnet_config():
    config = make_config()
    config.model.update({"backbone": "resnet", "depth": 14, "norm": "group", "output_stride": 8})
    config.model.update({"aspp_rates": (1, 2), "stride_in": "3x3"})
    return config


NEW = {"decoder": 1e-3, "prototypes": 1e-3}
JOINT = phases.Phase("joint", "train", 10, {"backbone": 1e-3, **NEW}, "poly")
WARMUP = phases.Phase("warmup", "train", 10, NEW)
FINETUNE = phases.Phase("finetune", "train", 10, {"head": 1e-2})


PHASES = {phase.name: phase for phase in (WARMUP, JOINT, FINETUNE)}


def setup(config):
    inference = inferences.from_config(config, C, equal_blocks(C * K, C))
    images = np.zeros((1, *SIZE, 3), np.float32)
    return inference, jax.jit(inference.model.init)(jax.random.key(0), images)["params"]


@functools.cache
def made():
    """`setup` of the small U-Net, which no reduction changes."""
    return setup(make_config())


def make_batch(size=8):
    """Uneven content: void, absent classes, an image that is all void."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, C, (size, 5, 5)).repeat(7, 1).repeat(7, 2)[:, :33, :33]
    labels[1] = 255
    labels[2, :20] = 255
    labels[3] = 1
    return {
        "image": rng.integers(0, 256, (size, *SIZE, 3)).astype(np.uint8),
        "label": labels.astype(np.uint8),
    }


def plain_step(inference, phase, config, *, accumulate=1, sizes=(MAP,)):
    terms = losses.terms(config.loss, inference.classes, inference.num_classes)
    return steps.make_step(
        inference,
        phase,
        terms,
        models.decay(config.model),
        accumulate=accumulate,
        feature_sizes=sizes,
    )


def mapped_step(pool, *arguments, **options):
    return pool.map(plain_step(*arguments, **options))


def init_state(params, phase, config=None):
    return steps.init_state(params, phase, models.decay((config or make_config()).model))


@functools.cache
def stepped(phase_name, devices, accumulate, reduction):
    """One program for all runs of it, and its devices."""
    pool, (inference, _) = DevicePool(jax.local_devices()[:devices]), made()
    config = make_config(reduction)
    return mapped_step(pool, inference, PHASES[phase_name], config, accumulate=accumulate), pool


@functools.cache
def run(phase_name, devices, accumulate=1, count=1, reduction="present"):
    step, pool = stepped(phase_name, devices, accumulate, reduction)
    return run_on(pool, phase_name, count, step=step)


def sgd_on(pool, batch=None):
    """The parameters after five steps of plain SGD on the joint phase's gradients.

    Adam's first steps are hardly more than the gradient's sign, and would turn a rounding error
    where the gradient is nearly 0 into a whole step.
    """
    with mock.patch.object(optimizer, "make", lambda phase, trainable, rules: optax.sgd(0.05)):
        state, _ = run_on(pool, "joint", count=5, batch=batch)
    return state.trainable


@functools.cache
def sgd(devices):
    return sgd_on(DevicePool(jax.local_devices()[:devices]))


def assert_same_after_sgd(first, second):
    _, start = made()
    leaves = jax.tree_util.tree_leaves_with_path(first)
    for (path, a), b in zip(leaves, jax.tree.leaves(second), strict=True):
        where = jax.tree_util.keystr(path)
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a), where
        begun = functools.reduce(lambda tree, key: tree[key.key], path, start)
        assert np.linalg.norm(a - begun) > 1e-4 * np.linalg.norm(a), f"{where} has hardly moved"


def run_on(pool, phase_name, count=1, batch=None, step=None):
    """(state, metrics) after `count` steps on a batch (its part, with several processes)."""
    phase, (inference, params) = PHASES[phase_name], made()
    step = step or mapped_step(pool, inference, phase, make_config())
    _, frozen = steps.split(params, phase)
    state = pool.replicate(init_state(params, phase))
    batch = make_batch() if batch is None else batch
    for _ in range(count):
        state, metrics = step(state, pool.replicate(frozen), {}, pool.shard(batch))
    metrics = {k: float(np.asarray(v.addressable_shards[0].data)[0]) for k, v in metrics.items()}
    return pool.first(state), metrics


def first_gradient(state):
    """After one step Adam's first moment is (1 − β₁) times the gradient (with its decay)."""
    moments = state.moments.inner_states
    return [
        leaf.astype(np.float64)
        for group in sorted(moments)
        for adam in jax.tree.leaves(
            moments[group], is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState)
        )
        if isinstance(adam, optax.ScaleByAdamState)
        for leaf in jax.tree.leaves(adam.mu)
    ]


def assert_same_gradients(first, second, tolerance=1e-5):
    pairs = list(zip(first_gradient(first), first_gradient(second), strict=True))
    assert len(pairs) == len(jax.tree.leaves(first.trainable)) > 10
    for a, b in pairs:
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(a) + 1e-9


@pytest.mark.parametrize(
    ("devices", "reduction"),
    [
        (4, "present"),
        (4, "all_classes"),
        *(pytest.param(n, "present", marks=pytest.mark.slow) for n in (2, 8)),
    ],
)
def test_several_devices_compute_what_one_computes(devices, reduction):
    one, metrics_one = run("joint", 1, reduction=reduction)
    several, metrics_several = run("joint", devices, reduction=reduction)
    assert_same_gradients(one, several)
    assert metrics_one == pytest.approx(metrics_several, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_several_devices_learn_what_one_learns(devices):
    assert_same_after_sgd(sgd(1), sgd(devices))


@pytest.mark.slow
def test_multi_scale_losses_are_the_mean_over_the_outputs():
    """Each output's own labels and loss; several devices and micro-batches compute the same."""
    config = make_config()
    config.model.msc = (0.5,)
    inference, params = setup(config)
    batch, sizes = make_batch(), [MAP, (8, 8), MAP]
    outputs = jax.jit(inference.outputs)({"params": params}, batch["image"])
    assert [o.logits.shape[1:3] for o in outputs] == sizes
    terms = []
    for output, (h, w) in zip(outputs, sizes, strict=True):
        rows, cols = ((2 * np.arange(n) + 1) * 33 // (2 * n) for n in (h, w))
        labels = batch["label"][:, rows][:, :, cols]
        log_p, valid = np.asarray(jax.nn.log_softmax(output.logits)), labels != 255
        losses = -log_p[valid][np.arange(valid.sum()), labels[valid]]
        terms.append(losses.mean())
    for devices, accumulate in ((1, 1), (2, 2)):
        pool = DevicePool(jax.local_devices()[:devices])
        step = mapped_step(pool, inference, JOINT, config, accumulate=accumulate, sizes=sizes)
        _, frozen = steps.split(params, JOINT)
        state = pool.replicate(init_state(params, JOINT))
        _, metrics = step(state, pool.replicate(frozen), {}, pool.shard(batch))
        assert float(metrics["cross_entropy"][0]) == pytest.approx(np.mean(terms), rel=1e-5)
        assert 0 < float(metrics["diversity"][0]) <= 1


def test_accumulation_changes_nothing():
    whole, metrics_whole = run("joint", 1)
    parts, metrics_parts = run("joint", 2, accumulate=2)
    assert_same_gradients(whole, parts)
    assert metrics_whole == pytest.approx(metrics_parts, rel=1e-5)


@pytest.mark.parametrize("phase", [WARMUP, JOINT, FINETUNE], ids=lambda p: p.name)
def test_a_phase_moves_its_groups_and_only_those(phase):
    _, params = made()
    state, metrics = run(phase.name, 1)
    assert set(state.trainable) == set(phase.learning_rates)
    for group, tree in state.trainable.items():
        moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), tree, params[group])
        assert any(jax.tree.leaves(moved)), group
    assert (metrics["l1"] > 0) == (phase is FINETUNE)
    expected = metrics["cross_entropy"] + 0.25 * metrics["diversity"] + 1e-4 * metrics["l1"]
    assert metrics["loss"] == pytest.approx(expected, rel=1e-6)


def test_training_lowers_the_loss():
    _, first = run("joint", 1)
    _, last = run("joint", 1, count=8)
    assert last["cross_entropy"] < first["cross_entropy"]


def test_all_void_batch_is_finite():
    _, params = made()
    step, pool = stepped("joint", 1, 1, "present")
    void = {**make_batch(), "label": np.full((8, *SIZE), 255, np.uint8)}
    _, frozen = steps.split(params, JOINT)
    state = pool.replicate(init_state(params, JOINT))
    state, metrics = step(state, pool.replicate(frozen), {}, pool.shard(void))
    assert float(metrics["loss"][0]) == 0.0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(pool.first(state.trainable)))


def literal_adam(p, gradients, rates, decay):
    """PyTorch's Adam with coupled L2, step by step."""
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        g = g + decay * p
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        p = p - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return p


def test_optimizer_is_adam_with_coupled_decay_where_the_method_has_it():
    rng = np.random.default_rng(0)
    tree = {
        "backbone": {
            "conv1": {"kernel": rng.normal(size=3)},
            "norm1": {"scale": rng.normal(size=3)},
        },
        "aspp": {"conv_0": {"kernel": rng.normal(size=3), "bias": rng.normal(size=3)}},
        "prototypes": {"vectors": rng.normal(size=3)},
    }
    tree = jax.tree.map(np.float32, tree)
    rates = {"backbone": 1e-3, "aspp": 1e-2, "prototypes": 1e-2}
    phase = phases.Phase("joint", "train", 5, rates, "poly")
    transform = optimizer.make(phase, tree, models.decay(make_resnet_config().model))
    # Small beside the parameters, so that the decay makes up a part of them that shows.
    gradients = [
        jax.tree.map(lambda x: np.float32(rng.normal(0, 0.01, x.shape)), tree) for _ in "123"
    ]
    state, params = transform.init(tree), tree
    for g in gradients:
        updates, state = transform.update(g, state, params)
        params = optax.apply_updates(params, updates)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, got in leaves:
        keys = [k.key for k in path]
        decay = 5e-4 if keys[-1] == "kernel" or keys[0] == "aspp" else 0.0
        schedule = [rates[keys[0]] * (1 - t / 5) ** 0.9 for t in range(3)]
        series = [dict(jax.tree_util.tree_leaves_with_path(g))[path] for g in gradients]
        start = dict(jax.tree_util.tree_leaves_with_path(tree))[path]
        np.testing.assert_allclose(got, literal_adam(start, series, schedule, decay), rtol=2e-5)


@pytest.mark.slow
def test_frozen_groups_cost_nothing():
    """Warm-up has no backward pass through the ResNet, fine-tuning keeps to w_h."""
    config = make_resnet_config()
    config.model.width = 32
    inference, params = setup(config)
    data = make_batch()
    base = flops(lambda p, x: inference({"params": p}, x).logits, params, data["image"])
    warmup = phases.Phase("warmup", "train", 10, {"aspp": 1e-3, "prototypes": 1e-3})
    joint = phases.Phase("joint", "train", 10, {**warmup.learning_rates, "backbone": 1e-3})
    costs = {}
    for phase in (warmup, joint, FINETUNE):
        step = plain_step(inference, phase, config, sizes=((5, 5),))
        _, frozen = steps.split(params, phase)
        state = init_state(params, phase, config)
        costs[phase.name] = flops(step, state, frozen, {}, data) / base
    assert 1 < costs["warmup"] <= 1.25 and 1 < costs["finetune"] <= 1.1
    assert costs["joint"] > 2.5  # the same figure where nothing is frozen


def test_a_group_that_no_decay_rule_covers_is_refused():
    """Not silently left without decay."""
    tree = {"backbone": {"kernel": np.ones(3)}, "neck": {"kernel": np.ones(3)}}
    phase = phases.Phase("joint", "train", 5, {"backbone": 1e-3, "neck": 1e-3})
    with pytest.raises(UserError, match="no decay rule covers the parameter group neck"):
        optimizer.make(phase, tree, models.decay(make_config().model))


def test_phases_of_a_black_box_have_the_same_budget():
    config = make_resnet_config()
    config.model.head = "linear"
    training = {"learning_rates": {"aspp": 1e-3, "head": 1.0}, "schedule": "constant"}
    config.phases = {n: {"steps": 5, **training} for n in ("warmup", "joint", "finetune")}
    config.phases.projection = {"steps": 1}
    found = phases.from_config(config)
    assert [(p.name, p.steps) for p in found] == [("warmup", 5), ("joint", 10)]
    assert all(set(p.learning_rates) == {"aspp"} for p in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"warm": {"steps": 1}}, "phases.warm is no phase"),
        ({"warmup": {"steps": -1}}, "must not be negative"),
        ({"warmup": {"steps": 1, "learning_rates": {"aps": 1.0}, "schedule": "poly"}}, "aps"),
        ({"warmup": {"steps": 1, "learning_rates": {}, "schedule": "cosine"}}, "cosine"),
    ],
)
def test_bad_phases_are_refused(change, message):
    config = make_resnet_config()
    config.phases = change
    with pytest.raises(UserError, match=message):
        phases.from_config(config)


def test_a_batch_that_does_not_divide_is_refused():
    pool = DevicePool(jax.local_devices()[:4])
    pool.check_batch(8)
    pool.check_batch(8, accumulate=2)
    for size, accumulate in ((6, 1), (0, 1), (-4, 1), (8, 4), (8, 0)):
        with pytest.raises(UserError, match="batch_size|accumulate"):
            pool.check_batch(size, accumulate)
