"""Pascal VOC 2012 and Cityscapes from training, at small size, to a submission."""

import numpy as np
import pytest
from PIL import Image

from protoseg_jax.data.sets import cityscapes
from protoseg_jax.errors import UserError
from protoseg_jax.evaluation.score import score_run
from protoseg_jax.run.workdir import Workdir
from protoseg_jax.training import run as runs
from tests.data.official import make_cityscapes, make_voc
from tests.small import PHASES, make_config

pytestmark = pytest.mark.slow


def train(tmp_path, name, *left_out, **model):
    config = make_config(tmp_path)
    config.batch_size = 8
    config.data.update({"name": name, "dir": str(tmp_path / "data")})
    config.model.update({"norm": "frozen_batch", "stride_in": "auto", "preprocessing": "auto"})
    config.model.update(model)
    for phase in ("warmup", "joint", "finetune", "pruning", "finetune_pruned"):
        config.phases[phase].steps = int(phase not in left_out)
    if name == "voc":
        config.data.train_split = "train_aug"
    runs.train(config, str(tmp_path / "work"))
    return Workdir(tmp_path / "work")


def test_voc_with_multi_scale_inputs(tmp_path):
    """Cityscapes, below, goes through the other phases."""
    make_voc(tmp_path / "data", train_aug=False)
    left_out = ("warmup", "finetune", "pruning", "finetune_pruned")
    workdir = train(tmp_path, "voc", *left_out, msc=(0.5, 0.75))
    assert [e["phase"] for e in workdir.summary()] == ["joint", "projection"]
    assert {p.image_id[:4] for p in workdir.checkpoints.restore("projection").prototypes} == {
        "2007"
    }
    with pytest.raises(UserError, match="split 'test' of data set 'voc' has no labels"):
        score_run(str(workdir.path), "test", None, None)
    out = tmp_path / "out"
    assert score_run(str(workdir.path), "test", None, str(out)) is None
    (written,) = out.rglob("*.png")
    folder = "results/VOC2012/Segmentation/comp6_test_cls"
    assert written.relative_to(out).as_posix() == f"{folder}/2008_000006.png"
    prediction = Image.open(written)
    source = Image.open(tmp_path / "data/VOCdevkit/VOC2012/JPEGImages/2008_000006.jpg")
    assert prediction.size == source.size and prediction.mode == "P"


def test_cityscapes(tmp_path):
    make_cityscapes(tmp_path / "data")
    workdir = train(tmp_path, "cityscapes")
    assert [e["phase"] for e in workdir.summary()] == PHASES
    out = tmp_path / "out"
    scores = score_run(str(workdir.path), "validation", None, str(out))
    assert scores["images"] == 2 and len(scores["iou"]) == 19
    written = sorted(out.iterdir())
    assert [p.name for p in written] == [
        f"frankfurt_00000{n}_000019_pred_labelIds.png" for n in (0, 1)
    ]
    for path in written:
        prediction = np.array(Image.open(path))
        assert prediction.shape == (64, 128)
        assert set(np.unique(prediction)) <= set(cityscapes.IDS)
