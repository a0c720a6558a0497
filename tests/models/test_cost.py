"""Frozen groups cost nothing: XLA's FLOPs of the compiled train step over the forward pass's."""

import flops
import pytest


@pytest.fixture(scope="module")
def counted():
    """The published network on a crop of 321²; nothing is run."""
    return flops.count(("warmup", "finetune"))


@pytest.mark.parametrize(("phase", "most"), [("warmup", 1.25), ("finetune", 1.1)])
def test_frozen_groups_cost_nothing(counted, phase, most):
    forward, cost = counted["forward"], counted[phase]
    assert forward > 140e9, "the count misses part of the network"
    # A backward pass is in there at all: were it hidden, or cut off, nothing would be added.
    assert forward < cost <= most * forward
