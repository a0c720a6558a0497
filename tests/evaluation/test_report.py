"""The paper's tables beside our runs: every figure in its place, "not run" where there is none."""

import json
import subprocess
import sys

import pytest

from configs import isbi_em, pascal
from protoseg_jax.errors import UserError
from protoseg_jax.evaluation import report


def make_run(
    root,
    name,
    data,
    miou,
    *,
    diversity=0.25,
    head="prototypes",
    preprocessing="imagenet",
    steps=30_000,
):
    phases = ("warmup", "joint", "projection", "finetune", "pruning", "finetune_pruned")
    if head == "linear":
        phases = phases[:2]
    module = isbi_em if data == "isbi_em" else pascal
    config = json.loads(module.get_config().to_json())
    config["data"]["name"] = data
    config["model"].update({"head": head, "preprocessing": preprocessing})
    config["loss"]["diversity"] = diversity
    config["pretrained"]["path"] = "weights.pth"
    config["phases"]["joint"]["steps"] = 10_000 if data == "isbi_em" else steps
    summary = [
        {
            "phase": phase,
            "num_prototypes": None if head == "linear" else 200 - n,
            "miou": miou + n / 100,
            "overlap": None if head == "linear" else 0.25,
            "f_error": 0.05,
        }
        for n, phase in enumerate(phases)
    ]
    folder = root / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps(summary))
    return str(folder)


def cells(text, *words):
    """The cells of the one line that holds all these words."""
    (line,) = [x for x in text.splitlines() if all(w in x for w in words)]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_figures_are_in_their_places(tmp_path):
    runs = [
        report.read(make_run(tmp_path, "a", "voc", 0.60)),
        report.read(make_run(tmp_path, "b", "voc", 0.62)),
        report.read(make_run(tmp_path, "c", "voc", 0.70, head="linear")),
        report.read(make_run(tmp_path, "d", "cityscapes", 0.5, diversity=0.0)),
        report.read(make_run(tmp_path, "e", "cityscapes", 0.4, preprocessing="caffe")),
        report.read(make_run(tmp_path, "f", "isbi_em", 0.7)),
    ]
    text = report.tables(runs)
    assert cells(text, "Pascal", "ProtoSeg, ImageNet")[2:] == ["72.05", "72.92", "66.00 ± 1.41"]
    assert cells(text, "Pascal", "DeepLabv2")[-1] == "71.00"
    assert cells(text, "Pascal", "ProtoSeg, COCO")[-1] == report.NOT_RUN
    assert cells(text, "Cityscapes", "ProtoSeg, COCO")[-1] == "45.00"
    assert cells(text, "Cityscapes", "| 0 |")[2:] == ["57.99", "25.00", "61.60", "55.00"]
    assert cells(text, "Pascal", "`finetune`")[3:] == ["201", "197 ± 0", "72.00", "64.00 ± 1.41"]
    assert cells(text, "Cityscapes", "`warmup`")[4] == report.NOT_RUN
    assert cells(text, "ProtoSeg (U-Net)")[1:] == ["76.58", "75.00", "5.40", "5.00"]


def test_a_run_that_started_from_another_does_not_stand_beside_the_paper(tmp_path):
    folder = make_run(tmp_path, "a", "isbi_em", 0.7)
    path = tmp_path / "a" / "config.json"
    config = json.loads(path.read_text())
    config["pretrained"]["path"] = "runs/black.box"
    path.write_text(json.dumps(config))
    run = report.read(folder)
    assert run.row == ("isbi_em", "other")
    assert run.deviations == ["it started from run runs/black.box"]


def test_a_shortened_run_does_not_stand_beside_the_paper(tmp_path, capsys):
    folder = make_run(tmp_path, "smoke", "voc", 0.9, steps=3)
    report.print_tables([folder])
    text = capsys.readouterr().out
    assert "90.0" not in text and "95.0" not in text
    assert f"{folder} is of no row of Tables 1–4 (phases.joint.steps is 3, not 30000)" in text


def test_without_runs_nothing_is_claimed():
    text = report.tables([])
    assert text.count(report.NOT_RUN) == 6 + 2 * 4 + 2 * 8 + 2 * 2


@pytest.mark.parametrize(("folders", "words"), [([], "no run given"), (["/nowhere"], "no run")])
def test_bad_folders_are_one_line(folders, words):
    with pytest.raises(UserError, match=words) as error:
        report.print_tables(folders)
    assert len(str(error.value).splitlines()) == 1


def test_the_command_says_so_with_exit_code_2():
    command = [sys.executable, "-m", "protoseg_jax", "tables", "/nowhere"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "no run" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_what_counts_for_nothing_is_told(tmp_path, capsys):
    folders = [make_run(tmp_path, "a", "parts", 0.5), make_run(tmp_path, "b", "voc", 0.5)]
    summary = tmp_path / "b" / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text())[:2]))
    report.print_tables(folders)
    text = capsys.readouterr().out
    assert (
        f"{folders[0]} is of no row of Tables 1–4 (its data set 'parts' is none of the paper's)"
        in text
    )
    assert f"{folders[1]} is not finished (warmup, joint)." in text


def test_the_tables_of_a_run_in_text():
    """Stages, classes and a change; dashes where there is nothing."""
    entry = {"num_prototypes": 8, "miou": 0.5, "pixel_error": 0.125, "overlap": None}
    text = report.stage_table([{"phase": "joint", **entry, "seconds": 3725.4}])
    assert text.splitlines() == [
        "stage  prototypes  mIoU %  error %  overlap %     time",
        "─────  ──────────  ──────  ───────  ─────────  ───────",
        "joint           8   50.00    12.50          –  1:02:05",
    ]
    scores = {"iou": {"sky": 0.75, "car": None}, "miou": 0.75, "pixel_accuracy": 0.5}
    text = report.class_table({**scores, "overlap": 0.25, "overlap_pooled": 0.2}, ("sky", "car"))
    assert [line.rsplit(maxsplit=1) for line in text.splitlines()[2:]] == [
        ["sky", "75.00"],
        ["car", "–"],
        ["mean", "75.00"],
        ["pixel accuracy", "50.00"],
        ["overlap", "25.00"],
    ]
    before = {"iou": [0.5, None], "miou": 0.5, "pixel_accuracy": 0.75}
    after = {"iou": [0.25, 0.5], "miou": 0.375, "pixel_accuracy": 0.8}
    text = report.change_table(before, after, ("sky", "car"))
    assert [line.split()[-3:] for line in text.splitlines()[2:]] == [
        ["50.00", "25.00", "-25.00"],
        ["–", "50.00", "–"],
        ["50.00", "37.50", "-12.50"],
        ["75.00", "80.00", "+5.00"],
    ]


def test_measures_of_explanations_have_a_table(tmp_path):
    """Mean and deviation over the runs of a data set and λ_J that were measured."""
    folders = [make_run(tmp_path, name, "parts", 0.5) for name in "abc"]
    assert "Measures" not in report.tables([report.read(f) for f in folders])
    for folder, sparsity in zip(folders[:2], (2.0, 4.0), strict=True):
        path = tmp_path / folder / "eval" / "validation-finetune_pruned.json"
        path.parent.mkdir()
        found = {"utilisation": 0.5, "unused": 3, "sparsity": sparsity, "consistency": 0.4}
        found["reach"] = {"mean": sparsity / 20 + 0.05}
        path.write_text(json.dumps({"phase": "finetune_pruned", "interpretability": found}))
    text = report.tables([report.read(f) for f in folders])
    assert cells(text, "measure", "λ_J")[1:] == ["parts, λ_J = 0.25, 2 runs"]
    assert cells(text, "utilisation, %")[1] == "50.00 ± 0.00"
    assert cells(text, "prototypes that win no point")[1] == "3.00 ± 0.00"
    assert cells(text, "sparsity: prototypes a decision")[1] == "3.00 ± 1.41"
    assert cells(text, "reach, mean, %")[1] == "20.00 ± 7.07"
    assert "consistency" not in text  # of an older definition

    config = json.loads((tmp_path / "b" / "config.json").read_text())
    other = {**config, "seed": 7}
    (tmp_path / "b" / "config.json").write_text(json.dumps(other))
    assert "parts, λ_J = 0.25, 2 runs" in report.tables([report.read(f) for f in folders])
    other = {**config, "batch_size": 3}  # not the same experiment: not averaged
    (tmp_path / "b" / "config.json").write_text(json.dumps(other))
    text = report.tables([report.read(f) for f in folders])
    assert cells(text, "measure", "λ_J")[1:] == [f"parts, λ_J = 0.25 ({n})" for n in "ab"]
    assert cells(text, "sparsity: prototypes a decision")[1:] == ["2.00", "4.00"]

    config["data"]["held_out"] = "car"
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    text = report.tables([report.read(f) for f in folders])
    head, found = cells(text, "measure", "λ_J"), cells(text, "sparsity: prototypes a decision")
    assert dict(zip(head[1:], found[1:], strict=True)) == {
        "parts, λ_J = 0.25": "2.00",
        "parts without car, λ_J = 0.25": "4.00",
    }
