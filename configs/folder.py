"""ProtoSeg on your own images: a folder with images/, masks/ and classes.txt.

python train.py --config=configs/folder.py --config.data.dir=PATH
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0
    c.batch_size = 8
    c.accumulate = 1
    c.compute_dtype = "float32"
    c.crop_size = (193, 193)
    c.eval_size = (257, 257)
    c.eval_overlap = config_dict.placeholder(int)  # larger images: tiles that overlap so much
    c.eval_batch_size = 8

    c.data = ConfigDict()
    c.data.name = "folder"
    c.data.dir = config_dict.placeholder(str)
    c.data.cache = "data_cache"
    c.data.workers = 0
    c.data.held_out = config_dict.placeholder(str)  # a class to be void, for the novelty test
    c.data.train_split = "train"
    c.data.projection_split = "train"
    c.data.void = 255
    c.augment = ConfigDict({"scale": (0.5, 1.5)})

    c.model = ConfigDict()
    c.model.backbone = "resnet"
    c.model.depth = 26
    c.model.width = 32
    c.model.norm = "group"
    c.model.stride_in = "3x3"
    c.model.output_stride = 8
    c.model.aspp_rates = (1, 3, 6, 9)
    c.model.head = "prototypes"
    c.model.features = 64
    c.model.prototypes_per_class = 10
    c.model.prototype_init = "uniform"  # or "patches", random training points
    c.model.preprocessing = "imagenet"
    c.model.msc = ()  # (0.5, 0.75): multi-scale inputs
    c.model.remat = False  # True: less memory, about a third more work

    c.pretrained = ConfigDict({"path": config_dict.placeholder(str)})

    c.loss = ConfigDict({"diversity": 0.25, "l1": 1e-4, "diversity_reduction": "present"})

    everything_but_head = {"backbone": 1e-3, "aspp": 1e-3, "prototypes": 1e-3}
    c.phases = ConfigDict()
    c.phases.warmup = {
        "steps": 100,
        "learning_rates": {"aspp": 1e-3, "prototypes": 1e-3},
        "schedule": "constant",
    }
    c.phases.joint = {"steps": 4000, "learning_rates": everything_but_head, "schedule": "poly"}
    c.phases.projection = {"steps": 1}
    c.phases.finetune = {"steps": 200, "learning_rates": {"head": 1e-3}, "schedule": "constant"}
    c.phases.pruning = {"steps": 1}
    c.phases.finetune_pruned = {
        "steps": 200,
        "learning_rates": {"head": 1e-3},
        "schedule": "constant",
    }

    c.log_every = 10
    c.eval_every = 500
    c.checkpoint_every = 250
    return c
