"""Batches: decided by seed and step alone, whatever the workers; evaluation sees all once."""

import itertools

import numpy as np
import pytest

from protoseg_jax.data import pipeline, prepare
from protoseg_jax.data.augment import Augment
from protoseg_jax.data.labels import VOID
from protoseg_jax.data.sets import parts
from tests.data.opened import config_of

AUGMENT = Augment((40, 56), (0.5, 1.5), (124, 116, 104))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    dataset = parts.open(config_of("parts", None, cache), {"train": 14})
    return prepare.prepare(dataset, cache).source("train")


def train(source, **changes):
    options = {"batch_size": 4, "seed": 0, "start": 0, "workers": 0, **changes}
    return pipeline.train_batches(source, AUGMENT, **options)


def same(a, b):
    assert a.keys() == b.keys()
    return all(np.array_equal(a[k], b[k]) for k in a)


def test_a_batch_is_a_function_of_seed_and_step(source):
    first = list(itertools.islice(train(source), 9))
    assert first[0]["image"].shape == (4, 40, 56, 3) and first[0]["label"].shape == (4, 40, 56)
    again = list(itertools.islice(train(source), 9))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    for start in (1, 3, 7):  # across an epoch's end, which falls inside batch 3
        assert same(next(train(source, start=start)), first[start])
    assert not same(next(train(source, seed=1)), first[0])
    assert not any(same(a, b) for a, b in itertools.combinations(first, 2))


def test_worker_processes_change_nothing(source):
    expected = list(itertools.islice(train(source, start=2), 5))
    got = list(itertools.islice(train(source, start=2, workers=2), 5))
    assert all(same(a, b) for a, b in zip(expected, got, strict=True))


def test_an_epoch_holds_every_example_once():
    class Numbers:
        """14 examples of one grey each."""

        def __len__(self):
            return 14

        def __getitem__(self, n):
            image = np.full((40, 56, 3), 10 * n, np.uint8)
            return {"image": image, "label": np.zeros((40, 56), np.uint8)}

    plain = Augment((40, 56), (1.0, 1.0), (0, 0, 0))
    batches = pipeline.train_batches(Numbers(), plain, batch_size=7, seed=5, start=0)
    greys = [b["image"][:, 0, 0, 0] // 10 for b in itertools.islice(batches, 6)]
    epochs = [np.concatenate(greys[n : n + 2]) for n in (0, 2, 4)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(14))
    assert not np.array_equal(epochs[0], epochs[1])  # each epoch in its own order


class Mixed:
    """Five examples of three sizes."""

    SIZES = ((30, 70), (65, 20), (30, 70), (128, 64), (10, 10))

    def __len__(self):
        return 5

    def __getitem__(self, n):
        h, w = self.SIZES[n]
        label = np.full((h, w), n, np.uint8)
        return {"image": np.full((h, w, 3), 40 * n, np.uint8), "label": label}


def test_evaluation_sees_every_example_once_at_one_size():
    batches = list(pipeline.eval_batches(Mixed(), eval_size=(24, 32), batch_size=2))
    assert [b["index"].tolist() for b in batches] == [[0, 1], [2, 3], [4, -1]]
    for batch in batches:
        assert batch["image"].shape == (2, 24, 32, 3)
        assert all(side % 64 == 0 for side in batch["label"].shape[1:])
        for n, (h, w), label, image in zip(
            batch["index"], batch["size"], batch["label"], batch["image"], strict=True
        ):
            if n < 0:
                assert (label == VOID).all()
                continue
            assert (h, w) == Mixed.SIZES[n]
            assert (label[:h, :w] == n).all() and (label[h:] == VOID).all()
            assert (label[:, w:] == VOID).all() and (image == 40 * n).all()


def test_a_huge_label_shares_no_canvas_with_small_ones(monkeypatch):
    monkeypatch.setattr(pipeline, "_HUGE", 500)
    monkeypatch.setattr(pipeline, "_UNLIKE", 3)
    batches = list(pipeline.eval_batches(Mixed(), eval_size=(24, 32), batch_size=2))
    areas = [int(np.prod(size)) for size in Mixed.SIZES]
    index = [b["index"].tolist() for b in batches]
    assert [n for of in index for n in of if n >= 0] == list(range(5)) and len(index) > 3
    for of in index:
        own = [areas[n] for n in of if n >= 0]
        assert max(own) <= max(500, 3 * min(own))
    # Two processes would not agree.
    parts = [
        len(list(pipeline.eval_batches(Mixed(), eval_size=(24, 32), batch_size=2, part=(p, 2))))
        for p in range(2)
    ]
    assert parts == [2, 2]


@pytest.mark.parametrize(("start", "number"), [(2, 0), (3, 1), (5, 0)])
def test_evaluation_goes_on_from_an_example_for_a_part(start, number):
    """As a search does that was interrupted, in one of two processes."""
    options = {"eval_size": (24, 32), "batch_size": 1, "start": start, "part": (number, 2)}
    batches = list(pipeline.eval_batches(Mixed(), **options))
    seen = [int(n) for batch in batches for n in batch["index"]]
    own = list(range(start + number, 5, 2))
    assert seen == own + [-1] * (-(-(5 - start) // 2) - len(own))


def test_evaluation_in_worker_processes_keeps_the_order(source):
    options = {"eval_size": (64, 64), "batch_size": 4}
    expected = list(pipeline.eval_batches(source, **options))
    got = list(pipeline.eval_batches(source, **options, workers=2))
    assert len(expected) == len(got) == 4
    assert all(same(a, b) for a, b in zip(expected, got, strict=True))
