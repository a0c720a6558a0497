"""Data sets: what is read is what lies on disk; changed sources; what is wrong gets one line."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from protoseg_jax.data import prepare
from protoseg_jax.data.labels import VOID
from protoseg_jax.data.sets import parts as parts_set
from protoseg_jax.errors import UserError
from tests.data.opened import SIZES, config_of, everything, make_folder
from tests.data.opened import load as load_named


def load(root, tmp_path, **options):
    return load_named("folder", root, tmp_path, **options)


def by_id(data):
    return {e["image_id"]: e for split in data.splits for e in everything(data.source(split))}


def test_folder_round_trip_in_several_sizes(tmp_path):
    root = make_folder(tmp_path / "own", void=9)
    data = load(root, tmp_path, **{"data.void": 9})
    assert data.splits == {"train": 8, "validation": 2}
    assert data.labels.names == ("sky", "sea", "land")
    examples = by_id(data)
    assert len(examples) == 10
    for stem, example in examples.items():
        np.testing.assert_array_equal(
            example["image"], np.array(Image.open(root / "images" / f"{stem}.png"))
        )
        raw = np.array(Image.open(root / "masks" / f"{stem}.png"))
        np.testing.assert_array_equal(example["label"], np.where(raw == 9, VOID, raw))
    labels = np.concatenate([e["label"].ravel() for e in everything(data.source("train"))])
    assert data.class_pixels("train").tolist() == [int((labels == c).sum()) for c in range(3)]
    assert data.label_size("train") == (40, 40)


def test_sources_travel_to_worker_processes(tmp_path):
    data = load(make_folder(tmp_path / "own"), tmp_path)
    source = data.source("train")
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[3]["image"], source[3]["image"])


def test_split_lists_are_followed(tmp_path):
    root = make_folder(tmp_path / "own")
    (root / "train.txt").write_text("im3\nim1\n")
    (root / "validation.txt").write_text("im2\n")
    data = load(root, tmp_path)
    assert [e["image_id"] for e in everything(data.source("train"))] == ["im3", "im1"]
    assert [e["image_id"] for e in everything(data.source("validation"))] == ["im2"]


def test_a_changed_file_is_read_anew(tmp_path):
    root = make_folder(tmp_path / "own")
    before = by_id(load(root, tmp_path))["im0"]["image"]
    Image.fromarray(255 - before).save(root / "images" / "im0.png")
    after = by_id(load(root, tmp_path))["im0"]["image"]
    np.testing.assert_array_equal(after, 255 - before)


def test_camvid_layout(tmp_path):
    rng = np.random.default_rng(0)
    for split, suffix in (("train", "jpg"), ("val", "png")):
        (tmp_path / split).mkdir()
        (tmp_path / f"{split}annot").mkdir()
        for n in range(3):
            pixels = rng.integers(0, 256, (12, 16, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / f"{split}{n}.{suffix}")
            mask = rng.integers(0, 12, (12, 16)).astype(np.uint8)
            Image.fromarray(mask).save(tmp_path / f"{split}annot" / f"{split}{n}.png")
    data = load_named("camvid", tmp_path, tmp_path)
    assert data.splits == {"train": 3, "validation": 3}
    example = data.source("validation")[1]
    raw = np.array(Image.open(tmp_path / "valannot" / "val1.png"))
    np.testing.assert_array_equal(example["label"], np.where(raw == 11, VOID, raw))
    assert len(data.labels) == 11


def spoil_missing_mask(root):
    (root / "masks" / "im4.png").unlink()


def spoil_size(root):
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(root / "masks" / "im4.png")


def spoil_value(root):
    Image.fromarray(np.full(SIZES[1], 77, np.uint8)).save(root / "masks" / "im4.png")


def spoil_image(root):
    (root / "images" / "im4.png").write_bytes(b"not a picture")


def spoil_mask(root):
    (root / "masks" / "im4.png").write_bytes(b"not a picture")


def spoil_colour_mask(root):
    red = np.full((*SIZES[1], 3), (255, 0, 0), np.uint8)
    Image.fromarray(red).save(root / "masks" / "im4.png")


def spoil_classes(root):
    (root / "classes.txt").unlink()


def spoil_list(root):
    (root / "train.txt").write_text("im1\nnobody\n")
    (root / "validation.txt").write_text("im2\n")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_missing_mask, ["im4.png", "no mask"]),
        (spoil_size, ["im4.png", "33×21", "5×5"]),
        (spoil_value, ["im4.png", "77"]),
        (spoil_image, ["im4.png", "does not decode"]),
        (spoil_mask, ["im4.png", "does not decode"]),
        (spoil_colour_mask, ["im4.png", "in colour (#ff0000 693 pixels)", "classes.txt"]),
        (spoil_classes, ["classes.txt"]),
        (spoil_list, ["train.txt", "nobody"]),
    ],
)
def test_bad_folders_get_one_line_and_leave_nothing(tmp_path, spoil, words):
    root = make_folder(tmp_path / "own")
    spoil(root)
    with pytest.raises(UserError) as caught:
        load(root, tmp_path)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").glob("folder-*")) == []


@pytest.mark.parametrize(
    ("name", "data_dir", "words"),
    [
        ("cityscape", None, "unknown"),
        ("folder", None, "data.dir"),
        ("folder", "/nowhere/at/all", "does not exist"),
        ("camvid", "/nowhere/at/all", "does not exist"),
    ],
)
def test_bad_requests(tmp_path, name, data_dir, words):
    with pytest.raises(UserError, match=words):
        load_named(name, data_dir, tmp_path)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    cache = tmp_path_factory.mktemp("parts")
    sizes = {"train": 24, "validation": 12, "test": 12}
    dataset = parts_set.open(config_of("parts", None, cache, seed=3), sizes)
    return prepare.prepare(dataset, cache)


def test_parts_is_decided_by_its_seed(parts):
    image, label, part = parts_set.scene(3, 1, 5)
    stored = parts.source("validation")[5]
    for name, array in (("image", image), ("label", label), ("parts", part)):
        np.testing.assert_array_equal(stored[name], array)
    assert (parts_set.scene(4, 1, 5)[0] != image).any()


def test_every_class_and_every_part_is_there(parts):
    for split in parts.splits:
        assert (parts.class_pixels(split) > 0).all()
    owners = {}
    for example in everything(parts.source("train")):
        for number in np.unique(example["parts"]):
            owners.setdefault(int(number), set()).update(
                np.unique(example["label"][example["parts"] == number]).tolist()
            )
    assert sorted(owners) == list(range(len(parts.part_names)))
    assert owners.pop(0) == {0}
    assert all(len(classes) == 1 for classes in owners.values())
    for c, name in enumerate(parts.labels.names[1:], 1):
        own = [p for p, classes in owners.items() if classes == {c}]
        assert len(own) >= 4
        assert all(parts.part_names[p].startswith(name) for p in own)


def test_colour_alone_cannot_solve_parts(parts):
    """The best guess from a pixel's colour bin, learnt and scored on the very same pixels."""
    examples = everything(parts.source("train"))
    colours = np.concatenate([e["image"].reshape(-1, 3) // 64 for e in examples]).astype(int)
    labels = np.concatenate([e["label"].ravel() for e in examples])
    bins = colours @ [16, 4, 1]
    counts = np.zeros((64, 6))
    np.add.at(counts, (bins, labels), 1)
    guess = (counts / counts.sum(0)).argmax(1)[bins]
    iou = [
        ((guess == c) & (labels == c)).sum() / ((guess == c) | (labels == c)).sum()
        for c in range(6)
    ]
    assert np.mean(iou) < 0.3


def test_a_prepared_folder_is_found_again(parts):
    """Its name is part of what a cache holds: another one would prepare everything anew."""
    dataset = parts_set.open(config_of("parts", None, ""))
    assert prepare.fingerprint(dataset.source) == "5a9e4052fde2401c"
    assert parts.folder.endswith("parts/1.0.0")


def test_a_data_set_from_outside(tmp_path, monkeypatch, capsys):
    """By dotted path; its classes need no preparing, and are asked of `open` if it must be."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "dots.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    config = config_of("mine.dots", None, tmp_path / "cache")
    assert prepare.labels_of(config).names == ("ground", "dot")
    assert not (tmp_path / "cache").exists()
    data = prepare.open_data(config)
    assert data.splits == {"train": 3, "validation": 2} and data.name == "dots"
    assert data.source("train")[2]["image_id"] == "train2"
    assert data.class_pixels("validation").tolist() == [46, 2]
    assert data.submission("validation", "a", np.zeros((2, 2), np.uint8))[0] == "a.png"
    assert "preparing dots train: image 3/3" in capsys.readouterr().err
    with pytest.raises(
        UserError, match="split 'test' does not exist in data set 'dots'; it has tr"
    ):
        data.source("test")


OUTSIDE = """
import numpy as np
from protoseg_jax import images
from protoseg_jax.data import prepare
from protoseg_jax.data.labels import generic

def open(config):
    def example(split, number):
        label = np.zeros((4, 6), np.uint8)
        label[1, number] = 1
        grey = 200 * label[..., None] + (split == "train")  # else validation has these very images
        image = images.encode(np.repeat(grey.astype(np.uint8), 3, 2))
        return prepare.Example(f"{split}{number}", image, label)

    splits = {"train": range(3), "validation": range(2)}
    return prepare.DataSet("dots", generic(["ground", "dot"]), splits, example, [config.seed])
"""


def test_what_lies_damaged_in_the_cache(tmp_path):
    data = load(make_folder(tmp_path / "own"), tmp_path)
    (records,) = Path(data.folder).glob("folder-train.array_record*")
    content = bytearray(records.read_bytes())
    content[200:-200] = bytes(len(content) - 400)
    records.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read; delete that folder"):
        everything(data.source("train"))
    shutil.rmtree(data.folder)
    with pytest.raises(UserError, match="cannot be read .*; start the same command again"):
        data.source("train")


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="data cache .* cannot be written .*; set data.cache"):
        load(make_folder(tmp_path / "own"), tmp_path)


def test_no_tensorflow(tmp_path):
    code = (
        "import sys; from opened import config_of\n"
        "from protoseg_jax.data import prepare; from protoseg_jax.data.sets import parts\n"
        f"config = config_of('parts', None, {str(tmp_path)!r})\n"
        "prepare.prepare(parts.open(config, {'train': 2}), config.data.cache).source('train')[0]\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
