"""Runs killed at random moments end bit-identical; SIGTERM and Ctrl-C save first."""

import random
import signal

import kill
import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("kill")
    return scratch, *kill.undisturbed(scratch)


@pytest.mark.parametrize("number", range(5))
def test_sigkill_at_random_moments(reference, number):
    scratch, expected, took = reference
    got, _ = kill.trial(scratch, number, took, random.Random(number), signal.SIGKILL)
    assert kill.differences(got, expected) == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(reference, signum):
    scratch, expected, took = reference
    number = 100 + signum
    got, _ = kill.trial(scratch, number, took, random.Random(number), signum)
    assert kill.differences(got, expected) == []
