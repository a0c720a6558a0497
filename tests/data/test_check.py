"""`protoseg check`: every planted fault is found, with what mends it; nothing in a clean set."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks import checking
from protoseg_jax import config as configs
from protoseg_jax import decoding
from protoseg_jax.data import check
from protoseg_jax.data.findings import Findings, Kind
from protoseg_jax.data.labels import VOID, generic
from protoseg_jax.data.prepare import Example
from protoseg_jax.errors import Fault, UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]


def checked(root, **options):
    config = configs.load("folder")
    config.data.dir = str(root)
    config.update_from_flattened_dict(options)
    return check.check(config)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    root = tmp_path_factory.mktemp("clean") / "own"
    checking.make(root, 40, side=48)
    return root


def test_nothing_is_wrong_with_what_is_right(clean):
    report = checked(clean)
    assert not report.findings.faults and not report.findings.doubts
    text = "\n".join(report.lines)
    assert "folder: 40 images with masks that can be read" in text
    assert "train           32" in text and "validation       8" in text


def test_every_fault_is_found_and_nothing_else(tmp_path):
    root = tmp_path / "own"
    checking.make(root, 80, side=48)
    planted = checking.plant(root)
    findings = checked(root).findings
    found = {**findings.faults, **findings.doubts}
    assert sorted(found) == sorted({fault.kind for fault in planted})
    for fault in planted:
        of = found[fault.kind]
        assert (fault.kind in findings.faults) == fault.fatal
        assert of.count == sum(other.kind == fault.kind for other in planted)
        assert any(fault.name in fact for fact in of.facts), (fault, of)
        assert of.remedies


def test_what_a_report_counts(tmp_path):
    root = tmp_path / "own"
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    (root / "classes.txt").write_text("ground\t0\nthing\t5\nvoid\t9\n")
    rng = np.random.default_rng(0)
    for n, size in enumerate([(8, 10), (20, 30), (4, 4)]):
        pixels = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{n}.png")
        mask = np.full(size, 0 if n else 5, np.uint8)
        mask[0] = 9
        Image.fromarray(mask).save(root / "masks" / f"{n}.png")
    (root / "train.txt").write_text("0\n1\n")
    (root / "validation.txt").write_text("2\n")
    report = checked(root)
    train = report.findings.splits["train"]
    assert (train.images, train.smallest, train.largest) == (2, (8, 10), (20, 30))
    assert train.pixels[[0, 1, VOID]].tolist() == [570, 70, 40]
    assert train.images_with[[0, 1, VOID]].tolist() == [1, 1, 2]
    assert report.findings.values == {"0": 582, "5": 70, "9": 44}
    text = "\n".join(report.lines)
    assert "train            2      8×10    20×30      94 %" in text
    assert "mask values: 0 83.6 %, 5 10.1 %, 9 6.3 %" in text
    assert "warning: class that cannot be scored (1)" in text
    assert "split 'validation' has no pixel of 'thing'" in text


def test_the_sheet_shows_images_under_their_masks(clean):
    report = checked(clean)
    assert report.sheet.dtype == np.uint8 and report.sheet.shape[2] == 3
    colours = {tuple(c) for c in report.sheet.reshape(-1, 3).tolist()}
    assert set(generic(checking.NAMES).colours) <= colours  # the legend's
    assert len(colours) > 100


def test_a_kind_shows_five():
    findings = Findings(generic("ab"))
    for n in range(7):
        findings.fault(Fault("slip", f"file {n} is wrong", "mend it"))
    lines = findings.faults["slip"].lines("error")
    assert lines == [
        "error: slip (7)",
        *(f"  file {n} is wrong" for n in range(5)),
        "  … and 2 more",
        "  → mend it",
    ]
    said = []
    with pytest.raises(UserError, match="7 faults in data set 'own', listed above; the first: fi"):
        findings.refuse("own", said.append)
    assert said == lines
    alone = Findings(generic("ab"))
    alone.fault(UserError("only this; do that"))
    with pytest.raises(UserError, match="^only this; do that$"):
        alone.refuse("own", said.append)
    assert alone.faults["fault of another kind"] == Kind(
        "fault of another kind", 1, ["only this"], ["do that"]
    )


def test_thin_lines_of_many_classes_are_no_edges_of_a_drawn_mask():
    """Edges of a blurred mask, whose values are classes too; not those of small things."""
    names = [f"c{n}" for n in range(12)]
    label = np.zeros((60, 60), np.uint8)
    label[20:40, 20:40] = 10
    thin = label.copy()
    for n in range(1, 10):
        thin[n + 2, :] = 0
    for ring in range(4):
        thin[20 + ring : 40 - ring, 20 + ring] = 2 * ring + 1
        thin[20 + ring : 40 - ring, 39 - ring] = 2 * ring + 1
    rgb = np.random.default_rng(0).integers(0, 256, (60, 60, 3)).astype(np.uint8)
    for mask, doubtful in ((label, False), (thin, True)):
        findings = Findings(generic(names))
        findings.add("train", Example("a", b"", mask, pixels=rgb, mask="a.png"))
        assert ("mask of thin lines" in findings.doubts) == doubtful


@pytest.mark.slow
def test_the_command(clean, tmp_path):
    line = [sys.executable, "-m", "protoseg_jax", "check"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(*arguments):
        found = subprocess.run(
            [*line, *arguments], capture_output=True, text=True, cwd=tmp_path, env=environment
        )
        return found.returncode, found.stdout, found.stderr

    code, out, errors = run(str(clean), f"--sheet={tmp_path / 'sheet.png'}")
    assert code == 0, errors
    assert out.splitlines()[-1] == "nothing wrong was found" and errors == ""
    sheet = decoding.read(tmp_path / "sheet.png")
    assert min(sheet.shape[:2]) > 256
    own = tmp_path / "own"
    checking.make(own, 10, side=32)
    (own / "images" / "im003.jpg").write_bytes(b"")
    code, out, errors = run(str(own))
    assert code == 2 and "error: empty image (1)" in out
    assert errors.startswith("error: 1 fault in ") and errors.count("\n") == 1
    code, out, errors = run(str(own), "--config.data.mask_sufix=_label")
    expected = "error: command line: there is no key 'mask_sufix'; did you mean 'mask_suffix'?\n"
    assert (code, out, errors) == (2, "", expected)
    code, out, errors = run(str(tmp_path / "nowhere"))
    assert code == 2 and out == "" and "does not exist" in errors and errors.count("\n") == 1
    code, out, errors = run(str(clean), "--sheet=/proc/no/sheet.png")
    assert code == 2 and errors.startswith("error: /proc/no/sheet.png cannot be written")
