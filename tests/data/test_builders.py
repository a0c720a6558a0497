"""Builders: what is read is what lies on disk; changed sources; what is wrong gets one line."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from protoseg_jax.data import builders
from protoseg_jax.data.builders.base import SegmentationData
from protoseg_jax.data.builders.parts import Parts, scene, sheet
from protoseg_jax.data.label_sets import PARTS, VOID
from protoseg_jax.errors import UserError

SIZES = [(20, 30), (33, 21), (40, 40)]


def make_folder(root, count=10, palette=True, void=255):
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    (root / "classes.txt").write_text("sky\nsea\nland\n")
    for n in range(count):
        size = SIZES[n % 3]
        pixels = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"im{n}.png")
        values = rng.choice([0, 1, 2, void], size).astype(np.uint8)
        mask = Image.fromarray(values)
        if palette and n % 2:
            mask = mask.convert("P")
            mask.putdata(values.ravel().tolist())
            mask.putpalette([7, 7, 7] * 256)  # colours say nothing: indices do
        mask.save(root / "masks" / f"im{n}.png")
    return root


def load(root, tmp_path, **options):
    return builders.load(
        "folder", data_dir=str(root), cache_dir=tmp_path / "cache", seed=0, **options
    )


def everything(data: SegmentationData):
    return {e["image_id"]: e for s in data.splits for e in _all(data.source(s))}


def _all(source):
    return [source[n] for n in range(len(source))]


def test_folder_round_trip_in_several_sizes(tmp_path):
    root = make_folder(tmp_path / "own", void=9)
    data = load(root, tmp_path, void=9)
    assert data.splits == {"train": 8, "validation": 2}
    assert data.label_set.names == ("sky", "sea", "land")
    examples = everything(data)
    assert len(examples) == 10
    for stem, example in examples.items():
        np.testing.assert_array_equal(
            example["image"], np.array(Image.open(root / "images" / f"{stem}.png"))
        )
        raw = np.array(Image.open(root / "masks" / f"{stem}.png"))
        np.testing.assert_array_equal(example["label"], np.where(raw == 9, VOID, raw))
    labels = np.concatenate([e["label"].ravel() for e in _all(data.source("train"))])
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
    assert [e["image_id"] for e in _all(data.source("train"))] == ["im3", "im1"]
    assert [e["image_id"] for e in _all(data.source("validation"))] == ["im2"]


def test_a_changed_file_is_read_anew(tmp_path):
    root = make_folder(tmp_path / "own")
    before = everything(load(root, tmp_path))["im0"]["image"]
    Image.fromarray(255 - before).save(root / "images" / "im0.png")
    after = everything(load(root, tmp_path))["im0"]["image"]
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
    data = builders.load("camvid", data_dir=str(tmp_path), cache_dir=tmp_path / "cache", seed=0)
    assert data.splits == {"train": 3, "validation": 3}
    example = data.source("validation")[1]
    raw = np.array(Image.open(tmp_path / "valannot" / "val1.png"))
    np.testing.assert_array_equal(example["label"], np.where(raw == 11, VOID, raw))
    assert len(data.label_set) == 11


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
    Image.fromarray(np.zeros((*SIZES[1], 3), np.uint8)).save(root / "masks" / "im4.png")


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
        (spoil_colour_mask, ["im4.png", "RGB"]),
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
        builders.load(name, data_dir=data_dir, cache_dir=tmp_path, seed=0)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    sizes = {"train": 24, "validation": 12, "test": 12}
    builder = Parts(cache_dir=tmp_path_factory.mktemp("parts"), seed=3, sizes=sizes)
    builder.prepare()
    return SegmentationData(builder)


def test_parts_is_decided_by_its_seed(parts):
    image, label, part = scene(3, 1, 5)
    stored = parts.source("validation")[5]
    for name, array in (("image", image), ("label", label), ("parts", part)):
        np.testing.assert_array_equal(stored[name], array)
    assert (scene(4, 1, 5)[0] != image).any()


def test_every_class_and_every_part_is_there(parts):
    for split in parts.splits:
        assert (parts.class_pixels(split) > 0).all()
    owners = {}
    for example in _all(parts.source("train")):
        for number in np.unique(example["parts"]):
            owners.setdefault(int(number), set()).update(
                np.unique(example["label"][example["parts"] == number]).tolist()
            )
    assert sorted(owners) == list(range(len(parts.part_names)))
    assert owners.pop(0) == {0}
    assert all(len(classes) == 1 for classes in owners.values())
    for c, name in enumerate(PARTS.names[1:], 1):
        own = [p for p, classes in owners.items() if classes == {c}]
        assert len(own) >= 4
        assert all(parts.part_names[p].startswith(name) for p in own)


def test_colour_alone_cannot_solve_parts(parts):
    """The best guess from a pixel's colour bin, learnt and scored on the very same pixels."""
    examples = _all(parts.source("train"))
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


def test_sheet_shows_images_beside_their_labels():
    picture = sheet(0, count=4, columns=2)
    assert picture.shape == (256, 512, 3)
    image, label, _ = scene(0, 0, 0)
    np.testing.assert_array_equal(picture[:128, :128], image)
    np.testing.assert_array_equal(picture[:128, 128:256], np.array(PARTS.colours)[label])


def test_the_sheet_command(tmp_path):
    command = [sys.executable, "-m", "protoseg_jax.data.builders.parts", "--sheet"]
    result = subprocess.run([*command, str(tmp_path / "s.png")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert np.array(Image.open(tmp_path / "s.png")).shape == (4 * 128, 5 * 256, 3)


def test_no_tensorflow(tmp_path):
    code = (
        "import sys; from protoseg_jax.data.builders.parts import Parts\n"
        "from protoseg_jax.data.builders.base import SegmentationData\n"
        f"b = Parts(cache_dir={str(tmp_path)!r}, seed=0, sizes={{'train': 2}}); b.prepare()\n"
        "SegmentationData(b).source('train')[0]\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
