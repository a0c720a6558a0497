"""Images into files: the same classes as eval.py's, whatever fails, stops or is large."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from protoseg_jax import decoding
from protoseg_jax.errors import UserError
from protoseg_jax.evaluation import predictions, segmentation
from protoseg_jax.evaluation.segmentation import strips
from protoseg_jax.explain import segment
from protoseg_jax.explain.model import Model
from protoseg_jax.explain.segment import Segmenter, find
from tests.small import experiment


def write(path, size=(8, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(path)


def test_what_files_folders_and_patterns_name(tmp_path, monkeypatch):
    for name in ("a.png", "b/c.JPG", "b/d/e.tif", "b/.hidden.png", ".cache/f.png", "out/g.png"):
        write(tmp_path / name)
    (tmp_path / "b" / "notes.txt").write_text("no image")
    (tmp_path / "b" / "._c.jpg").write_bytes(b"of a Macintosh")
    monkeypatch.chdir(tmp_path)

    def names(*given):
        return sorted(find(given, tmp_path / "out"))

    assert names(".") == ["a", "b/c", "b/d/e"]
    assert names(str(tmp_path)) == names(".")
    assert names("b") == ["c", "d/e"]
    assert names("a.png", "b/c.JPG") == ["a", "c"]
    assert names("b/**/*.tif") == names("b/**/*.TIF") == ["d/e"]
    assert names("b/*.jpg") == ["c"]  # which is c.JPG
    assert names("*/c.*") == ["b/c"]
    assert names("*") == ["a", "b/c", "b/d/e"]  # folders that a pattern hits, too
    assert names(".cache/f.png") == ["f"]  # hidden, but named
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out", target_is_directory=True)
    assert names(".") == names("./b/..") == ["a", "b/c", "b/d/e"]
    for nothing in ("", "out", "link/g.png", "x" * 5000, "a\0b"):
        with pytest.raises(UserError, match="no image at"):
            names(nothing)
    write(tmp_path / "other" / "h.png")
    assert "other/h" in names(".")
    (tmp_path / "other" / "segment.json").write_text("{}")  # which images were segmented into
    assert "other/h" not in names(".")
    assert names("a.png", "./a.png", "a.*") == ["a"]  # one file, named thrice
    write(tmp_path / "odd[1].png")
    assert names("odd[1].png") == ["odd[1]"]  # a file is no pattern
    with pytest.raises(UserError, match=r"no image at 'nothing/\*\.png'; name files"):
        names("nothing/*.png")
    write(tmp_path / "a.bmp")
    with pytest.raises(UserError, match=r"a\.bmp and .*a\.png would both be written to a\.png"):
        names(".")


@pytest.fixture
def folder(small_run):
    """The images of the small run's data set."""
    return small_run.workdir.path.parent / "own" / "images"


def labels_of(path):
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.array(image)


def test_classes_are_those_of_eval(small_run, folder, tmp_path):
    """To the pixel, for images of three sizes; probabilities and evidence are the model's own."""
    kinds = segment.KINDS
    segment.segment(str(small_run.workdir.path), [str(folder)], str(tmp_path / "out"), kinds)
    predictions.write(
        small_run.experiment, small_run.checkpoint, "validation", tmp_path / "eval", flips=False
    )
    compared = list((tmp_path / "eval").rglob("*.png"))
    for path in compared:
        with Image.open(path) as image:
            np.testing.assert_array_equal(labels_of(tmp_path / "out" / path.name), image)
    assert len(compared) == 2 and len(list((tmp_path / "out").glob("*.png"))) == 10

    why = small_run.explain(folder / "im3.png")
    labels = labels_of(tmp_path / "out" / "im3.png")
    np.testing.assert_array_equal(labels, why.segmentation.labels)
    got = np.load(tmp_path / "out" / "im3.probabilities.npz")["probabilities"]
    np.testing.assert_allclose(got, why.segmentation.probabilities, atol=1e-3)
    found = np.load(tmp_path / "out" / "im3.evidence.npz")
    np.testing.assert_allclose(found["similarities"], why.similarities, rtol=1e-5, atol=1e-6)
    summed = found["similarities"] @ found["kernel"]
    np.testing.assert_allclose(summed, found["logits"], rtol=1e-4, atol=1e-5)
    winners = found["similarities"] * found["kernel"].T[found["logits"].argmax(-1)]
    np.testing.assert_array_equal(found["prototype"], found["prototypes"][winners.argmax(-1)])
    assert found["prototypes"].tolist() == [p.index for p in small_run.prototypes]
    assert found["novelty"].shape == found["prototype"].shape
    assert [found[k].tolist() for k in ("corner", "size", "own")] == [
        [0, 0],
        [40, 56],
        [0, 0, 40, 56],
    ]
    with Image.open(tmp_path / "out" / "im3.overlay.jpg") as overlay:
        with Image.open(folder / "im3.png") as image:
            mixed = (np.array(image).astype(float) + small_run.classes.paint(labels)) / 2
        assert np.abs(np.array(overlay) - mixed).mean() < 12  # a JPEG of noise


def test_one_that_fails_stops_no_other_and_what_is_done_stays(small_run, folder, tmp_path, capsys):
    path, out = str(small_run.workdir.path), tmp_path / "out"
    own = tmp_path / "own"
    for n in range(7):
        (own / f"{n // 4}").mkdir(parents=True, exist_ok=True)
        (own / f"{n // 4}" / f"{n}.png").write_bytes((folder / f"im{n}.png").read_bytes())
    (own / "0" / "2.png").write_text("no image")
    (own / "empty.jpg").touch()
    with pytest.raises(UserError, match="2 of 8 images could not be segmented: .*2.png, .*empty"):
        segment.segment(path, [str(own)], str(out))
    told = capsys.readouterr().err
    assert "2.png does not decode (of no known format)" in told and "empty.jpg" in told
    done = {p: p.stat().st_mtime_ns for p in out.rglob("*.png")}
    assert sorted(p.relative_to(out).as_posix() for p in done) == [
        *("0/0.png", "0/1.png", "0/3.png", "1/4.png", "1/5.png", "1/6.png")
    ]
    assert not list(out.rglob(".*"))  # nothing half written

    (own / "0" / "2.png").write_bytes((folder / "im2.png").read_bytes())
    (own / "empty.jpg").unlink()
    os.utime(own / "1" / "5.png", ns=(2**50, 2**50))  # replaced by an older one
    segment.segment(path, [str(own)], str(out))
    assert "5 of 7 images are done already" in capsys.readouterr().err
    again = {p for p, when in done.items() if p.stat().st_mtime_ns != when}
    assert again == {out / "1" / "5.png"}
    np.testing.assert_array_equal(
        labels_of(out / "0" / "2.png"), small_run.segment(folder / "im2.png").labels
    )

    segment.segment(path, [str(own)], str(out), ["overlay"])  # of which nothing is there yet
    assert len(list(out.rglob("*.overlay.jpg"))) == 7
    assert (out / "segment.classes.jpg").exists()
    other = Model.load(path, "joint")
    with pytest.raises(UserError, match="holds what another network said, of .*; name another"):
        Segmenter(other, out)
    write(tmp_path / "later" / "0" / "0.png")  # another trip's image of the same name
    with pytest.raises(UserError, match=r"0/0.png is of .*own/0/0.png, not of .*later/0/0.png"):
        segment.segment(path, [str(tmp_path / "later")], str(out))
    (own / "0" / "0.png").unlink()
    with pytest.raises(UserError, match=r"no image at .*0\.png"):
        segment.segment(path, [str(own / "0" / "0.png")], str(out))


@pytest.mark.slow
def test_what_cannot_be_written(small_run, folder, tmp_path, monkeypatch, capsys):
    """One image's file; the folder; what changed between two looks at it."""
    path, own, out = str(small_run.workdir.path), tmp_path / "own", tmp_path / "out"
    for n in range(3):
        write(own / f"{n}.png", (40, 50))
    (out / "1.png").mkdir(parents=True)
    with pytest.raises(UserError, match=r"1 of 3 images could not be segmented: .*own/1\.png"):
        segment.segment(path, [str(own)], str(out))
    assert (out / "0.png").is_file() and (out / "2.png").is_file()
    assert "out/1.png cannot be written" in capsys.readouterr().err

    real = segment.assemble

    def slowly(*arguments):
        write(own / "2.png", (20, 20))
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="1 of 1 images"):
        patch.setattr(segment, "assemble", slowly)
        segment.segment(path, [str(own / "2.png")], str(tmp_path / "again"), ["overlay"])
    assert "it changed while it was segmented" in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file cannot be used"):
        segment.segment(path, [str(own)], str(tmp_path / "file"))


def test_images_that_are_none(tmp_path):
    """A stack's pages, a broken file with transparency: a line each."""
    pages = [Image.fromarray(np.zeros((5, 5), np.uint8))] * 3
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(UserError, match="stack.tif is a stack of 3 pages; save the one that is"):
        decoding.read(tmp_path / "stack.tif")
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (50, 50, 4), np.uint8)
    Image.fromarray(noise).save(tmp_path / "broken.png")
    data = (tmp_path / "broken.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(data[:60] + bytes(len(data) - 60))
    with pytest.raises(UserError, match="broken.png"):
        decoding.read(tmp_path / "broken.png")


@pytest.mark.slow
def test_a_run_that_works_in_tiles(small_run, folder, tmp_path, monkeypatch):
    """As the model by itself does, and an image smaller than a tile is told."""
    monkeypatch.setattr(segmentation, "_ROWS", 8)  # several strips a tile
    config = small_run.experiment.config.copy_and_resolve_references()
    config.eval_size, config.eval_overlap = (33, 33), 8
    tiled = Model(small_run.workdir, experiment(config), "projection", small_run.checkpoint)
    kinds = ["evidence", "probabilities"]
    Segmenter(tiled, tmp_path / "out", kinds).run(find([str(folder)], tmp_path / "out"))
    for n in range(3):
        got = labels_of(tmp_path / "out" / f"im{n}.png")
        expected = tiled.segment(folder / f"im{n}.png")
        np.testing.assert_array_equal(got, expected.labels)
        p = np.load(tmp_path / "out" / f"im{n}.probabilities.npz")["probabilities"]
        np.testing.assert_allclose(p, expected.probabilities, atol=1e-3)
    found = np.load(tmp_path / "out" / "im0.evidence.npz")
    count = len(found["similarities"])
    assert [found[key].shape for key in ("corner", "size", "own")] == [
        (count, n) for n in (2, 2, 4)
    ]
    areas = (found["own"][:, 2:] - found["own"][:, :2]).prod(1)
    assert count > 1 and areas.sum() == np.prod(small_run.segment(folder / "im0.png").labels.shape)
    write(tmp_path / "small.png", (20, 90))
    with pytest.raises(UserError, match="1 of 1 images"):
        Segmenter(tiled, tmp_path / "out").run({"small": tmp_path / "small.png"})


def test_one_image_is_no_whole_batch(small_run, folder, tmp_path, monkeypatch):
    """And its classes are those that it has among others."""
    seen, plain = [], segment._step

    def spied(*arguments):
        step = plain(*arguments)

        def look(variables, batch):
            seen.append(batch["image"].shape)
            return step(variables, batch)

        return look

    monkeypatch.setattr(segment, "_step", spied)
    for name, count in (("one", 1), ("all", 3)):
        images = {f"im{n}": folder / f"im{n}.png" for n in range(count)}
        Segmenter(small_run, tmp_path / name).run(images)
    assert small_run.experiment.eval_batch_size == 3
    assert seen == [(1, 49, 57, 3), (3, 49, 57, 3)]
    one, among = (labels_of(tmp_path / name / "im0.png") for name in ("one", "all"))
    np.testing.assert_array_equal(one, among)


def test_strips_are_the_whole(monkeypatch):
    """Rows at a time, whatever does not divide."""
    monkeypatch.setattr(segmentation, "_ROWS", 64)
    logits = np.random.default_rng(0).normal(size=(9, 7, 3)).astype(np.float32)
    size = (200, 150)
    whole = segmentation.predict(logits[None], np.array([size]), (256, 192))[0]
    parts = list(strips(logits, size, shares=True))
    assert [rows.start for rows, *_ in parts] == [0, 64, 128, 192]
    np.testing.assert_array_equal(np.concatenate([x for _, x, _ in parts]), whole[:200, :150])
    for (rows, labels, shares), (same, plain, nothing) in zip(
        parts, strips(logits, size), strict=True
    ):
        assert rows == same and nothing is None
        np.testing.assert_array_equal(labels, plain)
        own = np.take_along_axis(shares, labels[..., None], -1)[..., 0]
        np.testing.assert_array_equal(own, shares.max(-1))  # 16 bits may tie
        np.testing.assert_allclose(shares.sum(-1), 1, atol=2e-3)


@pytest.mark.slow
def test_killed_and_started_again(small_run, folder, tmp_path):
    """Wherever it is killed, the same command ends with the files of an undisturbed one."""
    rng = np.random.default_rng(0)
    for n in range(40):
        size = tuple(rng.integers(20, 700, 2))
        pixels = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        (tmp_path / "own" / f"day{n % 3}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "own" / f"day{n % 3}" / f"{n:02d}.png")

    def command(out):
        line = [sys.executable, "-m", "protoseg_jax", "segment", str(tmp_path / "own")]
        line += [f"--workdir={small_run.workdir.path}", f"--out={out}", "--overlay", "--devices=1"]
        return [*line, "--probabilities"]

    def files(out):
        return {
            str(path.relative_to(out)): path.read_bytes()
            for path in out.rglob("*")
            if path.is_file() and path.name not in ("segment.json", "segmented.jsonl")
        }

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    out, seen = tmp_path / "killed", 0
    for kills in range(2):
        process = subprocess.Popen(
            command(out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        # Some files further on, at another moment of a write each time.
        while process.poll() is None and len(list(out.rglob("*.png"))) < seen + 8:
            time.sleep(0.01)
        time.sleep(0.003 * kills)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
        seen = len(list(out.rglob("*.png")))
        for path in out.rglob("*.png"):  # nothing is written half
            Image.open(path).load()
    last = subprocess.run(command(out), capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    assert "of 40 images are done already" in last.stderr
    assert files(out) == files(tmp_path / "whole")
    assert len(files(out)) == 3 * 40 + 1  # classes, overlay and probabilities; one legend
