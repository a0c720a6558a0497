"""The EM challenge's builder: both layouts, the seeded split, kinds of TIFF, bad input."""

import numpy as np
import pytest
from PIL import Image

from protoseg_jax.data.labels import VOID
from protoseg_jax.data.source import statistics
from protoseg_jax.errors import UserError
from tests.data.opened import load as load_named
from tests.data.sections import BAD, make_folders, make_stacks, write_stack


def load(root, seed=0):
    return load_named("isbi_em", root / "em", root, seed=seed)


@pytest.mark.parametrize("make", [make_stacks, make_folders])
def test_both_layouts_hold_the_same(tmp_path, make):
    sections = make(tmp_path / "em", count=12)
    data = load(tmp_path)
    assert data.splits == {"train": 8, "validation": 4}
    assert data.labels.names == ("membrane", "inside")
    seen = {}
    for split, count in data.splits.items():
        source = data.source(split)
        for number in range(count):
            example = source[number]
            assert example["image_id"] == data.drawn[split][number]
            seen[int(example["image_id"])] = example
    assert sorted(seen) == list(range(12))
    for number, (image, label) in enumerate(sections):
        np.testing.assert_array_equal(seen[number]["image"], np.repeat(image[..., None], 3, 2))
        np.testing.assert_array_equal(seen[number]["label"], label // 255)


def test_thirty_sections_are_split_into_twenty_and_ten_by_the_seed(tmp_path):
    make_stacks(tmp_path / "em", count=30, size=16)
    splits = [load(tmp_path, seed).drawn for seed in (0, 0, 1)]
    assert {s: len(names) for s, names in splits[0].items()} == {"train": 20, "validation": 10}
    assert splits[0] == splits[1] != splits[2]


def test_test_sections_have_no_labels(tmp_path):
    make_stacks(tmp_path / "em", test=3)
    data = load(tmp_path)
    assert data.splits["test"] == 3 and not data.labelled("test")
    assert (data.source("test")[0]["label"] == VOID).all()


def test_statistics_are_of_the_training_part_alone(tmp_path):
    make_stacks(tmp_path / "em")
    data = load(tmp_path)
    source = data.source("train")
    images = np.stack([source[n]["image"] for n in range(len(source))]).astype(float)
    mean, std = statistics(source)
    np.testing.assert_allclose(mean, images.mean((0, 1, 2)))
    np.testing.assert_allclose(std, images.std((0, 1, 2)))


@pytest.mark.parametrize(
    "convert",
    [
        lambda a: a.astype(np.uint16),
        lambda a: a.astype(np.uint16) * 257,
        lambda a: np.repeat(a[..., None], 3, 2),
    ],
    ids=["16-bit holding 8", "16-bit full", "grey as RGB"],
)
def test_what_clearly_means_8_bit_grey(tmp_path, convert):
    sections = make_stacks(tmp_path / "em")
    write_stack(tmp_path / "em" / "train-volume.tif", [convert(image) for image, _ in sections])
    data = load(tmp_path)
    example = data.source("train")[0]
    np.testing.assert_array_equal(example["image"][..., 0], sections[int(example["image_id"])][0])


def one_and_zero(sections):
    return [label // 255 for _, label in sections]


def test_labels_of_one_and_zero(tmp_path):
    sections = make_stacks(tmp_path / "em")
    write_stack(tmp_path / "em" / "train-labels.tif", one_and_zero(sections))
    example = load(tmp_path).source("train")[0]
    np.testing.assert_array_equal(example["label"], sections[int(example["image_id"])][1] // 255)


@pytest.mark.parametrize("name", BAD)
def test_bad_stacks(tmp_path, name):
    spoil, words = BAD[name]
    make_stacks(tmp_path / "em")
    spoil(tmp_path / "em")
    with pytest.raises(UserError, match=words):
        load(tmp_path)
    assert not list((tmp_path / "cache").glob("isbi_em-*"))


def test_bad_folders(tmp_path):
    make_folders(tmp_path / "em")
    (tmp_path / "em" / "label" / "3.png").unlink()
    with pytest.raises(UserError, match="section '3' .* has a file in image/ but none in label/"):
        load(tmp_path)
    Image.new("L", (64, 64)).save(tmp_path / "em" / "label" / "3.png")
    (tmp_path / "em" / "image" / "3.png").write_bytes(b"")
    with pytest.raises(UserError, match="3.png does not decode"):
        load(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "elsewhere")


@pytest.mark.parametrize("make", [make_stacks, make_folders])
def test_the_authors_split_goes_by_the_numbers(tmp_path, make):
    make(tmp_path / "em", count=12, size=16)
    data = load_named("isbi_em", tmp_path / "em", tmp_path, **{"data.split": "authors"})
    assert [int(n) for n in data.drawn["validation"]] == [1, 4, 7, 10]
    assert [int(n) for n in data.drawn["train"]] == [0, 2, 3, 5, 6, 8, 9, 11]


def test_a_split_that_there_is_not(tmp_path):
    make_folders(tmp_path / "em", count=3, size=16)
    with pytest.raises(UserError, match="is no split of isbi_em"):
        load_named("isbi_em", tmp_path / "em", tmp_path, **{"data.split": "paper"})
    for folder in ("image", "label"):
        path = next((tmp_path / "em" / folder).iterdir())
        path.rename(path.with_name("first.png"))
    with pytest.raises(UserError, match="'first' has no number"):
        load_named("isbi_em", tmp_path / "em", tmp_path, **{"data.split": "authors"})
