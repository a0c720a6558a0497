"""Files as people have them: any names, suffixes, folders and modes give the plain data set."""

import io
import os
import shutil
import struct
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from protoseg_jax import decoding
from protoseg_jax.data import pairs, prepare
from protoseg_jax.data.reading import Reading
from protoseg_jax.errors import UserError
from tests.data.opened import config_of, everything, load

RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (9, 12, 3)).astype(np.uint8) for _ in range(4)]
LABELS = [RNG.choice([0, 1, 255], (9, 12)).astype(np.uint8) for _ in range(4)]
KINDS = {".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP", ".webp": "WEBP"}


def write(path, array, suffix):
    path.parent.mkdir(parents=True, exist_ok=True)
    image, options = Image.fromarray(array), {}
    if suffix.lower() == ".webp":
        image, options = image.convert("RGB"), {"lossless": True}
    image.save(path, KINDS[suffix.lower()], **options)


def by_id(data):
    return {e["image_id"]: e for split in data.splits for e in everything(data.source(split))}


def examples_of(root, **options):
    """What a folder holds, read without preparing it."""
    config = config_of("folder", root, "", **options)
    dataset = prepare.open_files(config)
    assert not dataset.faults
    found = [(s, prepare.read(dataset, s, x, None)) for s, of in dataset.splits.items() for x in of]
    return dataset, found


@st.composite
def layouts(draw):
    """How the four pairs are called: suffixes in any case, folders, endings, one folder or two."""
    suffix = st.sampled_from([s for k in KINDS for s in (k, k.upper(), k.title())])
    names = ["im", "sub/im", "sub/deep er/im", "a.b"]
    form = draw(st.sampled_from(["NFC", "NFD"]))
    names[draw(st.integers(0, 3))] = "mé " + "x"
    ending = draw(st.sampled_from(["", "_mask", "-gt.label"]))
    together = bool(ending) and draw(st.booleans())
    return (
        names,
        [(draw(suffix), draw(suffix)) for _ in names],
        ending,
        together,
        form,
        draw(st.booleans()),
    )


@settings(max_examples=25, deadline=None)
@given(layouts(), st.data())
def test_names_suffixes_and_folders_change_nothing(tmp_path_factory, layout, data):
    names, suffixes, ending, together, form, listed = layout
    root = tmp_path_factory.mktemp("own")
    (root / "classes.txt").write_text("a\nb\n")
    folder, masks = ("all", "all") if together else ("images", "masks")
    for n, (name, (of_image, of_mask)) in enumerate(zip(names, suffixes, strict=True)):
        shown = [unicodedata.normalize(f, name) for f in (form, "NFC")]
        write(root / folder / f"{shown[0]}{of_image}", PICTURES[n], of_image)
        write(root / masks / f"{shown[1]}{ending}{of_mask}", LABELS[n], of_mask)
        for place in (root / folder, root / masks):
            (place / f"._{n}.png").write_bytes(b"a Mac's")
    (root / masks / "Thumbs.db").write_bytes(b"Windows's")
    if listed:
        lines = []
        for name, (of_image, _) in zip(names, suffixes, strict=True):
            ways = [name, name + of_image, f"./{name}", f"{folder}/{name}{of_image}"]
            ways += [name.replace("/", "\\"), f"/data/mine/{folder}/{name}{of_image}"]
            lines.append(data.draw(st.sampled_from(ways)))
        (root / "train.txt").write_text("\n".join(lines[:3]))
        (root / "validation.txt").write_text(lines[3])
    options = {"data.mask_suffix": ending + data.draw(st.sampled_from(["", ".png", ".PNG"]))}
    if not ending:
        options = {}
    dataset, found = examples_of(root, **{"data.images": folder, "data.masks": masks, **options})
    assert dataset.doubts == ()
    assert sorted(e.image_id for _, e in found) == sorted(names)
    for split, example in found:
        n = names.index(example.image_id)
        np.testing.assert_array_equal(example.pixels, PICTURES[n])
        np.testing.assert_array_equal(example.label, LABELS[n])
        if listed:
            assert split == ("validation" if n == 3 else "train")


def in_mode(array, mode):
    """(an image file's picture in a mode, what it shows)."""
    grey = array[..., 0]
    if mode == "1":
        bits = grey > 127
        return Image.fromarray(bits), np.repeat(255 * bits[..., None], 3, 2).astype(np.uint8)
    if mode == "CMYK":
        image = Image.fromarray(array).convert("CMYK")
        return image, np.array(image.convert("RGB"))
    if mode == "P":
        image = Image.fromarray(array).quantize(16)
        return image, np.array(image.convert("RGB"))
    if mode in ("L", "LA"):
        return Image.fromarray(grey).convert(mode), np.repeat(grey[..., None], 3, 2)
    return Image.fromarray(array).convert(mode), array


MODES = [("L", k) for k in ("PNG", "TIFF", "BMP", "WEBP")]
MODES += [("RGB", k) for k in ("PNG", "TIFF", "BMP", "WEBP")]
MODES += [("1", k) for k in ("PNG", "TIFF", "BMP")] + [("P", k) for k in ("PNG", "TIFF", "BMP")]
MODES += [("LA", "PNG"), ("LA", "TIFF"), ("RGBA", "PNG"), ("RGBA", "TIFF"), ("RGBA", "WEBP")]
MODES += [("CMYK", "TIFF")]


@pytest.mark.parametrize(("mode", "kind"), MODES)
def test_modes_of_images(tmp_path, mode, kind):
    """As training, `segment` and a notebook read them."""
    image, shown = in_mode(PICTURES[0], mode)
    if kind == "WEBP" and mode == "L":
        image = image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    (tmp_path / "a.any").write_bytes(buffer.getvalue())
    stored, pixels = Reading().image(buffer.getvalue(), "a")
    np.testing.assert_array_equal(pixels, shown)
    np.testing.assert_array_equal(decoding.decode(stored), shown)
    np.testing.assert_array_equal(decoding.read(tmp_path / "a.any"), shown)
    np.testing.assert_array_equal(decoding.read(image), shown)


def test_a_cmyk_jpeg_is_as_pillow_shows_it(tmp_path):
    smooth = np.kron(np.arange(4).reshape(2, 2, 1), np.full((16, 16, 3), 60)).astype(np.uint8)
    Image.fromarray(smooth).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        expected = np.array(image.convert("RGB"))
    np.testing.assert_array_equal(decoding.read(tmp_path / "a.jpg"), expected)
    assert np.abs(expected.astype(int) - smooth).max() <= 4


def make(root, count=4, suffix=".png"):
    (root / "classes.txt").parent.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("a\nb\n")
    for n in range(count):
        write(root / "images" / f"im{n}{suffix}", PICTURES[n], suffix)
        write(root / "masks" / f"im{n}.png", LABELS[n], ".png")
    return root


def lists(root, train, validation):
    (root / "train.txt").write_text("\n".join(train))
    (root / "validation.txt").write_text("\n".join(validation))


def huge(path):
    """A PNG that says it is of 20,000 × 20,000 pixels."""
    data = bytearray((path.parent / "im0.png").read_bytes())
    data[16:24] = (20000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    path.write_bytes(data)


def both(change):
    return lambda root: [change(root / "images"), change(root / "masks")]


BAD = {
    "a broken link": (
        lambda root: (root / "images" / "x.png").symlink_to(root / "gone.png"),
        ["images/x.png is a link to", "gone.png, which is not there"],
    ),
    "an empty image": (
        lambda root: (root / "images" / "im1.png").write_bytes(b""),
        ["images/im1.png is empty (0 bytes); copy it anew"],
    ),
    "an empty mask": (
        lambda root: (root / "masks" / "im1.png").write_bytes(b""),
        ["masks/im1.png is empty (0 bytes)"],
    ),
    "an image cut short": (
        lambda root: (root / "images" / "im1.png").write_bytes(
            (root / "images" / "im1.png").read_bytes()[:-60]
        ),
        ["images/im1.png does not decode (cut short, or damaged); replace it"],
    ),
    "beyond Pillow's limit": (
        lambda root: huge(root / "images" / "im1.png"),
        ["images/im1.png has 400 million pixels, more than are read"],
    ),
    "a mask with a suffix": (
        lambda root: [p.rename(p.with_stem(f"{p.stem}_mask")) for p in (root / "masks").iterdir()],
        ["has no mask", "im0_mask is there; set --config.data.mask_suffix=_mask"],
    ),
    "a mask in another folder": (
        lambda root: shutil.move(root / "masks" / "im2.png", root / "masks" / "more" / "im2.png"),
        ["im2.png has no mask", "but", "masks/more/im2.png is there; give both the same folders"],
    ),
    "a mask that is a JPEG": (
        lambda root: (
            Image.fromarray(LABELS[1]).save(root / "masks" / "im1.jpg"),
            (root / "masks" / "im1.png").unlink(),
        ),
        ["masks/im1.jpg is a JPEG with lossy compression", "export it again as PNG"],
    ),
    "two images of one name": (
        lambda root: write(root / "images" / "im1.tif", PICTURES[1], ".tif"),
        ["im1.tif", "have the same name"],
    ),
    "names that only differ in form": (
        lambda root: [
            write(root / "images" / f"{unicodedata.normalize(form, 'é')}.png", PICTURES[n], ".png")
            for n, form in enumerate(("NFC", "NFD"))
        ],
        ["have the same name"],
    ),
    "a list with a slip": (
        lambda root: lists(root, ["im0", "im11"], ["im2"]),
        ["train.txt names 'im11'", "the nearest is 'im1'"],
    ),
    "a list that is not clear": (
        lambda root: (
            [write(root / x / y / "im9.png", LABELS[0], ".png") for x in ("images", "masks")
             for y in "pq"],
            lists(root, ["im9", "im0"], ["im2"]),
        ),
        ["names 'im9', and p/im9, q/im9 are called so; write its folder too"],
    ),
    "no image": (
        lambda root: [p.unlink() for p in (root / "images").iterdir()],
        ["is empty"],
    ),
    "no image but other files": (
        lambda root: [p.rename(p.with_suffix(".raw")) for p in (root / "images").iterdir()],
        ["no image in", "put PNG, JPEG, TIFF, WebP or BMP files there"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_files_gets_one_line(tmp_path, name, capsys):
    spoil, words = BAD[name]
    root = make(tmp_path / "own")
    (root / "masks" / "more").mkdir()
    spoil(root)
    with pytest.raises(UserError) as caught:
        load("folder", root, tmp_path)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert "\n" not in text and not list((tmp_path / "cache").glob("folder-*"))


def test_all_faults_are_told_at_once(tmp_path, capsys):
    root = make(tmp_path / "own")
    lists(root, ["im0", "nobody", "im1"], ["im2", "im3"])
    (root / "images" / "im0.png").write_bytes(b"")
    (root / "masks" / "im2.png").unlink()
    write(root / "masks" / "im3.png", np.full((9, 12), 7, np.uint8), ".png")
    with pytest.raises(UserError, match="4 faults in data set 'folder', listed above; the first"):
        load("folder", root, tmp_path)
    told = capsys.readouterr().err
    for words in (
        "error: list entry without an image (1)",
        "error: empty image (1)",
        "error: image without a mask (1)",
        "error: mask value that is no class (1)",
        "  → correct the mask, or write the value after a tab on the line of its class",
    ):
        assert words in told
    assert not list((tmp_path / "cache").glob("folder-*"))


def test_a_linked_folder_is_followed_and_a_circle_is_not_endless(tmp_path):
    root = make(tmp_path / "own")
    for name in ("images", "masks"):
        (root / name).rename(tmp_path / f"real-{name}")
        (root / name).mkdir()
        (root / name / "linked").symlink_to(tmp_path / f"real-{name}")
        (tmp_path / f"real-{name}" / "back").symlink_to(root / name)
    data = load("folder", root, tmp_path)
    assert sorted(by_id(data)) == [f"linked/im{n}" for n in range(4)]


def test_one_pixel(tmp_path):
    root = make(tmp_path / "own")
    write(root / "images" / "im1.png", PICTURES[1][:1, :1], ".png")
    write(root / "masks" / "im1.png", np.ones((1, 1), np.uint8), ".png")
    found = by_id(load("folder", root, tmp_path))["im1"]
    assert found["image"].shape == (1, 1, 3) and found["label"].tolist() == [[1]]


def test_an_ending_that_is_nearly_right(tmp_path):
    root = make(tmp_path / "own")
    for path in list((root / "masks").iterdir()):
        path.rename(path.with_stem(f"{path.stem}_label"))
    for told in ("", "label", "_mask", ".png"):
        dataset = prepare.open_files(config_of("folder", root, "", **{"data.mask_suffix": told}))
        assert dataset.doubts == ()
        with pytest.raises(UserError, match="im0_label is there; set .*mask_suffix=_label$"):
            dataset.example("train", "im0")


def test_another_image_s_number_is_no_ending(tmp_path):
    root = make(tmp_path / "own")
    (root / "masks" / "im1.png").rename(root / "masks" / "im10.png")
    dataset = prepare.open_files(config_of("folder", root, ""))
    assert [kind for kind, *_ in dataset.doubts] == ["mask without an image"]
    with pytest.raises(UserError, match="has no mask .*im1.png; add it or remove the image"):
        dataset.example("train", "im1")


def test_masks_inside_the_images_folder(tmp_path):
    root = make(tmp_path / "own")
    (root / "masks").rename(root / "images" / "masks")
    for options in ({"data.masks": "images/masks"}, {"data.masks": "./images/masks/"}):
        data = load("folder", root, tmp_path, **options)
        assert sorted(by_id(data)) == [f"im{n}" for n in range(4)]
    with pytest.raises(UserError, match="are both .*set --config.data.mask_suffix"):
        load("folder", root, tmp_path, **{"data.masks": "images/"})


def test_pictures_are_turned_as_those_that_trained(tmp_path):
    image = Image.fromarray(PICTURES[0])
    exif = image.getexif()
    exif[0x0112] = 6
    for suffix in ("png", "tif"):
        image.save(tmp_path / f"a.{suffix}", exif=exif)
        for how, shown in (("apply", np.rot90(PICTURES[0], -1)), ("ignore", PICTURES[0])):
            reading = Reading(how)
            data = (tmp_path / f"a.{suffix}").read_bytes()
            np.testing.assert_array_equal(reading.image(data, "a")[1], shown)
            np.testing.assert_array_equal(reading.picture(tmp_path / f"a.{suffix}"), shown)
            with Image.open(tmp_path / f"a.{suffix}") as opened:
                np.testing.assert_array_equal(reading.picture(opened), shown)


def test_what_lists_and_folders_leave_open(tmp_path):
    root = make(tmp_path / "own")
    (root / "train.txt").symlink_to("gone.txt")
    with pytest.raises(UserError, match="validation.txt is missing|cannot be read"):
        load("folder", root, tmp_path)
    (root / "train.txt").unlink()
    (root / "images" / "pipe.png").unlink(missing_ok=True)
    os.mkfifo(root / "images" / "pipe.png")
    assert len(by_id(load("folder", root, tmp_path))) == 4
    for n, part in enumerate(("train", "train", "val", "val")):
        for what in ("images", "masks"):
            (root / what / part).mkdir(exist_ok=True)
            (root / what / f"im{n}.png").rename(root / what / part / f"im{n}.png")
    dataset, _ = examples_of(root)
    assert [kind for kind, *_ in dataset.doubts] == ["folders that look like splits"]


def test_a_name_that_is_no_text(tmp_path):
    root = make(tmp_path / "own")
    os.rename(root / "images" / "im0.png", os.fsencode(root / "images") + b"/\xff.png")
    with pytest.raises(UserError, match=r"udcff.png' is no text; rename it"):
        load("folder", root, tmp_path)


def test_many_images_without_masks_are_told_at_once(tmp_path):
    """Not by comparing each with each."""
    images_of = {f"im{n}": tmp_path / f"im{n}.png" for n in range(20_000)}
    masks_of = {f"other/{n}": tmp_path / f"{n}.png" for n in range(20_000)}
    found = pairs.Pairs(tmp_path, tmp_path, images_of, masks_of, ())
    assert all(found._missing(name).remedy == "add it or remove the image" for name in images_of)


def test_a_mask_ending():
    for text, ending in (
        ("_mask", "_mask"),
        ("_mask.png", "_mask"),
        (".gt", ".gt"),
        (".png", ""),
        ("", ""),
    ):
        assert pairs.mask_ending(text) == ending


def test_a_tiff_beyond_4_gib_is_read_as_any(tmp_path):
    """Whatever its size: the form alone says so."""
    mask = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for name, array in (("a.tif", PICTURES[0]), ("m.tif", mask)):
        Image.fromarray(array).save(tmp_path / name, big_tiff=True)
        assert (tmp_path / name).read_bytes()[:4] == b"II+\0"
    np.testing.assert_array_equal(decoding.read(tmp_path / "a.tif"), PICTURES[0])
    decoded = decoding.decode_mask((tmp_path / "m.tif").read_bytes(), "m")
    np.testing.assert_array_equal(decoded.values, mask)


def packed_tiff(values: np.ndarray, bits: int) -> bytes:
    """A grey TIFF with so many bits a pixel, rows filled up to bytes, most significant first."""
    height, width = values.shape
    places = np.arange(bits)[::-1]
    rows = (values[..., None] >> places & 1).reshape(height, -1).astype(np.uint8)
    data = np.packbits(rows, axis=1).tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    tags[279] = len(data)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, x) for tag, x in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


def test_12_packed_bits_are_refused_not_read_as_other_numbers(tmp_path):
    """The same form with 8 bits is read."""
    values = np.random.default_rng(0).integers(0, 256, (5, 7))
    (tmp_path / "a.tif").write_bytes(packed_tiff(values, 8))
    grey = np.repeat(values[..., None].astype(np.uint8), 3, 2)
    np.testing.assert_array_equal(decoding.read(tmp_path / "a.tif"), grey)
    packed = packed_tiff(16 * values, 12)
    (tmp_path / "a.tif").write_bytes(packed)
    with pytest.raises(UserError, match="a.tif is neither grey nor RGB with 8 or 16 bits"):
        decoding.read(tmp_path / "a.tif", 4095)
    with pytest.raises(UserError, match="a.tif is neither grey nor RGB with 8 or 16 bits"):
        Reading(white=4095).image(packed, "a.tif")
