"""Data that look right and are not: read as their plain form would be, or refused in one line."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks import data_traps
from protoseg_jax import decoding, images
from protoseg_jax.data import masks, prepare
from protoseg_jax.data import pairs as pairs_lib
from protoseg_jax.data.findings import Findings, Leaks, Palettes
from protoseg_jax.data.labels import VOID, generic
from protoseg_jax.data.reading import Reading, colours_used
from protoseg_jax.errors import UserError
from protoseg_jax.training import run
from tests import small
from tests.data.official import make_cityscapes, make_voc
from tests.data.opened import everything, load, make_folder
from tests.data.sections import make_folders, make_stacks, write_stack

# Pillow's turn from what is shown with an orientation to what is stored.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def as_stored(array, orientation):
    """What a camera stores of what is to be shown."""
    if orientation == 1:
        return array
    numbers = np.arange(array.shape[0] * array.shape[1], dtype=np.int32)
    numbers = Image.fromarray(numbers.reshape(array.shape[:2]))
    order = np.array(numbers.transpose(STORED[orientation]))
    return array.reshape(-1, *array.shape[2:])[order]


def exif(orientation, order="<", kind=3):
    """EXIF data with an orientation and a tag before it."""
    value = struct.pack(order + ("H2x" if kind == 3 else "I"), orientation)
    entries = struct.pack(f"{order}HHI4s", 0x010F, 2, 2, b"x\0\0\0")
    entries += struct.pack(f"{order}HHI", 0x0112, kind, 1) + value
    head = {"<": b"II*\0", ">": b"MM\0*"}[order]
    return head + struct.pack(f"{order}IH", 8, 2) + entries + bytes(4)


def with_exif(png, data, *, last=False):
    """A PNG with an eXIf chunk, before its pixels or after them."""
    chunk = b"eXIf" + data
    chunk = struct.pack(">I", len(data)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    at = png.rindex(b"\0\0\0\0IEND") if last else 33
    return png[:at] + chunk + png[at:]


def png(array):
    """8 or 16 bits, grey or RGB."""
    array = array[..., ::-1] if array.ndim == 3 else array
    return cv2.imencode(".png", array)[1].tobytes()


@st.composite
def pairs(draw):
    """(plain image, values of its mask, the image's file, the mask's file, reading)."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    h, w = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    shape = (h, w, 3) if draw(st.booleans()) else (h, w)
    orientation, how = draw(st.integers(1, 8)), draw(st.sampled_from(["apply", "ignore"]))
    image = rng.integers(0, 256, shape).astype(np.uint8)
    values = rng.choice([0, 1, 2, 255], (h, w)).astype(np.uint8)
    white = draw(st.sampled_from([None, 255, 1023, 4095, 65535]))
    file = image if white is None else np.round(image * (white / 255)).astype(np.uint16)
    if how == "apply":
        file = as_stored(file, orientation)
    file = png(file)
    if orientation > 1 or draw(st.booleans()):
        order, kind = draw(st.sampled_from("<>")), draw(st.sampled_from([3, 4]))
        file = with_exif(file, exif(orientation, order, kind), last=draw(st.booleans()))
    mask = Image.fromarray(values)
    if draw(st.booleans()):
        mask.putpalette(rng.integers(0, 256, 768).astype(np.uint8).tolist())
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    plain = image if image.ndim == 3 else np.repeat(image[..., None], 3, 2)
    return plain, values, file, buffer.getvalue(), Reading(how, white)


@settings(max_examples=60, deadline=None)
@given(pairs())
def test_orientation_bits_and_palette_change_nothing(tmp_path_factory, pair):
    plain, values, file, mask, reading = pair
    root = tmp_path_factory.mktemp("pair")
    (root / "a.png").write_bytes(file)
    (root / "m.png").write_bytes(mask)
    table = masks.numbered("abc")
    example = pairs_lib.read_pair("a", root / "a.png", root / "m.png", table, reading)
    np.testing.assert_array_equal(example.label, values)
    np.testing.assert_array_equal(example.pixels, plain)
    # What is stored says the same to any decoder, with and without a mind for orientation.
    np.testing.assert_array_equal(decoding.decode(example.image), plain)
    shown = cv2.imdecode(np.frombuffer(example.image, np.uint8), cv2.IMREAD_COLOR_RGB)
    np.testing.assert_array_equal(shown, plain)
    about = decoding.header(example.image)
    assert (about.orientation, about.frames, about.transparent) == (1, 1, False)


def test_what_is_plain_keeps_its_bytes():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    for file in (png(pixels), png(pixels[..., 0]), images.encode(pixels, ".jpg")):
        for reading in (Reading(), Reading("apply", 4095), Reading("ignore")):
            stored, decoded = reading.image(file, "a")
            assert stored == file
            np.testing.assert_array_equal(decoded, decoding.decode(file))


BROKEN = {
    "no TIFF": b"garbage, and more of it",
    "nothing": b"",
    "cut short": exif(6)[:30],
    "an offset beyond the end": b"II*\0\xff\xff\xff\xff",
    "0": exif(0),
    "9": exif(9),
    "of another type": exif(6).replace(
        struct.pack("<HH", 0x0112, 3), struct.pack("<HH", 0x0112, 7)
    ),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_broken_orientation_is_none(broken, suffix, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    kind = {".png": "PNG", ".jpg": "JPEG"}[suffix]
    Image.fromarray(pixels).save(buffer, kind, exif=b"Exif\0\0" + broken)
    plain = io.BytesIO()
    Image.fromarray(pixels).save(plain, kind)
    file = buffer.getvalue()
    stored, decoded = Reading().image(file, "a")
    assert stored == file
    np.testing.assert_array_equal(decoded, decoding.decode(plain.getvalue()))
    (tmp_path / f"a{suffix}").write_bytes(file)
    np.testing.assert_array_equal(decoding.read(tmp_path / f"a{suffix}"), decoded)


def spoil_turned(root):
    for path in (root / "images" / "im0.png", root / "images" / "im4.png"):
        path.write_bytes(with_exif(path.read_bytes(), exif(6)))


def spoil_turned_mask(root):
    path = root / "masks" / "im0.png"
    path.write_bytes(with_exif(path.read_bytes(), exif(8)))


def spoil_deep(root):
    path = root / "images" / "im1.png"
    path.write_bytes(png(16 * np.array(Image.open(path)).astype(np.uint16)))


def spoil_float(root):
    image = np.array(Image.open(root / "images" / "im1.png")).astype(np.float32)
    (root / "images" / "im1.png").write_bytes(cv2.imencode(".tiff", image)[1].tobytes())


def spoil_alpha(root):
    image = Image.open(root / "images" / "im1.png")
    image.putalpha(128)
    image.save(root / "images" / "im1.png")


def spoil_transparent_colour(root):
    image = Image.open(root / "images" / "im1.png")
    image.save(root / "images" / "im1.png", transparency=image.getpixel((0, 0)))


def spoil_animation(root):
    first, *others = [Image.open(root / "images" / f"im{n}.png").copy() for n in (0, 3, 6)]
    first.save(root / "images" / "im0.png", save_all=True, append_images=others)


def spoil_twin(root):
    write_lists(root, "im0 im1", "im2")
    for name in ("images", "masks"):
        (root / name / "im2.png").write_bytes((root / name / "im1.png").read_bytes())


def write_lists(root, train, validation):
    (root / "train.txt").write_text(train.replace(" ", "\n"))
    (root / "validation.txt").write_text(validation.replace(" ", "\n"))


REFUSED = {
    "orientation": (
        spoil_turned,
        {},
        ["im0.png has EXIF orientation 6", "exif=apply", "exif=ignore"],
    ),
    "orientation of a mask": (spoil_turned_mask, {}, ["mask", "im0.png has EXIF orientation 8"]),
    "16 bits": (
        spoil_deep,
        {},
        ["im1.png has 16 bits", "value is 4080", "--config.data.white=VALUE"],
    ),
    "floats": (spoil_float, {}, ["im1.png is neither grey nor RGB with 8 or 16 bits"]),
    "alpha": (spoil_alpha, {}, ["im1.png has transparent pixels"]),
    "a transparent colour": (spoil_transparent_colour, {}, ["im1.png has transparent pixels"]),
    "an animation": (spoil_animation, {}, ["im0.png is an animation of 3 frames"]),
    "a name in both": (
        lambda root: write_lists(root, "im0 im1", "im2 im0"),
        {},
        ["image 'im0' of split 'validation' is in split 'train' too", "take it out of one"],
    ),
    "pixels in both": (
        spoil_twin,
        {},
        ["image 'im2' of split 'validation' has the pixels of 'im1' of split 'train'"],
    ),
    "a name twice": (
        lambda root: write_lists(root, "im0 im1 im0", "im2"),
        {},
        ["image 'im0' is in split 'train' twice"],
    ),
    "an unknown exif": (
        spoil_turned,
        {"data.exif": "maybe"},
        ["data.exif='maybe'", "apply, ignore"],
    ),
    "no white": (spoil_deep, {"data.white": 0}, ["data.white=0 must lie in 1–65535"]),
    "white beyond": (spoil_deep, {"data.white": 65536}, ["data.white=65536"]),
    "void beyond": (lambda root: None, {"data.void": 256}, ["data.void=256"]),
    "UTF-16": (
        lambda root: (root / "classes.txt").write_text("sky\nsea\nland\n", "utf-16"),
        {},
        ["classes.txt is UTF-16; save it as UTF-8"],
    ),
    "UTF-16 without a mark": (
        lambda root: (root / "classes.txt").write_text("sky\nsea\nland\n", "utf-16-le"),
        {},
        ["classes.txt is UTF-16 or no text"],
    ),
    "Latin-1": (
        lambda root: (root / "classes.txt").write_text("sky\nmér\nland\n", "latin-1"),
        {},
        ["classes.txt is not UTF-8 (line 2); save it as UTF-8"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_gets_one_line_and_leaves_nothing(tmp_path, name):
    spoil, options, words = REFUSED[name]
    root = make_folder(tmp_path / "own")
    spoil(root)
    with pytest.raises(UserError) as caught:
        load("folder", root, tmp_path, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("folder-*"))


def test_a_leak_of_a_drawn_split(tmp_path):
    root = make_folder(tmp_path / "own")
    held_out = load("folder", root, tmp_path).drawn["validation"][0]
    trained = load("folder", root, tmp_path).drawn["train"][0]
    for name in ("images", "masks"):
        (root / name / f"{held_out}.png").write_bytes((root / name / f"{trained}.png").read_bytes())
    with pytest.raises(UserError, match=f"'{held_out}' .* the pixels of '{trained}' of split 'tr"):
        load("folder", root, tmp_path)


def test_which_splits_may_share_an_image():
    one, two = np.zeros((2, 3, 3), np.uint8), np.ones((2, 3, 3), np.uint8)
    leaks = Leaks()

    def wrong(split, name, pixels):
        return [str(fault) for fault, _ in leaks.add(split, name, pixels)]

    for split, name, pixels in (
        ("train_aug", "a", one),
        ("train", "a", one),
        ("train", "copy of a", one),
        ("validation", "b", two),
        ("test", "b", two),
        ("validation", "c", one.reshape(3, 2, 3)),  # the same bytes in another shape
    ):
        assert wrong(split, name, pixels) == []
    for split, name, pixels, words in (
        ("test", "d", one, "'d' of split 'test' has the pixels of 'a' of split 'train_aug'"),
        ("train", "b", one + 5, "'b' of split 'train' has the name of one of split 'validation'"),
        ("mine", "b", two, "'b' of split 'mine' is in split 'validation' too"),
        ("train", "a", two, "'a' is in split 'train' twice"),
    ):
        (found,) = wrong(split, name, pixels)
        assert words in found


def test_a_benchmark_s_own_leak_is_told():
    image, label = np.zeros((2, 3, 3), np.uint8), np.zeros((2, 3), np.uint8)
    for official in (False, True):
        findings = Findings(generic("ab"), official)
        for split, name, pixels in (
            ("train", "a", image),
            ("validation", "b", image),
            ("test", "a", image + 1),
        ):
            findings.add(split, prepare.Example(name, b"", label, pixels=pixels))
        own = findings.doubts if official else findings.faults
        kind = own["image that trains and is scored"]
        assert "image 'b' of split 'validation' has the pixels of 'a'" in kind.facts[0]
        assert findings.count == (1 if official else 2)
        assert "has the name of one of split 'train'" in str(
            findings.faults["image that trains and is scored"].facts[-1]
        )


def test_masks_of_0_and_255(tmp_path):
    small.make_data(tmp_path / "own")
    (tmp_path / "own" / "classes.txt").write_text("ground\ndisc\n")
    expected = {}
    for path in (tmp_path / "own" / "masks").iterdir():
        disc = np.array(Image.open(path)) == 1
        expected[path.stem] = disc.astype(np.uint8)
        Image.fromarray(255 * expected[path.stem]).save(path)
    config = small.make_config(tmp_path)
    with pytest.raises(UserError) as caught:
        run.check(small.experiment(config), new=False)
    assert "no pixel of class 'disc' in split 'train'" in str(caught.value)
    assert "255 means no label" in str(caught.value)
    assert "0 after the first, 255 after 'disc'" in str(caught.value)
    (tmp_path / "own" / "classes.txt").write_text("ground\t0\ndisc\t255\n")
    experiment = small.experiment(config)
    run.check(experiment, new=False)
    for example in everything(experiment.data.source("train")):
        np.testing.assert_array_equal(example["label"], expected[example["image_id"]])


def test_an_absent_class_is_not_always_void(tmp_path):
    """Without void, or beside a class that is there, the advice is what it was."""
    small.make_data(tmp_path / "own")
    for path in (tmp_path / "own" / "masks").iterdir():
        mask = np.array(Image.open(path))
        Image.fromarray(np.where(mask == 2, 0, mask).astype(np.uint8)).save(path)
    with pytest.raises(UserError, match="nothing to learn it from") as caught:
        run.check(small.experiment(small.make_config(tmp_path)), new=False)
    assert "classes.txt" not in str(caught.value)


def test_values_of_classes(tmp_path):
    root = make_folder(tmp_path / "own", void=9)
    (root / "classes.txt").write_text("sky\t2\nsea\t9\nvoid\t1\nland\t0\n")
    data = load("folder", root, tmp_path)
    assert data.labels.names == ("sky", "sea", "land")
    for example in everything(data.source("train")):
        raw = np.array(Image.open(root / "masks" / f"{example['image_id']}.png"))
        expected = np.select([raw == 2, raw == 9, raw == 0], [0, 1, 2], VOID)
        np.testing.assert_array_equal(example["label"], expected)
    (root / "classes.txt").write_text("sky\t2\nsea\t9\nland\t0\n")
    words = (
        r"holds the value 1 \(\d+ pixels\), which is neither a class \(0, 2, 9\) nor void \(255\)"
    )
    with pytest.raises(UserError, match=words):
        load("folder", root, tmp_path)


def test_a_data_set_from_outside_is_read_likewise(tmp_path):
    """Its examples hold bytes alone; what these leave open, the builder asks."""
    shown = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3)).astype(np.uint8)
    file = with_exif(png(as_stored((shown[0] * 16.0).astype(np.uint16), 8)), exif(8))

    def example(split, number):
        data = png(shown[1]) if number else file
        return prepare.Example(f"{split}{number}", data, np.zeros((4, 6), np.uint8))

    splits = {"train": [0], "validation": [1]}
    dataset = prepare.DataSet("mine", generic(("a", "b")), splits, example, [1])
    for reading, words in (
        (Reading("apply"), "'train0' of mine has 16 bits a channel"),
        (Reading(white=4080), "'train0' of mine has EXIF orientation 8"),
    ):
        with pytest.raises(UserError, match=words):
            prepare.prepare(dataset, tmp_path, reading=reading)
        assert not list(tmp_path.glob("mine-*"))
    data = prepare.prepare(dataset, tmp_path, reading=Reading("apply", 4080))
    for split, expected in zip(splits, shown, strict=True):
        np.testing.assert_array_equal(data.source(split)[0]["image"], expected)


def test_settings_are_part_of_the_prepared_folder(tmp_path):
    root = make_folder(tmp_path / "own")
    ways = ({}, {"data.exif": "apply"}, {"data.exif": "ignore"}, {"data.white": 4095})
    folders = [load("folder", root, tmp_path, **options).folder for options in ways]
    for text in ("sky\t0\nsea\t1\nland\t2\n", "sky\t1\nsea\t0\nland\t2\n"):
        (root / "classes.txt").write_text(text)
        folders.append(load("folder", root, tmp_path).folder)
    # The first of the tables says what none says.
    assert len(set(folders)) == len(folders) - 1 and folders[0] == folders[-2]


def make_camvid(root):
    rng = np.random.default_rng(0)
    for name in ("train", "val"):
        for folder, classes in ((name, 256), (f"{name}annot", 12)):
            (root / folder).mkdir(parents=True)
            array = rng.integers(0, classes, (12, 16)).astype(np.uint8)
            Image.fromarray(array).save(root / folder / f"{name}0.png")


@pytest.mark.parametrize(
    ("name", "make", "file"),
    [
        ("camvid", make_camvid, "train/train0.png"),
        (
            "cityscapes",
            make_cityscapes,
            "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png",
        ),
        ("isbi_em", make_folders, "image/0.png"),
        ("voc", make_voc, "VOCdevkit/VOC2012/JPEGImages/2007_000032.jpg"),
    ],
)
def test_every_data_set_of_files_asks_for_exif(tmp_path, name, make, file):
    root = tmp_path / "data"
    make(root)
    data_traps.tag(root / file, 3)
    with pytest.raises(UserError, match="has EXIF orientation 3.*exif=apply.*exif=ignore"):
        load(name, root, tmp_path)
    stored = decoding.decode((root / file).read_bytes())
    for how, expected in (("apply", stored[::-1, ::-1]), ("ignore", stored)):
        data = load(name, root, tmp_path, **{"data.exif": how})
        found = [e["image"] for split in data.splits for e in everything(data.source(split))]
        assert sum(np.array_equal(image, expected) for image in found) == 1


@pytest.mark.parametrize("make", [make_stacks, make_folders])
def test_sections_of_16_bits(tmp_path, make):
    sections = make(tmp_path / "em")
    deep = [np.round(image * (4095 / 255)).astype(np.uint16) for image, _ in sections]
    if make is make_stacks:
        write_stack(tmp_path / "em" / "train-volume.tif", deep)
    else:
        for number, image in enumerate(deep):
            (tmp_path / "em" / "image" / f"{number}.png").write_bytes(png(image))
    with pytest.raises(UserError, match="16-bit values up to .*set --config.data.white"):
        load("isbi_em", tmp_path / "em", tmp_path)
    data = load("isbi_em", tmp_path / "em", tmp_path, **{"data.white": 4095})
    for example in everything(data.source("train")):
        image, label = sections[int(example["image_id"])]
        np.testing.assert_array_equal(example["image"][..., 0], image)
        np.testing.assert_array_equal(example["label"], label // 255)


@pytest.mark.parametrize("how", ["apply", "ignore"])
def test_a_stack_with_an_orientation(tmp_path, how):
    """Pillow turns a TIFF by itself; its labels, which have no orientation, stay."""
    sections = make_stacks(tmp_path / "em", size=16)
    shown = [image[:, :12] for image, _ in sections]
    pages = [Image.fromarray(as_stored(x, 6) if how == "apply" else x) for x in shown]
    volume = tmp_path / "em" / "train-volume.tif"
    pages[0].save(volume, save_all=True, append_images=pages[1:], tiffinfo={0x0112: 6})
    write_stack(tmp_path / "em" / "train-labels.tif", [label[:, :12] for _, label in sections])
    with pytest.raises(UserError, match="train-volume.tif has EXIF orientation 6"):
        load("isbi_em", tmp_path / "em", tmp_path)
    data = load("isbi_em", tmp_path / "em", tmp_path, **{"data.exif": how})
    example = data.source("train")[0]
    np.testing.assert_array_equal(example["image"][..., 0], shown[int(example["image_id"])])


def test_a_picture_of_16_bits_takes_the_run_s_white(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    deep = np.round(pixels * (4095 / 255)).astype(np.uint16)
    (tmp_path / "rgb.png").write_bytes(png(deep))
    (tmp_path / "grey.png").write_bytes(png(deep[..., 0]))
    grey = np.repeat(pixels[..., :1], 3, 2)
    for image, expected in (
        (deep, pixels),
        (deep[..., 0], grey),
        (tmp_path / "rgb.png", pixels),
        (tmp_path / "grey.png", grey),
        (Image.open(tmp_path / "grey.png"), grey),
    ):
        np.testing.assert_array_equal(decoding.read(image, 4095), expected)
        with pytest.raises(UserError, match="16 bits .* largest value is .* no data.white"):
            decoding.read(image)
    np.testing.assert_array_equal(decoding.read(pixels, 4095), pixels)
    with pytest.raises(
        UserError, match="16 bits a channel, of which Pillow keeps 8; give its path"
    ):
        decoding.read(Image.open(tmp_path / "rgb.png"), 4095)


@given(st.integers(1, 65535), st.lists(st.integers(0, 65535), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_white_is_255(white, values):
    array = np.array([values, [white] * len(values)], np.uint16)
    found = decoding.eight_bits(array, white, "a", "")
    exact = np.minimum(array.astype(np.float64), white) * 255 / white
    assert (np.abs(found - exact) <= 0.5).all() and (found[1] == 255).all()


def test_a_byte_order_mark_is_no_name(tmp_path):
    root = make_folder(tmp_path / "own")
    write_lists(root, "im0 im1", "im2")
    for name in ("classes.txt", "train.txt", "validation.txt"):
        path = root / name
        path.write_text(path.read_text(), "utf-8-sig")
    data = load("folder", root, tmp_path)
    assert data.labels.names == ("sky", "sea", "land")
    assert data.source("train")[0]["image_id"] == "im0"


def test_palettes_that_differ_are_told_once(tmp_path, capsys):
    root = make_folder(tmp_path / "own")
    colours = np.arange(768).reshape(256, 3) % 251
    for number, path in enumerate(sorted((root / "masks").iterdir())):
        values = np.array(Image.open(path))
        own = colours.copy()
        own[3:255] = number  # nobody uses these
        own[2] = (1, 2, 3) if number in (4, 6) else (9, 9, 9)
        mask = Image.fromarray(values)
        mask.putpalette(own.ravel().tolist())
        mask.save(path)
    load("folder", root, tmp_path)
    lines = capsys.readouterr().err.splitlines()
    at = lines.index("warning: palettes that differ (1)")
    assert "value 2 has the colour (" in lines[at + 1] and lines[at + 1].count("masks/im") == 2
    assert sum("warning" in line for line in lines) == 1
    load("folder", root, tmp_path)
    assert "warning" not in capsys.readouterr().err


def test_only_colours_in_use_are_compared():
    values = np.array([[0, 1, 200]], np.uint8)
    short, other = bytes(range(6)), bytes(range(3)) + bytes(99)
    used = [colours_used(decoding.Mask(values, colours)) for colours in (b"", short, other)]
    assert used[0] == {}
    assert used[1] == {0: short[:3], 1: short[3:]}  # none of 200: cut short
    palettes = Palettes()
    assert not palettes.add("a", used[1])
    assert not palettes.add("b", colours_used(decoding.Mask(np.zeros((1, 1), np.uint8), other)))
    (fault,) = palettes.add("c", used[2])
    assert fault.fact == "value 1 has the colour (3, 4, 5) in mask a and (0, 0, 0) in c"
    assert not palettes.add("d", used[1])


def test_the_table_of_traps(tmp_path):
    """Of three kinds, by this checkout on both sides."""
    kinds = {kind.name: kind for kind in data_traps.KINDS}
    some = ("EXIF orientation 3, mask as stored", "the same pixels in both, under two names")
    some = tuple(kinds[name] for name in (*some, "a byte-order mark in classes.txt"))
    turned, twin, mark = data_traps.rows(tmp_path, None, some)
    assert turned.startswith("| EXIF orientation 3, mask as stored | – | refused: `image images/im")
    assert turned.endswith("<br>with `--config.data.exif=ignore`: accepted; as the plain form |")
    assert "has the pixels of 'im0' of split 'train'" in twin
    assert mark == "| a byte-order mark in classes.txt | – | accepted; as the plain form |"


REFUSED_FORMS = {
    "a colour that is in no line": "#7f4000 (1 pixels), which is no class's (the nearest is #80",
    "a mask whose edges are blurred": "draw or export masks without antialiasing",
    "masks as JPEG": "is a JPEG with lossy compression",
    "JPEGs called .png as masks": "is a JPEG with lossy compression",
    "a list entry with a slip": "the nearest is 'im2'",
    "a broken link": "is a link to gone.png, which is not there",
    "an image of 0 bytes": "is empty (0 bytes)",
    "an image of 20,000 × 20,000": "has 400 million pixels",
    "four faults at once": "4 faults in data set 'folder', listed above",
}
RENAMED = {"nested folders": "im0 is called day 0/im0", "a name in two Unicode forms": "im0é"}
SOME = ("masks in colour with alpha", "images and masks in one folder", "masks as JPEG")


@pytest.mark.parametrize("names", [SOME, pytest.param(None, marks=pytest.mark.slow)])
def test_the_table_of_forms(tmp_path, names):
    """Whatever has a way out ends as the plain form; the others are refused with the reason."""
    kinds = tuple(kind for kind in data_traps.FORMS if names is None or kind.name in names)
    for kind, row in zip(kinds, data_traps.rows(tmp_path, None, kinds), strict=True):
        words = {**REFUSED_FORMS, **RENAMED}.get(kind.name, "accepted; as the plain form |")
        assert words in row, row
        assert ("refused" in row.rpartition("<br>")[2]) == (kind.name in REFUSED_FORMS), row
        assert "traceback" not in row


def test_what_the_table_says_of_what_was_accepted(tmp_path):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (4, 4, 3)).astype(np.uint8) for _ in range(3)]
    label = np.zeros((4, 4), np.uint8)
    label[0] = 1
    splits = ("train", "train", "validation")
    plain = [(s, f"im{n}", x, label) for n, (s, x) in enumerate(zip(splits, pictures, strict=True))]

    def told(*changed, classes=("a",)):
        found = data_traps.Outcome(classes=classes, examples=list(changed) or plain)
        return data_traps.tell(found, data_traps.Outcome(classes=("a",), examples=plain))

    assert told() == "accepted; as the plain form"
    assert told(classes=("b",)) == "accepted; classes 'b'"
    turned = ("train", "im0", pictures[0][::-1], label)
    assert told(turned, *plain[1:]) == (
        "accepted; im0: turned, its mask not; im0: 50 % of the labels on the wrong pixel"
    )
    turned = ("train", "im0", pictures[0][::-1], label[::-1])
    assert told(turned, *plain[1:]) == "accepted; im0: turned with its mask"
    dark = [(s, n, x // 16, y) for s, n, x, y in plain]
    assert told(*dark).startswith("accepted; ") and "largest value 15 instead of 25" in told(*dark)
    twin = ("validation", "im2", pictures[0], label)
    assert told(*plain[:2], twin) == (
        "accepted; im2: im0's pixels; 1 of 1 validation images in training too"
    )
    assert told(*plain, plain[0]) == "accepted; im0 trains 2 times an epoch"
    assert data_traps.tell(data_traps.Outcome("no"), data_traps.Outcome()) == "refused: `no`"


def test_a_broken_stack_and_sections_that_are_no_plain_pictures(tmp_path):
    """One line, without a word of Pillow's."""
    make_stacks(tmp_path / "cut")
    whole = (tmp_path / "cut" / "train-volume.tif").read_bytes()
    (tmp_path / "cut" / "test-volume.tif").write_bytes(whole[:700])
    with pytest.raises(UserError, match="test-volume.tif is no TIFF stack"):
        load("isbi_em", tmp_path / "cut", tmp_path)
    grey = np.full((64, 64), 90, np.uint8)
    clear = Image.fromarray(np.dstack([grey, grey, grey, 0 * grey]))
    for kind, words in (("clear", "transparent"), ("moving", "animation of 2 frames")):
        for where in ("image", "label"):
            root = tmp_path / f"{kind}-{where}"
            make_folders(root)
            if kind == "clear":
                clear.save(root / where / "2.png")
            else:
                frames = [Image.fromarray(grey), Image.fromarray(grey + 1)]
                frames[0].save(root / where / "2.png", save_all=True, append_images=frames[1:])
            with pytest.raises(UserError, match=f"2.png.* {words}"):
                load("isbi_em", root, tmp_path)


def test_an_animated_mask(tmp_path):
    root = make_folder(tmp_path / "own")
    path = sorted((root / "masks").iterdir())[0]
    mask = Image.open(path)
    other = Image.fromarray(1 - np.array(mask).clip(0, 1))
    mask.save(path, save_all=True, append_images=[other])
    with pytest.raises(UserError, match=f"{path.name} is an animation"):
        load("folder", root, tmp_path)


def test_how_many_classes_there_may_be(tmp_path):
    root = make_folder(tmp_path / "own")
    masks, names = root / "masks", [f"class {n}" for n in range(300)]
    first = sorted(masks.iterdir())[0]
    mask = np.array(Image.open(first))
    mask[0, :2] = 254, 255
    Image.fromarray(mask).save(first)
    (root / "classes.txt").write_text("\n".join(names))
    with pytest.raises(UserError, match="names 300 classes; 255 is the most"):
        load("folder", root, tmp_path)
    (root / "classes.txt").write_text("\n".join(names[:255]))
    data = load("folder", root, tmp_path)
    assert sum(int(data.class_pixels(split)[254]) for split in data.splits) == 1


def test_a_folder_that_is_called_like_an_image_is_none(tmp_path):
    root = make_folder(tmp_path / "own")
    (root / "images" / "more.png").mkdir()
    data = load("folder", root, tmp_path)
    assert "more" not in str(data.drawn)
