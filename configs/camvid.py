"""ProtoSeg on CamVid's streets (SegNet layout), from scratch, sized for a CPU.

python train.py --config=configs/camvid.py --config.data.dir=PATH

U-Net up to a quarter of the evaluated size: trained from scratch it learns these streets faster
than a DeepLab of equal cost.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0
    c.batch_size = 8
    c.accumulate = 1
    c.compute_dtype = "float32"
    c.crop_size = (180, 240)
    c.eval_size = (180, 240)  # half of 360 × 480; scores are at the labels' own size
    c.eval_batch_size = 8

    c.data = ConfigDict()
    c.data.name = "camvid"
    c.data.dir = config_dict.placeholder(str)
    c.data.cache = "data_cache"
    c.data.workers = 0
    c.data.held_out = config_dict.placeholder(str)  # a class to be void, for the novelty test
    c.data.train_split = "train"
    c.data.projection_split = "train"
    # Around the half at which images are evaluated, so that things have the size they will have.
    c.augment = ConfigDict({"scale": (0.4, 0.8)})

    c.model = ConfigDict()
    c.model.backbone = "unet"
    c.model.depth = 4
    c.model.width = 16
    c.model.output_stride = 4
    c.model.head = "prototypes"
    c.model.activation = "sigmoid"
    c.model.similarity = "log"
    c.model.features = 64
    c.model.prototypes_per_class = 10
    c.model.prototype_init = "patches"
    c.model.preprocessing = "imagenet"
    c.model.msc = ()
    c.model.remat = False

    c.pretrained = ConfigDict({"path": config_dict.placeholder(str)})

    c.loss = ConfigDict({"diversity": 0.25, "l1": 1e-4, "diversity_reduction": "present"})
    c.loss.class_balance = 0.5  # rare classes count more: weights (median / pixels)^0.5

    c.phases = ConfigDict()
    rates = {"backbone": 1e-3, "decoder": 1e-3, "prototypes": 1e-2, "head": 0.0}
    finetune = {"learning_rates": {"head": 3e-2}, "schedule": "poly"}
    c.phases.warmup = {"steps": 0, "learning_rates": rates, "schedule": "constant"}
    c.phases.joint = {"steps": 700, "learning_rates": rates, "schedule": "poly"}
    c.phases.projection = {"steps": 1}
    c.phases.finetune = {"steps": 30, **finetune}
    c.phases.pruning = {"steps": 1}
    c.phases.finetune_pruned = {"steps": 70, **finetune}

    c.log_every = 10
    c.eval_every = 300
    c.checkpoint_every = 250
    return c
