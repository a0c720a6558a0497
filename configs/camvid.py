"""ProtoSeg on CamVid's streets (SegNet layout), from scratch, sized for a CPU.

python train.py --config=configs/camvid.py --config.data.dir=PATH
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
    c.data.train_split = "train"
    c.data.projection_split = "train"
    # Around the half at which images are evaluated, so that things have the size they will have.
    c.augment = ConfigDict({"scale": (0.4, 0.8)})

    c.model = ConfigDict()
    c.model.backbone = "resnet"
    c.model.depth = 26
    c.model.width = 24
    c.model.norm = "group"
    c.model.stride_in = "3x3"
    c.model.output_stride = 8
    c.model.aspp_rates = (1, 3, 6, 9)
    c.model.head = "prototypes"
    c.model.features = 64
    c.model.prototypes_per_class = 10
    c.model.preprocessing = "imagenet"
    c.model.msc = ()  # (0.5, 0.75): multi-scale inputs
    c.model.remat = False  # True: less memory, about a third more work

    c.pretrained = ConfigDict({"path": config_dict.placeholder(str)})

    c.loss = ConfigDict({"diversity": 0.25, "l1": 1e-4, "diversity_reduction": "present"})

    # A high rate on the ASPP would saturate the sigmoid before the features have learnt anything.
    new = {"aspp": 3e-4, "prototypes": 2e-3}
    c.phases = ConfigDict()
    c.phases.warmup = {"steps": 50, "learning_rates": new, "schedule": "constant"}
    c.phases.joint = {
        "steps": 2000,
        "learning_rates": {"backbone": 2e-3, **new},
        "schedule": "poly",
    }
    c.phases.projection = {"steps": 1}
    c.phases.finetune = {"steps": 100, "learning_rates": {"head": 1e-3}, "schedule": "constant"}
    c.phases.pruning = {"steps": 1}
    c.phases.finetune_pruned = {
        "steps": 100,
        "learning_rates": {"head": 1e-3},
        "schedule": "constant",
    }

    c.log_every = 10
    c.eval_every = 500
    c.checkpoint_every = 250
    return c
