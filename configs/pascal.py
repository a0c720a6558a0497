"""The paper's Pascal VOC 2012: DeepLabv2 with ResNet-101, MSC (section 4).

python train.py --config=configs/pascal.py[:ROW] --config.data.dir=PATH \\
    --config.pretrained.path=FILE

ROW is `imagenet` (default), `coco` (the COCO weights: give that file), `no_diversity` (λ_J = 0), or
`deeplab` (DeepLabv2 without prototypes, trained at the same budget). All else is section 4's
recipe: the defaults.
"""

from protoseg_jax.config import ConfigDict, default, require_row

ROWS = ("imagenet", "coco", "no_diversity", "deeplab")


def get_config(row: str = "imagenet") -> ConfigDict:
    require_row(row, ROWS)
    c = default()
    c.data.update({"name": "voc", "train_split": "train_aug", "workers": 8})
    c.model.msc = (0.5, 0.75)
    if row == "no_diversity":
        c.loss.diversity = 0.0
    if row == "deeplab":
        c.model.head = "linear"
    return c
