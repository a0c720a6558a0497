"""The paper's Cityscapes: Pascal's recipe with larger crops and no MSC (section 4).

python train.py --config=configs/cityscapes.py[:ROW] --config.data.dir=PATH \\
    --config.pretrained.path=FILE

ROW is one of configs/pascal.py.
"""

from protoseg_jax.config import ConfigDict, default, require_row

ROWS = ("imagenet", "coco", "no_diversity", "deeplab")


def get_config(row: str = "imagenet") -> ConfigDict:
    require_row(row, ROWS)
    c = default()
    c.data.update({"name": "cityscapes", "workers": 8})
    c.crop_size = (513, 513)
    c.eval_size = (1024, 2048)
    c.eval_batch_size = 2
    if row == "no_diversity":
        c.loss.diversity = 0.0
    if row == "deeplab":
        c.model.head = "linear"
    return c
