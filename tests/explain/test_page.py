"""The explorer in a real browser: what is clicked shows the numbers that the API gives."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import protoseg_jax
from benchmarks import browser
from benchmarks import explaining as benchmark
from protoseg_jax.errors import UserError
from protoseg_jax.evaluation.score import measure
from protoseg_jax.explain import page as pages
from protoseg_jax.explain.page import explain_run
from protoseg_jax.files import read_json, write_json

pytestmark = pytest.mark.slow
ROWS = """[...document.querySelectorAll('.evidence li[data-prototype]')].map(
  (li) => [Number(li.dataset.prototype), Number(li.querySelector('data').value)])"""
SCORES = """Object.fromEntries([...document.querySelectorAll('#scores tr')].map(
  (tr) => [tr.dataset.class, Number(tr.querySelector('data').value)]))"""


@pytest.fixture(scope="module")
def model(small_run):
    return protoseg_jax.load(small_run.workdir.path)


@pytest.fixture(scope="module")
def examples(small_run):
    return small_run.experiment.data.source("validation")


@pytest.fixture(scope="module")
def page(small_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "explain"
    return explain_run(str(small_run.workdir.path), "validation", [], str(out))


def opened(kind):
    if not kind.find():
        pytest.skip(f"no {kind.name} on this machine (apt-get install chromium firefox-esr)")
    return kind()


@pytest.fixture(scope="module")
def chromium():
    with opened(browser.Chromium) as window:
        yield window


@pytest.fixture(scope="module", params=[browser.Chromium, browser.Firefox], ids=lambda k: k.name)
def window(request):
    with opened(request.param) as window:
        yield window


def value(window, selector):
    return float(window.evaluate(f"document.querySelector('{selector} data').value"))


def check_pixel(window, model, why, row, col, tolerance=1e-4):
    """Everything the page says of a pixel is what the API says."""
    pixel, ids = why.at(row, col), [p.index for p in model.prototypes]
    names = model.classes.names
    where = window.evaluate("document.querySelector('#where').textContent")
    assert where == f"Row {row}, column {col}: "
    assert window.evaluate("document.querySelector('#label').textContent") == names[pixel.label]
    for name, score in window.evaluate(SCORES).items():
        assert score == pytest.approx(pixel.logits[names.index(name)], abs=tolerance)
    shown = window.evaluate(ROWS)
    assert shown
    for index, part in shown:
        assert part == pytest.approx(pixel.contributions[ids.index(index)], abs=tolerance)
    best = ids[int(pixel.contributions.argmax())]
    assert best in [index for index, _ in shown] or pixel.contributions.max() <= 0
    assert value(window, "#total") == pytest.approx(pixel.logits.max(), abs=tolerance)
    assert value(window, "#lead") == pytest.approx(pixel.margins.sum(), abs=tolerance)
    assert value(window, "#novelty") == pytest.approx(why.novelty[row, col], abs=tolerance)


def test_a_pixel_named_in_the_address(window, examples, model, page):
    source = examples
    for number, (row, col) in enumerate([(0, 0), (33, 47)]):
        why = model.explain(source[number]["image"])
        window.open(page, f"image={number}&row={row}&col={col}")
        check_pixel(window, model, why, row, col)
    assert window.problems == []


def test_a_click_and_the_arrow_keys(window, examples, model, page):
    image = examples[0]["image"]
    why, (height, width) = model.explain(image), image.shape[:2]
    window.open(page)
    left, top, across, down = window.evaluate(
        "(r => [r.left, r.top, r.width, r.height])(document.querySelector('#stage')"
        ".getBoundingClientRect())"
    )
    window.click(left + (21 + 0.5) / width * across, top + (13 + 0.5) / height * down)
    check_pixel(window, model, why, 13, 21)
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        window.press(key)
    check_pixel(window, model, why, 14, 23)
    window.press("ArrowUp", shift=True)
    check_pixel(window, model, why, 4, 23)
    for _ in range(2):
        window.press("ArrowUp", shift=True)
    check_pixel(window, model, why, 0, 23)
    assert "row=0&col=23" in window.evaluate("location.hash")
    window.press("]")
    assert "image=1" in window.evaluate("location.hash")


def test_why_not_shows_the_parts_of_the_margin(window, examples, model, page):
    why = model.explain(examples[1]["image"])
    window.open(page, "image=1&row=20&col=20")
    pixel, ids = why.at(20, 20), [p.index for p in model.prototypes]
    window.evaluate("document.querySelectorAll('#question input')[1].click()")
    margins = dict(zip(ids, pixel.margins, strict=True))
    assert window.evaluate(ROWS)
    for index, part in window.evaluate(ROWS):
        assert part == pytest.approx(margins[index], abs=1e-4)
    assert value(window, "#total") == pytest.approx(pixel.margins.sum(), abs=1e-4)


def test_every_layer_is_painted_and_no_picture_is_missing(window, page):
    window.open(page)
    for key in "123456":
        window.press(key)
        assert window.evaluate("document.querySelector('#overlay').hidden") == (key == "1")
    for view in ("prototypes", "mistakes", "image"):
        window.evaluate(f"document.querySelector('[data-view={view}]').click()")
        window.evaluate("document.querySelectorAll('img').forEach((i) => { i.loading = 'eager'; })")
        window.wait("[...document.images].every((i) => i.complete && i.naturalWidth)")
        assert window.evaluate("[...document.images].every((i) => i.alt)")
    assert window.problems == []


def test_winning_prototypes_layer_equals_the_api(window, examples, model, page):
    points = model.explain(examples[0]["image"]).parts[0].points
    window.open(page, "image=0&layer=novelty")
    shown = window.evaluate("Array.from(everyPoint(images.get(0)).winner)")
    np.testing.assert_array_equal(shown, points.prototype.ravel())
    shown = window.evaluate("Array.from(everyPoint(images.get(0)).novelty)")
    np.testing.assert_allclose(shown, points.novelty.ravel(), atol=1e-5)


def test_the_page_fits_a_narrow_window(chromium, page):
    chromium.resize(360, 740)
    try:
        for view in ("image", "prototypes", "mistakes"):
            chromium.open(page, f"view={view}")
            assert chromium.evaluate("document.documentElement.scrollWidth") <= 360
    finally:
        chromium.resize(1280, 900)


def test_mistakes_lead_to_the_pixel_and_its_rival(window, examples, model, page):
    window.open(page, "view=mistakes")
    record = json.loads(
        re.search(r"run\((.*)\);", (page.parent / "data" / "run.js").read_text())[1]
    )
    kind = record["confusions"][0]
    region = kind["regions"][0]
    window.evaluate("document.querySelector('.region .plain').click()")
    window.wait("!!document.querySelector('#total')")
    truth = examples[region["image"]]["label"]
    assert truth[region["row"], region["col"]] == kind["truth"]
    why = model.explain(examples[region["image"]]["image"])
    pixel = why.at(region["row"], region["col"])
    assert pixel.label == kind["label"]
    margin = pixel.logits[kind["label"]] - pixel.logits[kind["truth"]]
    assert value(window, "#total") == pytest.approx(margin, abs=1e-4)


@pytest.mark.parametrize("budget", [1000, 200])
def test_large_maps_are_kept_in_16_bits_or_thinned_out(
    chromium, examples, small_run, model, tmp_path, monkeypatch, budget
):
    monkeypatch.setattr(pages, "_IMAGE_BYTES", budget)
    path = str(small_run.workdir.path)
    page = explain_run(path, "validation", [], str(tmp_path / "explain"))
    chromium.open(page, "image=0&row=20&col=30")
    step = chromium.evaluate("images.get(0).step")
    assert (step > 1) == (budget == 200)
    assert ("too many for this page" in chromium.evaluate("document.body.textContent")) == (
        step > 1
    )
    why = model.explain(examples[0]["image"])
    if step == 1:
        return check_pixel(chromium, model, why, 20, 30, tolerance=2e-2)
    points = why.parts[0].points
    row, col = chromium.evaluate("nearestKept(images.get(0), state.row, state.col)")
    place = row * step + step // 2, col * step + step // 2
    for name, score in chromium.evaluate(SCORES).items():
        expected = points.logits[place][model.classes.names.index(name)]
        assert score == pytest.approx(expected, abs=2e-2)


def test_a_run_before_projection_says_so(chromium, small_run, tmp_path):
    path = tmp_path / "early"
    shutil.copytree(small_run.workdir.path, path)
    shutil.rmtree(path / "checkpoints" / "projection")
    (path / "checkpoints" / "projection.json").unlink()
    page = explain_run(str(path), "validation", [], None)
    assert page == path / "explain" / "index.html"
    chromium.open(page, "image=0&row=10&col=10")
    text = chromium.evaluate("document.querySelector('#notes').textContent")
    assert "before projection" in text
    assert "not a patch yet" in chromium.evaluate("document.querySelector('#for').textContent")


def test_without_data_or_sources_the_page_is_whole(chromium, examples, small_run, tmp_path):
    """Crops travel with the run: a source image that was deleted leaves its patch."""
    path = tmp_path / "alone"
    shutil.copytree(small_run.workdir.path, path)
    config = read_json(path / "config.json")
    config["data"] |= {"dir": "/nowhere", "cache": "/nowhere"}
    write_json(path / "config.json", config)
    next((path / "prototypes" / "sources").iterdir()).unlink()
    with pytest.raises(UserError, match="--images"):
        explain_run(str(path), "validation", [], None)
    assert not (path / "explain").exists()
    image = examples[0]["image"]
    Image.fromarray(image).save(tmp_path / "own.png")
    page = explain_run(str(path), "validation", [str(tmp_path / "own.png")], None)
    chromium.open(page, "image=0&row=10&col=10")
    check_pixel(chromium, protoseg_jax.load(path), protoseg_jax.load(path).explain(image), 10, 10)
    text = chromium.evaluate("document.querySelector('#notes').textContent")
    assert "The data set is not at hand" in text and "are not with the run" in text
    chromium.open(page, "view=prototypes")
    text = chromium.evaluate("document.querySelector('main').textContent")
    assert "source not with the run" in text
    assert chromium.problems == []


def test_a_card_tells_reach_and_part(window, small_run, page, tmp_path):
    """Reach as it is measured; no part where the data set has none, and what is known of one."""
    found = measure(small_run.experiment, small_run.checkpoint, "validation", ("reach",))
    window.open(page, "view=prototypes")
    cards = "[...document.querySelectorAll('#view-prototypes [data-prototype]')]"
    shown = window.evaluate(f"{cards}.map((c) => Number(c.querySelector('.reach').value))")
    assert shown == pytest.approx(found["reach"]["prototypes"])
    assert window.evaluate("document.querySelectorAll('.part').length") == 0
    standing = pages.Standing(0.5, 0.25, ("wheel", 0.5, 0.125))
    plain = [pages.Standing()] * (len(small_run.prototypes) - 1)
    told = {"standings": [standing, *plain], "nearest": [[]] * len(small_run.prototypes)}
    pages.write(tmp_path / "page", small_run, facts=[], notes=[], shown=[], **told)
    record = (tmp_path / "page" / "data" / "run.js").read_text()
    assert '"share":0.5,"reach":0.25,"part":["wheel",0.5,0.125]' in record
    assert record.count('"part":null') == len(plain)
    assert window.problems == []


def test_ten_images_and_210_prototypes_stay_below_15_megabytes(tmp_path):
    folder = benchmark.page(tmp_path).parent
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 15e6
