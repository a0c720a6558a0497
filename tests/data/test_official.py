"""Pascal VOC 2012 and Cityscapes as their owners hand them out."""

import io
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

from protoseg_jax.data.sets import cityscapes, voc
from protoseg_jax.errors import UserError
from tests.data.official import make_cityscapes, make_voc, zip_cityscapes
from tests.data.opened import everything, load, make_folder


def ids(data, split):
    return [example["image_id"] for example in everything(data.source(split))]


def content(data):
    return {split: everything(data.source(split)) for split in data.splits}


def assert_same_content(first, second):
    assert first.keys() == second.keys()
    for split in first:
        for a, b in zip(first[split], second[split], strict=True):
            assert a["image_id"] == b["image_id"]
            np.testing.assert_array_equal(a["image"], b["image"])
            np.testing.assert_array_equal(a["label"], b["label"])


def test_pascal_s_palette_is_the_official_one():
    assert voc.LABELS.colours[1] == (128, 0, 0) and voc.LABELS.colours[8] == (64, 0, 0)
    assert voc.LABELS.colours[15] == (192, 128, 128) and voc.LABELS.colours[20] == (0, 64, 128)


def test_voc(tmp_path):
    home = make_voc(tmp_path)
    for root in (tmp_path, home.parent, home):
        data = load("voc", root, tmp_path)
        assert data.splits == {"train_aug": 2, "train": 2, "validation": 2, "test": 1}
    assert ids(data, "train_aug") == ["2008_000002", "2008_000007"]
    for split, stem in (("train", "2007_000039"), ("train_aug", "2008_000007")):
        example = data.source(split)[1]
        assert example["image_id"] == stem
        mask = Image.open(home / "SegmentationClassAug" / f"{stem}.png")
        np.testing.assert_array_equal(example["label"], np.array(mask))
        assert (example["label"][:3] == 255).all() and example["label"][3:].max() <= 20
    assert data.labelled("validation") and not data.labelled("test")
    test = data.source("test")[0]
    assert test["label"].shape == test["image"].shape[:2] and (test["label"] == 255).all()


def test_voc_derives_the_augmented_list(tmp_path):
    make_voc(tmp_path, train_aug=False)
    found = ids(load("voc", tmp_path, tmp_path), "train_aug")
    assert found == ["2007_000032", "2007_000039", "2008_000002", "2008_000007"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda v: shutil.rmtree(v / "SegmentationClassAug"), "SegmentationClassAug .*are missing"),
        (lambda v: (v / "JPEGImages" / "2007_000033.jpg").unlink(), "2007_000033.jpg is missing"),
        (lambda v: (v / "ImageSets/Segmentation/val.txt").unlink(), "list .*val.txt is missing"),
        (lambda v: (v / "ImageSets/Segmentation/val.txt").write_text(""), "val.txt is empty"),
        (lambda v: shutil.rmtree(v / "JPEGImages"), "no JPEGImages/"),
    ],
)
def test_voc_that_is_not_whole(tmp_path, spoil, words):
    spoil(make_voc(tmp_path))
    with pytest.raises(UserError, match=words):
        load("voc", tmp_path, tmp_path)
    assert not (tmp_path / "cache").exists()


def test_cityscapes(tmp_path):
    root = tmp_path / "cityscapes"
    make_cityscapes(root)
    data = load("cityscapes", root, tmp_path)
    assert data.splits == {"train": 4, "validation": 2, "test": 2}
    assert ids(data, "validation") == ["frankfurt_000000_000019", "frankfurt_000001_000019"]
    example = data.source("validation")[1]
    folder = root / "gtFine" / "val" / "frankfurt"
    raw = np.array(Image.open(folder / "frankfurt_000001_000019_gtFine_labelIds.png"))
    expected = [cityscapes.IDS.index(i) if i in cityscapes.IDS else 255 for i in raw.ravel()]
    np.testing.assert_array_equal(example["label"].ravel(), expected)
    assert not data.labelled("test")


def test_cityscapes_zips_are_read_without_unpacking(tmp_path):
    make_cityscapes(tmp_path / "tree")
    zip_cityscapes(tmp_path / "tree", tmp_path / "zips")
    before = sorted((tmp_path / "zips").iterdir())
    tree, zips = (load("cityscapes", tmp_path / n, tmp_path) for n in ("tree", "zips"))
    assert_same_content(content(tree), content(zips))
    assert sorted((tmp_path / "zips").iterdir()) == before


def test_cityscapes_prepared_by_tfds(tmp_path):
    """ArrayRecord as `cityscapes/semantic_segmentation` stores it; TFRecord is refused."""
    import tensorflow_datasets as tfds

    root = tmp_path / "tree"
    make_cityscapes(root)
    expected = load("cityscapes", root, tmp_path)

    class Stored(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        name = "cityscapes"

        def _info(self):
            features = {
                "image_id": tfds.features.Text(),
                "image_left": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "segmentation_label": tfds.features.Image(
                    shape=(None, None, 1), encoding_format="png"
                ),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {
                name: self._generate_examples(folder)
                for name, folder in (("train", "train"), ("validation", "val"), ("test", "test"))
            }

        def _generate_examples(self, folder):
            for number, path in enumerate(sorted((root / "leftImg8bit" / folder).rglob("*.png"))):
                label = (
                    str(path)
                    .replace("leftImg8bit", "gtFine")
                    .replace("_gtFine.png", "_gtFine_labelIds.png")
                )
                yield (
                    number,
                    {
                        "image_id": path.name,
                        "image_left": path.read_bytes(),
                        "segmentation_label": open(label, "rb").read(),
                    },
                )

    builder = Stored(data_dir=tmp_path / "tfds", file_format="array_record")
    builder.download_and_prepare()
    got = load("cityscapes", builder.data_dir, tmp_path)
    assert_same_content(content(got), content(expected))
    info = tmp_path / "tfds" / "cityscapes" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="prepared as tfrecord.*tfds convert_format"):
        load("cityscapes", builder.data_dir, tmp_path)


def first_label(root):
    return next((root / "gtFine" / "train" / "aachen").iterdir())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda r: first_label(r).unlink(), "has no labels gtFine/train/aachen"),
        (lambda r: first_label(r).write_bytes(b"no image"), "does not decode"),
        (lambda r: Image.fromarray(np.zeros((9, 9), np.uint8)).save(first_label(r)), "are 9×9"),
        (
            lambda r: Image.fromarray(np.full((64, 128), 77, np.uint8)).save(first_label(r)),
            "holds the value 77 .8192 pixels., which is neither a class .*; use the files",
        ),
        (lambda r: shutil.rmtree(r / "leftImg8bit" / "val"), "no validation image"),
        (lambda r: shutil.rmtree(r / "leftImg8bit"), "holds no images"),
    ],
)
def test_cityscapes_that_is_not_whole(tmp_path, spoil, words):
    root = tmp_path / "tree"
    make_cityscapes(root)
    spoil(root)
    with pytest.raises(UserError, match=words):
        load("cityscapes", root, tmp_path)


def test_a_damaged_zip_is_named(tmp_path):
    make_cityscapes(tmp_path / "tree")
    zip_cityscapes(tmp_path / "tree", tmp_path / "zips")
    (tmp_path / "zips" / "gtFine_trainvaltest.zip").write_bytes(b"no zip")
    with pytest.raises(UserError, match="gtFine_trainvaltest.zip is no zip"):
        load("cityscapes", tmp_path / "zips", tmp_path)


def test_a_damaged_member_of_a_zip_is_named(tmp_path):
    make_cityscapes(tmp_path / "tree")
    zip_cityscapes(tmp_path / "tree", tmp_path / "zips")
    path = tmp_path / "zips" / "leftImg8bit_trainvaltest.zip"
    with zipfile.ZipFile(path) as archive:
        first = min(i.header_offset for i in archive.infolist() if i.filename.endswith(".png"))
    data = bytearray(path.read_bytes())
    data[first + 200 : first + 260] = bytes(60)
    path.write_bytes(data)
    with pytest.raises(UserError, match="_leftImg8bit.png in .*/leftImg8bit_trainval.* is damaged"):
        load("cityscapes", tmp_path / "zips", tmp_path)


def test_submissions(tmp_path):
    labels = np.random.default_rng(0).integers(0, 19, (16, 32)).astype(np.uint8)
    for name, make in (("voc", make_voc), ("cityscapes", make_cityscapes), ("folder", make_folder)):
        make(tmp_path / name)
    for name, split, expected in (
        ("voc", "validation", "results/VOC2012/Segmentation/comp6_val_cls/x.png"),
        ("voc", "test", "results/VOC2012/Segmentation/comp6_test_cls/x.png"),
        ("cityscapes", "test", "x_pred_labelIds.png"),
        ("folder", "validation", "x.png"),
    ):
        path, png = load(name, tmp_path / name, tmp_path).submission(split, "x", labels)
        assert path == expected
        image = Image.open(io.BytesIO(png))
        values = np.array(image)
        if name == "cityscapes":
            values = np.vectorize(cityscapes.IDS.index)(values)
        np.testing.assert_array_equal(values, labels)
        if name == "voc":
            assert image.mode == "P"
            colours = np.array(image.convert("RGB"))
            np.testing.assert_array_equal(colours, np.array(voc.LABELS.colours)[labels])


@pytest.mark.parity
def test_cityscapes_own_evaluator_agrees(tmp_path):
    """mIoU of made predictions, by cityscapesScripts and by us, to 1e-4."""
    evaluator = pytest.importorskip(
        "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling",
        reason="pip install --no-deps cityscapesscripts pyquaternion",
    )
    from protoseg_jax.evaluation import segmentation

    root = tmp_path / "tree"
    make_cityscapes(root)
    data = load("cityscapes", root, tmp_path)
    source = data.source("validation")
    rng, confusion, truths, predictions = np.random.default_rng(0), 0, [], []
    for n in range(len(source)):
        image_id, label = source[n]["image_id"], source[n]["label"]
        guess = np.where(rng.random(label.shape) < 0.7, label, rng.integers(0, 19, label.shape))
        guess = np.where(guess == 255, 3, guess).astype(np.uint8)
        confusion = confusion + np.asarray(segmentation.confusion_matrix(guess, label, 19))
        path, png = data.submission("validation", image_id, guess)
        (tmp_path / path).write_bytes(png)
        predictions.append(str(tmp_path / path))
        folder = root / "gtFine" / "val" / "frankfurt"
        truths.append(str(folder / f"{image_id}_gtFine_labelIds.png"))
    arguments = evaluator.args
    arguments.quiet, arguments.JSONOutput, arguments.evalInstLevelScore = True, False, False
    theirs = evaluator.evaluateImgLists(predictions, truths, arguments)
    assert segmentation.scores(confusion)["miou"] == pytest.approx(
        theirs["averageScoreClasses"], abs=1e-4
    )
