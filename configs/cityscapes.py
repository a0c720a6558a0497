"""The paper's Cityscapes: Pascal's recipe with other data, larger crops and no MSC (section 4).

python train.py --config=configs/cityscapes.py[:ROW] --config.data.dir=PATH \\
    --config.pretrained.path=FILE

ROW is one of configs/pascal.py.
"""

from ml_collections import ConfigDict

from configs import pascal


def get_config(row: str = "imagenet") -> ConfigDict:
    c = pascal.get_config(row)
    c.data.name = "cityscapes"
    c.data.train_split = "train"
    c.crop_size = (513, 513)
    c.eval_size = (1024, 2048)
    c.eval_batch_size = 2
    c.model.msc = ()
    return c
