"""What masks mean: any way to store the same labels is read as the plain one."""

import io
import struct
import unicodedata
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from protoseg_jax import decoding
from protoseg_jax.data import masks
from protoseg_jax.data.labels import VOID
from protoseg_jax.data.reading import Reading
from protoseg_jax.errors import Fault, UserError

NAMES = ("sky", "sea", "land")


def encoded(image, suffix=".png", **options):
    kind = {".png": "PNG", ".tif": "TIFF", ".bmp": "BMP", ".webp": "WEBP"}[suffix]
    buffer = io.BytesIO()
    if suffix == ".webp":
        options = {"lossless": True, "exact": True, **options}
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def labels_of(table, data):
    return table.labels(Reading().mask(data, "m"), "m")[0]


def written(tmp_path, text):
    (tmp_path / "classes.txt").write_text(text, "utf-8")
    return masks.read_classes(tmp_path / "classes.txt")


@st.composite
def stored(draw):
    """(classes.txt, mask file, labels): several values or colours a class, in any order."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    # The last is void's.
    groups = np.split(np.arange(8), sorted(rng.choice(np.arange(1, 8), 3, replace=False)))
    order = rng.permutation(8)
    which = rng.integers(0, 8, size)  # of the tokens, pixel by pixel
    kind = draw(st.sampled_from(["grey", "deep", "indexed", "rgb", "rgba", "palette", "clear"]))
    if kind in ("grey", "indexed", "deep"):
        tokens = rng.choice(2**16 if kind == "deep" else 256, 8, replace=False)
        values = tokens[which].astype(np.uint16 if kind == "deep" else np.uint8)
        mask = Image.fromarray(values)
        if kind == "indexed":
            mask.putpalette(rng.integers(0, 256, 768).astype(np.uint8).tolist())
        texts = [str(token) for token in tokens]
    else:
        codes = rng.choice(2**24, 8, replace=False)
        texts = [f"#{code:06x}" if rng.integers(2) else f"#{code:06X}" for code in codes]
        rgb = np.stack([codes >> 16 & 255, codes >> 8 & 255, codes & 255], -1).astype(np.uint8)
        if kind == "palette":
            mask = Image.fromarray(which.astype(np.uint8))
            mask.putpalette(rgb.ravel().tolist())
        else:
            mask = Image.fromarray(rgb[which])
        if kind in ("rgba", "clear"):
            alpha = np.full(size, 255, np.uint8)
            if kind == "clear":
                texts[0], alpha[which == 0] = "transparent", 0
            mask.putalpha(Image.fromarray(alpha))
    suffixes = dict.fromkeys(("grey", "indexed", "palette"), (".png", ".tif", ".bmp"))
    suffixes |= {"deep": (".png", ".tif"), "rgb": (".png", ".tif", ".bmp", ".webp")}
    file = encoded(mask, draw(st.sampled_from(suffixes.get(kind, (".png", ".webp")))))
    lines, labels = [], np.zeros(8, np.uint8)
    for number, group in enumerate(groups):
        name = [*NAMES, "void"][number]
        labels[order[group]] = VOID if name == "void" else number
        space = " " * int(rng.integers(3))
        lines.append(f"{name}\t{space}" + f"{space},".join(texts[t] for t in order[group]))
    at = int(rng.integers(4))
    lines.insert(at, lines.pop())  # void, anywhere
    ends = draw(st.sampled_from(["\n", "\r\n"]))
    return ends.join(lines) + ends * int(rng.integers(3)), file, labels[which]


@settings(max_examples=80, deadline=None)
@given(stored())
def test_any_values_and_colours_mean_what_the_table_says(tmp_path_factory, case):
    text, file, labels = case
    classes, table = written(tmp_path_factory.mktemp("classes"), text)
    assert classes.names == NAMES
    found, counts = table.labels(Reading().mask(file, "m"), "m")
    np.testing.assert_array_equal(found, labels)
    assert found.dtype == np.uint8 and sum(counts.values()) == labels.size


def test_without_tabs_lines_are_numbers(tmp_path):
    classes, table = written(tmp_path, "sky\nsea\nvoid\n")
    assert classes.names == ("sky", "sea", "void")  # a class, as it stands there
    assert table.is_plain
    values = np.array([[0, 1], [2, 255]], np.uint8)
    for mask in (Image.fromarray(values), Image.fromarray(np.dstack([values] * 3))):
        assert labels_of(table, encoded(mask)).tolist() == values.tolist()
    with_tabs = written(tmp_path, "sky\t0\nsea\t1\nvoid it is\t2\n")[1]
    assert with_tabs.values == table.values


def test_values_of_void(tmp_path):
    """Without a line of its own it has the usual value, unless a class has that."""
    assert written(tmp_path, "a\t0\nb\t7\n")[1].values == {0: 0, 7: 1, 255: VOID}
    assert written(tmp_path, "a\t0\nb\t255\n")[1].values == {0: 0, 255: 1}
    assert written(tmp_path, "a\t0\nVOID\t3\nb\t7\n")[1].values == {0: 0, 3: VOID, 7: 1}
    (tmp_path / "classes.txt").write_text("a\t0\nb\t7\n")
    assert masks.read_classes(tmp_path / "classes.txt", void=9)[1].values[9] == VOID
    assert written(tmp_path, "a\t#000000\nb\t#ffffff\n")[1].values == {}


def test_classes_are_shown_in_their_own_colours(tmp_path):
    classes, _ = written(tmp_path, "a\t3, #102030, #000000\nvoid\t#ffffff\nb\t#0000ff\n")
    assert classes.colours == ((16, 32, 48), (0, 0, 255))
    classes, _ = written(tmp_path, "a\t3, #102030\nb\t4\n")
    assert classes.colours[0] == (0, 0, 0)  # the palette's


def test_one_bit_masks(tmp_path):
    bits = np.array([[True, False]])
    file = encoded(Image.fromarray(bits))
    for text, expected in (
        ("a\nb\n", [[1, 0]]),
        ("a\t0\nb\t255\n", [[1, 0]]),
        ("a\t1\nb\t0\n", [[0, 1]]),
        ("a\t#ffffff\nb\t#000000\n", [[0, 1]]),
    ):
        assert labels_of(written(tmp_path, text)[1], file).tolist() == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\t0\nb\n", "says mask values of some classes, but none of 'b'"),
        ("a\t0\nb\t0\n", "gives 0 to 'a' and to 'b'"),
        ("a\t#00ff00\nb\t#00FF00\n", "gives '#00ff00' to 'a' and to 'b'"),
        ("a\t0\na\t1\n", "names the class 'a' twice"),
        ("a\t0\nb\t1,\n", "line 2: '' is neither a mask value"),
        ("a\t0\nb\t65536\n", "line 2: '65536' is neither a mask value"),
        ("a\t0\nb\t#12345\n", "line 2: '#12345' is neither"),
        ("a\t0\nb\ttransparant\n", "transparent is probably meant"),
        ("a\t0\nb\t²\n", "line 2: '²' is neither"),
        ("a\t0\n\t1\n", "line 2, has no name before its tab"),
        ("a #00ff00\nb #0000ff\n", "line 1, has no tab: 'a #00ff00'"),
        ("a    0, 3\nb    1\n", "no tab"),
        ("a\t0\nvoid\t1\n", "must name at least two classes"),
    ],
)
def test_tables_that_say_nothing_clear(tmp_path, text, words):
    with pytest.raises(UserError) as caught:
        written(tmp_path, text)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert str(tmp_path / "classes.txt") in str(caught.value)


def test_what_is_in_no_table_is_named(tmp_path):
    _, table = written(tmp_path, "a\t#ff0000\nb\t#0000ff\nvoid\t#ffffff\n")
    rgb = np.full((20, 20, 3), (255, 0, 0), np.uint8)
    rgb[0, :3] = 250, 4, 0
    rgb[1, 1] = 0, 0, 9
    with pytest.raises(Fault) as caught:
        labels_of(table, encoded(Image.fromarray(rgb)))
    assert caught.value.kind == "mask colour that is no class"
    assert (
        "mask m holds the colour #fa0400 (3 pixels) and 1 more colour (1 pixels), which is no "
        "class's (the nearest is #ff0000 of 'a', 6 away)" in caught.value.fact
    )
    assert "write the colour after a tab" in caught.value.remedy
    with pytest.raises(Fault, match="holds the value 9 .3 pixels., which is neither a class .0–1."):
        _, plain = written(tmp_path, "a\nb\n")
        grey = np.zeros((5, 5), np.uint8)
        grey[0, :3] = 9
        labels_of(plain, encoded(Image.fromarray(grey)))
    with pytest.raises(Fault, match="in colour .#ff0000 396 pixels, #fa0400 3 .*have no colours"):
        labels_of(plain, encoded(Image.fromarray(rgb)))


def test_blurred_edges_are_called_so(tmp_path):
    _, table = written(tmp_path, "a\t#000000\nb\t#ffffff\n")
    small = Image.fromarray(np.kron([[0, 1], [1, 0]], np.full((8, 8), 255)).astype(np.uint8))
    blurred = small.resize((61, 61), Image.Resampling.BICUBIC).convert("RGB")
    with pytest.raises(Fault) as caught:
        labels_of(table, encoded(blurred))
    assert caught.value.kind == "mask that looks antialiased"
    labels_of(table, encoded(small.resize((61, 61), Image.Resampling.NEAREST).convert("RGB")))
    edge = Image.fromarray(np.zeros((4, 4, 4), np.uint8))
    edge.putpixel((1, 1), (0, 0, 0, 90))
    with pytest.raises(Fault, match="1 pixels that are partly transparent"):
        labels_of(table, encoded(edge))


def test_transparent_pixels_must_be_told(tmp_path):
    _, table = written(tmp_path, "a\t#000000\nb\t#ffffff\n")
    clear = encoded(Image.fromarray(np.zeros((2, 3, 4), np.uint8)))
    with pytest.raises(Fault, match="has 6 transparent pixels.*the word transparent after a tab"):
        labels_of(table, clear)
    _, table = written(tmp_path, "a\t#000000\nb\t#ffffff, transparent\n")
    assert labels_of(table, clear).tolist() == [[1] * 3] * 2


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".tif"])
def test_a_mask_with_lossy_compression_is_refused_whatever_it_is_called(suffix):
    buffer, image = io.BytesIO(), Image.fromarray(np.zeros((16, 16, 3), np.uint8))
    kind = {".jpg": ("JPEG", {}), ".webp": ("WEBP", {"quality": 90})}
    kind[".tif"] = ("TIFF", {"compression": "jpeg"})
    name, options = kind[suffix]
    image.save(buffer, name, **options)
    with pytest.raises(Fault, match="mask m.png is a .* with lossy compression"):
        decoding.decode_mask(buffer.getvalue(), "m.png")
    with_icc = io.BytesIO()
    image.save(with_icc, "WEBP", lossless=True, icc_profile=bytes(200))
    assert decoding.decode_mask(with_icc.getvalue(), "m").values.shape == (16, 16, 3)


def test_other_masks_that_are_none():
    floats = Image.fromarray(np.zeros((4, 4), np.float32))
    numbers = Image.fromarray(np.full((4, 4), 70000, np.int32))
    for file, words in (
        (b"", "mask m is empty"),
        (b"no image", "mask m does not decode; replace the file"),
        (encoded(floats, ".tif"), "mask m has mode F"),
        (encoded(numbers, ".tif"), "values from 70000 to 70000"),
    ):
        with pytest.raises(Fault, match=words):
            decoding.decode_mask(file, "m")


def test_sixteen_bits_and_alpha(tmp_path):
    _, table = written(tmp_path, "a\t1000\nb\t40000\n")
    values = np.array([[1000, 40000]], np.uint16)
    for suffix in (".png", ".tif"):
        assert labels_of(table, encoded(Image.fromarray(values), suffix)).tolist() == [[0, 1]]
    _, colours = written(tmp_path, "a\t#000000\nb\t#ffffff\n")
    with pytest.raises(Fault, match="grey with 16 bits, and classes have colours alone"):
        labels_of(colours, encoded(Image.fromarray(values)))
    grey = Image.fromarray(np.array([[[0, 255], [255, 255]]], np.uint8), "LA")
    assert labels_of(colours, encoded(grey)).tolist() == [[0, 1]]


def test_names_in_any_unicode_form(tmp_path):
    two = [unicodedata.normalize(form, "mér") for form in ("NFD", "NFC")]
    assert written(tmp_path, f"{two[0]}\nsky\n")[0].names == (two[1], "sky")
    with pytest.raises(UserError, match="twice"):
        written(tmp_path, f"{two[0]}\n{two[1]}\n")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def plain_png(bits, colour, rows, size, *before):
    """A PNG from its packed rows."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", size[1], size[0], bits, colour, 0, 0, 0))
    rows = b"".join(b"\0" + row for row in rows)
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(before) + body


def test_values_are_those_that_are_stored(tmp_path):
    """Which Pillow shows otherwise: greys of few bits; or drops: the low half of 16."""
    _, table = written(tmp_path, "\n".join(f"class {n}" for n in range(40)))
    four = plain_png(4, 0, [b"\x01\x2f"], (1, 4))
    assert labels_of(table, four).tolist() == [[0, 1, 2, 15]]
    assert labels_of(table, plain_png(2, 0, [b"\x1b"], (1, 4))).tolist() == [[0, 1, 2, 3]]
    deep = plain_png(16, 4, [struct.pack(">6H", 0, 65535, 1, 65535, 2, 65535)], (1, 3))
    with pytest.raises(Fault, match="mask m is in colour, or with alpha, with 16 bits a channel"):
        labels_of(table, deep)
    two = Image.fromarray(np.array([[0, 1, 1, 0]], np.uint8))
    two.putpalette([0, 0, 0, 255, 255, 255])
    with pytest.raises(Fault, match="mask m is a BMP of 8 bits in a few greys"):
        labels_of(table, encoded(two, ".bmp"))
    assert labels_of(table, encoded(two)).tolist() == [[0, 1, 1, 0]]
    white = io.BytesIO()
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(white, "TIFF", tiffinfo={262: 0})
    with pytest.raises(Fault, match="a TIFF in which 0 is shown as white"):
        labels_of(table, white.getvalue())


def test_transparency_by_a_colour_or_an_index(tmp_path):
    """As PNG's optimisers write what was RGBA."""
    _, table = written(tmp_path, "a\t#000000\nb\t#ffffff\nvoid\ttransparent\n")
    indices = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    indices.putpalette([0, 0, 0, 255, 255, 255, 0, 0, 0])
    assert labels_of(table, encoded(indices, transparency=2)).tolist() == [[0, 1, VOID]]
    rgb = Image.fromarray(np.array([[[0] * 3, [255] * 3, [9] * 3]], np.uint8))
    assert labels_of(table, encoded(rgb, transparency=(9, 9, 9))).tolist() == [[0, 1, VOID]]
    grey = Image.fromarray(np.array([[0, 255, 9]], np.uint8))
    assert labels_of(table, encoded(grey, transparency=9)).tolist() == [[0, 1, VOID]]
    # An index means what it does, whatever is shown.
    _, plain = written(tmp_path, "a\nb\nc\n")
    assert labels_of(plain, encoded(indices, transparency=2)).tolist() == [[0, 1, 2]]


def test_a_palette_that_contradicts_the_table(tmp_path):
    _, table = written(tmp_path, "a\t0, #804080\nb\t1, #00008e\n")
    mask = Image.fromarray(np.array([[0, 1]], np.uint8))
    mask.putpalette([0x80, 0x40, 0x80, 0, 0, 0x8E])
    assert labels_of(table, encoded(mask)).tolist() == [[0, 1]]
    mask.putpalette([0, 0, 0x8E, 0x80, 0x40, 0x80])
    with pytest.raises(Fault, match="shows its value 0 in the colour #00008e"):
        labels_of(table, encoded(mask))
    _, with_void = written(tmp_path, "a\t0, #804080\nb\t1, #00008e\nvoid\t255, #000000\n")
    mask.putpalette([0, 0, 0, 9, 9, 9])  # a colour of no class says nothing
    assert labels_of(with_void, encoded(mask)).tolist() == [[0, 1]]
    colours = written(tmp_path, "a\t#804080\nb\t#00008e\n")[1]
    short = chunk(b"PLTE", bytes((0x80, 0x40, 0x80)))
    with pytest.raises(Fault, match="holds the index 1, and its palette has 1 colours"):
        labels_of(colours, plain_png(8, 3, [b"\0\1"], (1, 2), short))


def test_one_bit_is_no_void(tmp_path):
    _, table = written(tmp_path, "a\t0\nb\t7\n")
    with pytest.raises(Fault, match="holds the value 1 "):
        labels_of(table, encoded(Image.fromarray(np.array([[True, False]]))))


@pytest.mark.parametrize(
    "text",
    ["# mine\na\nb\n", "road 1\ncar 0\n", "road,1\ncar,2\n", "0: road\n1: car\n"]
    + ["a\t128,64,128\nb\t0,0,142\n", "a\t0\nb\t1\nvoid\t\n"],
)
def test_lists_that_mean_more_than_names(tmp_path, text):
    with pytest.raises(UserError, match="classes.txt"):
        written(tmp_path, text)


def test_names_that_end_with_a_number(tmp_path):
    assert written(tmp_path, "class 1\nclass 2\n")[0].names == ("class 1", "class 2")
    assert written(tmp_path, "road 1\ncar\n")[0].names == ("road 1", "car")
