"""Table 4: U-Net with prototypes on the EM segmentation challenge (ISBI 2012).

python train.py --config=configs/isbi_em.py --config.data.dir=DIR

The paper's details are in a supplement that we do not have; this starts from a follow-up's recipe:
no warm-up, Adam at 1e-4 with polynomial decay, weight decay 5e-4, batch 2 of whole sections, 10⁴
joint and 10⁴ fine-tuning steps, 64 features, 20 prototypes. `:cpu` is a narrower net on sections at
half their size, for two CPU cores; its prototypes start on training patches.
"""

from ml_collections import ConfigDict, config_dict

ROWS = ("paper", "cpu")


def get_config(row: str = "paper") -> ConfigDict:
    if row not in ROWS:
        raise ValueError(f"row {row!r} is unknown; choose from {', '.join(ROWS)}")
    c = ConfigDict()
    c.seed = 0  # also draws which 20 sections train and which 10 validate
    c.batch_size = 2
    c.accumulate = 1
    c.compute_dtype = "float32"
    c.crop_size = (512, 512)
    c.eval_size = (512, 512)
    c.eval_batch_size = 2
    c.eval_overlap = config_dict.placeholder(int)  # larger sections: tiles that overlap so much

    c.data = ConfigDict()
    c.data.name = "isbi_em"
    c.data.dir = config_dict.placeholder(str)
    c.data.cache = "data_cache"
    c.data.workers = 0
    c.data.train_split = "train"
    c.data.projection_split = "train"
    c.augment = ConfigDict({"scale": (0.8, 1.2), "turns": True, "elastic": 10.0})

    c.model = ConfigDict()
    c.model.backbone = "unet"
    c.model.depth = 4
    c.model.width = 64
    c.model.output_stride = 1
    c.model.head = "prototypes"
    c.model.activation = "sigmoid"
    c.model.similarity = "log"
    c.model.features = 64
    c.model.prototypes_per_class = 10
    c.model.prototype_init = "uniform"
    c.model.preprocessing = "data"
    c.model.mean = ()  # of the training sections, measured when a run starts
    c.model.std = ()
    c.model.msc = ()
    c.model.remat = False

    c.pretrained = ConfigDict({"path": config_dict.placeholder(str)})

    c.loss = ConfigDict({"diversity": 0.25, "l1": 1e-4, "diversity_reduction": "present"})
    c.loss.class_balance = 0.0

    rates = {"backbone": 1e-4, "decoder": 1e-4, "prototypes": 1e-4, "head": 0.0}
    finetune = {"steps": 10_000, "learning_rates": {"head": 1e-5}, "schedule": "constant"}
    c.phases = ConfigDict()
    c.phases.warmup = {"steps": 0, "learning_rates": rates, "schedule": "constant"}
    c.phases.joint = {"steps": 10_000, "learning_rates": rates, "schedule": "poly"}
    c.phases.projection = {"steps": 1}
    c.phases.finetune = finetune
    c.phases.pruning = {"steps": 1}
    c.phases.finetune_pruned = finetune

    c.log_every = 10
    c.eval_every = 1000
    c.checkpoint_every = 500
    if row == "cpu":
        _cpu(c)
    return c


def _cpu(c: ConfigDict) -> None:
    c.batch_size = 4
    c.crop_size = (128, 128)
    c.eval_size = (256, 256)  # half of 512 × 512; scores are at the labels' own size
    c.augment.scale = (0.4, 0.6)
    c.augment.elastic = 2.7
    c.model.width = 16
    c.model.prototype_init = "patches"
    c.phases.joint.steps = 900
    c.phases.joint.learning_rates.update({"backbone": 2e-3, "decoder": 2e-3, "prototypes": 1e-2})
    for name in ("finetune", "finetune_pruned"):
        c.phases[name].steps = 100
        c.phases[name].learning_rates.head = 3e-2
        c.phases[name].schedule = "poly"
    c.eval_every = 0
