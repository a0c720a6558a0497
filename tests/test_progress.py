"""Plain lines of long work: how often, and what they say is left."""

import itertools

import pytest

from protoseg_jax import progress
from protoseg_jax.progress import Progress


@pytest.fixture
def told(monkeypatch):
    """The lines that are said, where every look at the clock is 4 seconds after the one before."""
    lines, clock = [], itertools.count(100, 4)
    monkeypatch.setattr(progress, "say", lines.append)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False, raising=False)
    return lines


def test_what_is_left_is_told_by_the_time_since_the_first(told):
    with Progress("work", 9, 2) as bar:  # two were done before
        for _ in range(7):
            bar.update(1)
    assert told == [
        "work: step 3/9",  # how long the next takes is not known: this one compiled
        "work: step 6/9, 0:00:12 left",
        "work: step 9/9, 0:00:00 left",
    ]


def test_brief_work_says_nothing(told):
    assert list(Progress.over("ab", "work", "letter")) == ["a", "b"]
    assert told == []


def test_brief_work_that_lasts_is_told_to_its_end(told):
    list(Progress.over("abcd", "work", "letter"))
    assert told == ["work: letter 3/4, 0:00:04 left", "work: letter 4/4, 0:00:00 left"]


def test_the_loss_is_told(told):
    with Progress("joint", 10, 0) as bar:
        bar.update(10, loss=0.5, rate=3.0)
    assert told == ["joint: step 10/10, loss 0.5000, 3.0 images/s"]
