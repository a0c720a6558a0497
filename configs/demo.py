"""A ProtoSeg in minutes on a laptop: the embedded `parts` data set, trained from scratch."""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0
    c.batch_size = 8
    c.accumulate = 1
    c.compute_dtype = "float32"
    c.crop_size = (128, 128)
    c.eval_size = (128, 128)
    c.eval_batch_size = 16

    c.data = ConfigDict()
    c.data.name = "parts"
    c.data.dir = config_dict.placeholder(str)
    c.data.cache = "data_cache"
    c.data.workers = 0
    c.data.held_out = config_dict.placeholder(str)  # a class to be void, for the novelty test
    c.data.train_split = "train"
    c.data.projection_split = "train"
    c.augment = ConfigDict({"scale": (0.8, 1.2)})

    c.model = ConfigDict()
    c.model.backbone = "resnet"
    c.model.depth = 14
    c.model.width = 16
    c.model.norm = "group"
    c.model.stride_in = "3x3"
    c.model.output_stride = 8
    c.model.aspp_rates = (1, 2, 3)
    c.model.head = "prototypes"
    c.model.features = 32
    c.model.prototypes_per_class = 8
    c.model.preprocessing = "imagenet"
    c.model.msc = ()  # (0.5, 0.75): multi-scale inputs
    c.model.remat = False  # True: less memory, about a third more work

    c.pretrained = ConfigDict({"path": config_dict.placeholder(str)})

    c.loss = ConfigDict({"diversity": 0.25, "l1": 1e-4, "diversity_reduction": "present"})

    # A high rate on the ASPP would saturate the sigmoid before the features have learnt anything.
    new = {"aspp": 3e-4, "prototypes": 2e-3}
    c.phases = ConfigDict()
    c.phases.warmup = {"steps": 30, "learning_rates": new, "schedule": "constant"}
    c.phases.joint = {
        "steps": 1650,
        "learning_rates": {"backbone": 2e-3, **new},
        "schedule": "poly",
    }
    c.phases.projection = {"steps": 1}
    c.phases.finetune = {"steps": 60, "learning_rates": {"head": 1e-3}, "schedule": "constant"}
    c.phases.pruning = {"steps": 1}
    c.phases.finetune_pruned = {
        "steps": 60,
        "learning_rates": {"head": 1e-3},
        "schedule": "constant",
    }

    c.log_every = 10
    c.eval_every = 500
    c.checkpoint_every = 500
    return c
