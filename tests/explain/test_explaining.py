"""What explain.py does beside showing: refusing, and taking prototypes away."""

import json
import shutil
import xml.etree.ElementTree
from types import SimpleNamespace

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pytest

import protoseg_jax
from protoseg_jax.data.labels import generic
from protoseg_jax.errors import UserError
from protoseg_jax.explain import figures, mistakes
from protoseg_jax.explain.evidence import point_counts
from protoseg_jax.explain.figures import draw_figures
from protoseg_jax.explain.model import Picture
from protoseg_jax.explain.page import explain_run
from protoseg_jax.training.removal import remove


def test_wrong_regions_and_their_causes():
    truth = np.zeros((12, 14), np.uint8)
    truth[2:6, 3:9] = 1
    truth[9, :] = 255
    labels = np.zeros_like(truth)
    labels[4:6, 3:9] = 1
    labels[9:, 0] = 2
    first, second = mistakes.wrong_regions(labels, truth, 3)
    assert (first["truth"], first["label"], first["pixels"]) == (1, 0, 12)
    assert first["box"] == [2, 3, 4, 9]
    assert 2 <= first["row"] < 4 and 3 <= first["col"] < 9
    assert set(zip(*(x.tolist() for x in first["samples"]), strict=True)) == {
        (y, x) for y in (2, 3) for x in range(3, 9)
    }
    assert (second["truth"], second["label"], second["pixels"]) == (0, 2, 2)
    similarities, kernel = np.array([[1.0, 4.0], [3.0, 0.0]]), np.array([[1.0, -1.0], [-0.5, 2.0]])
    assert mistakes.causes(similarities, kernel, 1, 0) == [(1, 5.0), (0, -4.0)]


def test_kinds_of_mistake_come_by_their_pixels():
    """Two images and one without labels; in each kind the largest regions first, wherever."""
    truth = np.zeros((2, 6, 8), np.uint8)
    truth[:, 0] = 255
    labels = np.zeros_like(truth)
    labels[0, 1, :3], labels[1, 3:5, 2:6] = 2, 2  # 3 and 8 pixels of class 0 taken for 2
    truth[1, 5, 7] = 1  # 1 pixel of class 1 taken for 0
    images = [
        SimpleNamespace(labels=a, truth=b, regions=mistakes.wrong_regions(a, b, 3))
        for a, b in zip(labels, truth, strict=True)
    ]
    images.insert(1, SimpleNamespace(labels=labels[0], truth=None, regions=[]))
    first, second = mistakes.confusions(images, 3)
    assert (first["truth"], first["label"], first["pixels"], first["of"]) == (0, 2, 11, 79)
    assert [(r["image"], r["pixels"]) for r in first["regions"]] == [(2, 8), (0, 3)]
    assert (second["truth"], second["label"], second["pixels"], second["of"]) == (1, 0, 1, 1)
    assert [(r["image"], r["row"], r["col"]) for r in second["regions"]] == [(2, 5, 7)]


def test_a_page_is_replaced_but_nothing_else(small_run, tmp_path):
    path = str(small_run.workdir.path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(UserError, match="no explorer page"):
        explain_run(path, "validation", [], str(tmp_path / "thesis"))
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    with pytest.raises(UserError, match="cannot be written"):
        explain_run(path, "validation", [], "/proc/nowhere/page")


def test_prototypes_that_cannot_be_removed(small_run, tmp_path):
    path = str(small_run.workdir.path)
    model = protoseg_jax.load(path)
    own = [str(p.index) for p in model.prototypes if p.class_ == 1]
    cases = [
        (["99"], "has no prototype 99"),
        (["0", "seven", "-1"], "has no prototype seven, -1"),
        (own, "the last prototype of class 'disc'"),
        ([str(p.index) for p in model.prototypes], "the last prototype"),
    ]
    for ids, words in cases:
        with pytest.raises(UserError, match=words) as error:
            remove(path, ids, str(tmp_path / "new"), force=len(ids) > len(own))
        assert "\n" not in str(error.value) and not (tmp_path / "new").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="is not empty"):
        remove(path, own[:1], str(tmp_path / "full"), force=False)
    early = tmp_path / "early"
    shutil.copytree(path, early)
    shutil.rmtree(early / "checkpoints" / "projection")
    (early / "checkpoints" / "projection.json").unlink()
    with pytest.raises(UserError, match="before projection"):
        remove(str(early), own[:1], str(tmp_path / "new"), force=False)


def files_of(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("force", [False, True])
def test_a_new_run_without_prototypes(small_run, tmp_path, capsys, force):
    """Its last layer alone has learnt; the original is as it was; what changed is told."""
    path, model = small_run.workdir.path, protoseg_jax.load(small_run.workdir.path)
    own = [p.index for p in model.prototypes if p.class_ == 1]
    gone = own if force else own[:2]
    before = files_of(path)
    ids = [str(i) for i in gone]
    remove(str(path), ids, str(tmp_path / "new"), force=force)
    assert files_of(path) == before
    printed = capsys.readouterr().out
    assert "before %" in printed and "disc" in printed and "mean" in printed
    new = protoseg_jax.load(tmp_path / "new")
    assert new.phase == "finetune_pruned"
    assert [p.index for p in new.prototypes] == [
        p.index for p in model.prototypes if p.index not in gone
    ]
    old, params = (m.checkpoint.arrays["params"] for m in (model, new))
    keep = [j for j, p in enumerate(model.prototypes) if p.index not in gone]
    np.testing.assert_array_equal(
        params["prototypes"]["vectors"], old["prototypes"]["vectors"][keep]
    )
    assert not np.array_equal(new.kernel, model.kernel[keep])
    np.testing.assert_allclose(new.kernel, model.kernel[keep], atol=3 * 1e-3 + 1e-6)  # 3 steps
    record = json.loads((tmp_path / "new" / "removed.json").read_text())
    assert record["removed"] == gone and record["phase"] == "projection"
    assert [e["phase"] for e in new.workdir.summary()] == ["pruning", "finetune_pruned"]
    assert record["after"]["miou"] == pytest.approx(new.workdir.summary()[-1]["miou"])
    assert all(p.patch is not None and p.source for p in new.prototypes)
    remove(str(path), ids, str(tmp_path / "new"), force=force)  # goes on: nothing to do
    with pytest.raises(UserError, match="is not empty"):
        remove(str(path), ids[:1], str(tmp_path / "new"), force=force)


def test_points_are_counted_as_one_by_one(small_run):
    model = small_run
    counts = point_counts(model, "validation")
    source, inference = model.experiment.data.source("validation"), model.inference
    expected = np.zeros((2, len(model.prototypes)), int)
    classes = np.array([p.class_ for p in model.prototypes])
    for n in range(len(source)):
        points = model.explain(source[n]["image"]).parts[0].points
        h, w = points.label.shape
        height, width = source[n]["label"].shape
        for y, x in np.ndindex(h, w):
            expected[0, points.prototype[y, x]] += 1
            c = source[n]["label"][(2 * y + 1) * height // (2 * h), (2 * x + 1) * width // (2 * w)]
            own = np.nonzero(classes == c)[0]
            if len(own):
                expected[1, own[points.similarities[y, x, own].argmax()]] += 1
    assert inference.eval_size == (49, 57)
    np.testing.assert_array_equal(counts["won"], expected[0])
    np.testing.assert_array_equal(counts["used"], expected[1])


def test_figures_that_cannot_be_drawn(small_run, tmp_path):
    path = str(small_run.workdir.path)
    with pytest.raises(UserError, match="figure fig9 is unknown; there are fig2, fig5"):
        draw_figures(path, "validation", [], None, ["fig5", "fig9"], None)
    other = tmp_path / "other"
    shutil.copytree(path, other)
    record = json.loads((other / "classes.json").read_text())
    record["names"][1] = "ring"
    (other / "classes.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="different classes"):
        draw_figures(path, "validation", [], None, ["fig5"], str(other))
    own = tmp_path / "own.png"
    cv2.imwrite(str(own), np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(UserError, match="images of one's own have no part labels; leave parts out"):
        draw_figures(path, "validation", [str(own)], None, ["parts"], None)
    assert not (small_run.workdir.path / "figures").exists()


def test_pixels_have_the_colour_of_the_part_that_their_prototype_stands_for():
    """Prototypes of the car (most points first): 2 and 0 stand for the wheel, 1 for no part; 3, of
    the road, wins pixels of the car; the last row is predicted road."""
    truth = np.repeat(np.array([[1, 1, 1, 1, 0]], np.uint8), 4, 0)
    parts = np.repeat(np.array([[0, 1, 2, 2, 0]], np.uint8), 4, 0)
    labels = truth.copy()
    labels[3] = 0
    winners = np.repeat(np.array([[0, 1, 2, 3, 3]]), 4, 0)
    image, names = np.full((4, 5, 3), 100, np.uint8), ("none", "wheel", "body")
    wheel = ("wheel", 0.9, 0.4)
    side = figures.Side(
        "run",
        "prototype",
        [SimpleNamespace(class_=c, index=j) for j, c in enumerate((1, 1, 1, 0))],
        np.array([5, 9, 7, 4]),
        [wheel, None, wheel, None],
        [figures.Seen(labels, np.zeros((1, 1, 4)), winners)],
        "",
    )
    picture = Picture("one", image, truth, parts, names)
    ((name, figure, _),) = figures.parts([picture], [side], generic(("road", "car")))
    shown = [axis.images[0].get_array() for axis in figure.axes]
    plt.close(figure)
    assert name == "parts_car" and len(shown) == 3

    def tinted(colour):
        return (0.35 * 100 + 0.65 * np.array(colour)).astype(np.uint8)

    of_wheel, of_body = np.array(generic(("a", "b", "c")).colours[1:])
    true = np.array([image[0, 0], tinted(of_wheel), tinted(of_body), tinted(of_body), image[0, 0]])
    np.testing.assert_array_equal(shown[1], np.repeat(true[None], 4, 0))
    row = [tinted(0.8 * of_wheel), tinted([128] * 3), tinted(of_wheel), image[0, 0], image[0, 0]]
    expected = np.repeat(np.array(row)[None], 4, 0)
    expected[3] = 100
    np.testing.assert_array_equal(shown[2], expected)


@pytest.mark.slow
def test_figures_of_one_run_and_of_two(small_run, tmp_path):
    path = str(small_run.workdir.path)
    names = ["fig2", "fig5", "fig6", "fig7", "fig8"]
    one = draw_figures(path, "validation", [], str(tmp_path / "one"), names, None)
    two = draw_figures(path, "validation", [], str(tmp_path / "two"), names, path)
    for written in (one, two):
        assert {p.name.partition(".")[0].partition("_")[0] for p in written} == set(names)
        for file in written:
            root = xml.etree.ElementTree.parse(file).getroot()
            assert root.tag.endswith("svg")
    bars = [x.read_text().count("clip-path") for x in (one + two) if x.name == "fig5.svg"]
    assert bars[1] == 2 * bars[0] == 2 * len(protoseg_jax.load(path).prototypes)
    assert len([p for p in two if p.name.startswith("fig8")]) == 4  # two images, two runs
