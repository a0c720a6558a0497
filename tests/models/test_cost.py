"""Frozen groups cost nothing: XLA's FLOPs of the compiled gradient over the forward pass's."""

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from protoseg_jax import models

CONFIG = ml_collections.ConfigDict(
    {
        "backbone": "resnet",
        "depth": 101,
        "width": 64,
        "norm": "frozen_batch",
        "stride_in": "3x3",
        "output_stride": 8,
        "aspp_rates": (6, 12, 18, 24),
        "head": "prototypes",
        "features": 64,
    }
)


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


@pytest.fixture(scope="module")
def network():
    """The published model on a crop of 321², shapes only."""
    model = models.build(CONFIG, 21, 210, jnp.float32)
    images = jax.ShapeDtypeStruct((1, 321, 321, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return model, variables, images, flops(model.apply, variables, images)


@pytest.mark.parametrize(
    ("groups", "most"), [(("aspp", "prototypes"), 1.25), (("head",), 1.1)], ids=["warmup", "head"]
)
def test_frozen_groups_cost_nothing(network, groups, most):
    model, variables, images, forward = network
    trainable = {g: variables["params"][g] for g in groups}
    rest = {g: p for g, p in variables["params"].items() if g not in groups}

    def loss(trainable, rest, frozen, images):
        output = model.apply({"params": {**rest, **trainable}, "frozen": frozen}, images)
        return jnp.square(output.logits).sum() + output.distances.sum()

    cost = flops(jax.value_and_grad(loss), trainable, rest, variables["frozen"], images)
    assert forward > 140e9, "the count misses part of the network"
    # A backward pass is in there at all: were it hidden, or cut off, nothing would be added.
    assert forward < cost <= most * forward
