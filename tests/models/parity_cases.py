"""What is compared with PyTorch: the same weights and inputs through both, by case.

A comparison of arrays is a list of (what, ours, theirs). Needs PyTorch.
"""

import dataclasses
import sys
import types

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import torch
from sklearn import datasets
from torch.nn import functional as F

from protoseg_jax import config as configs
from protoseg_jax import losses, models
from protoseg_jax.devices import DevicePool
from protoseg_jax.inference import Inference, shrink_labels
from protoseg_jax.models import efficientnet, resnet
from protoseg_jax.models import weights as ported_weights
from protoseg_jax.models.preprocessing import Preprocessing
from protoseg_jax.run.phases import Phase
from protoseg_jax.training import step as steps
from tests.models import weights
from tests.models.torch_counterpart import TorchProtoSeg, nchw, nhwc, total_loss

try:
    from efficientnet_lite_pytorch import EfficientNet as lite
except ImportError:  # its test is skipped
    lite = None

C, K, D = 4, 3, 16
CLASSES = np.arange(C).repeat(K)


def network(depth, width, stride_in, rates, msc=()):
    """(our model, its variables, the counterpart) over the same weights."""
    state_dict = weights.protoseg(depth, width, rates, D, CLASSES, C)
    ported = resnet.port(state_dict, "made")
    assert (ported.origin, ported.depth) == ("protoseg", depth)
    np.testing.assert_array_equal(ported.prototype_classes, CLASSES)
    config = configs.default().model
    config.update(depth=depth, width=width, stride_in=stride_in, features=D, msc=msc)
    config.aspp_rates = rates
    model = models.build(config, num_classes=C, num_prototypes=len(CLASSES), dtype=jnp.float32)
    variables = {"params": ported.params, "frozen": ported.frozen}
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 65, 65, 3), np.float32))
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), shapes, variables)
    return model, variables, TorchProtoSeg(state_dict, depth, stride_in, rates)


def pairs(output, expected):
    """An output's arrays beside the counterpart's, whose features must vary and not saturate."""
    features, distances, logits = expected
    assert features.std() > 0.05, "the features hardly vary: the comparison says nothing"
    saturated = ((features < 0.01) | (features > 0.99)).float().mean()
    assert saturated < 0.1, "the sigmoid hides what is before it: the comparison says nothing"
    return [
        ("features", output.features, features),
        ("distances", output.distances, distances),
        ("logits", output.logits, logits),
    ]


def whole_network(stride_in, depth, width, rates, size):
    """DeepLabv2, prototypes and last layer."""
    model, variables, counterpart = network(depth, width, stride_in, rates)
    batch = 2 if depth == 26 else 1
    images = np.random.default_rng(1).normal(size=(batch, *size, 3)).astype(np.float32)
    output = jax.jit(model.apply)(variables, images)
    with torch.no_grad():
        return pairs(output, counterpart(nchw(images)))


def multi_scale(size):
    """MSC: every scale's own output, and that of the maximum of the maps before the sigmoid."""
    depth, width = (101, 64) if size == (321, 321) else (26, 16)
    rates, scales = (2, 4, 6, 24), (0.5, 0.75)
    model, variables, counterpart = network(depth, width, "1x1", rates, scales)
    images = np.random.default_rng(1).normal(size=(1, *size, 3)).astype(np.float32)
    with torch.no_grad():
        x = nchw(images)
        maps = [counterpart.maps(x)]
        for scale in scales:
            options = {"mode": "bilinear", "align_corners": False}
            smaller = F.interpolate(
                x, scale_factor=scale, recompute_scale_factor=False, antialias=False, **options
            )
            maps.append(counterpart.maps(smaller))
        same = [F.interpolate(m, size=maps[0].shape[2:], **options) for m in maps]
        maps.append(torch.stack(same).amax(0))
        won = [(maps[-1] == m).float().mean().item() for m in same]
        expected = [counterpart.classify(m) for m in maps]
    assert min(won) > 0.05, "a scale hardly ever wins: the comparison says nothing"
    outputs = jax.jit(lambda v, x: model.apply(v, x, method="outputs"))(variables, images)
    found = [p for pair in zip(outputs, expected, strict=True) for p in pairs(*pair)]
    fused = jax.jit(model.apply)(variables, images)
    return [*found, ("inference's logits", fused.logits, expected[-1][-1])]


def torchvision_resnet(size, folder, depth=101):
    """A ResNet of torchvision with our dilation and ceil-mode pooling, through a .pth file."""
    theirs = getattr(torchvision_models(), f"resnet{depth}")(weights=None).eval()
    theirs.maxpool.ceil_mode = True
    for stage, dilation in ((theirs.layer3, 2), (theirs.layer4, 4)):
        for block in stage:
            for conv in [block.conv2] + [block.conv1] * (depth in resnet.BASIC):
                conv.dilation = conv.padding = (dilation, dilation)
                conv.stride = (1, 1)
        stage[0].downsample[0].stride = (1, 1)
    made = weights.backbone("torchvision", depth, 64, np.random.default_rng(0))
    made = {name: torch.tensor(tensor) for name, tensor in made.items()}
    theirs.load_state_dict({**theirs.state_dict(), **made})
    torch.save(theirs.state_dict(), folder / f"resnet{depth}.pth")
    ported = ported_weights.load(folder / f"resnet{depth}.pth", resnet)
    assert (ported.origin, ported.depth) == ("torchvision", depth)
    images = np.random.default_rng(1).normal(size=(1, *size, 3)).astype(np.float32)
    ours = resnet.ResNet(depth, stride_in=resnet.ORIGINS["torchvision"].stride_in)
    variables = {"params": ported.params["backbone"], "frozen": ported.frozen["backbone"]}
    got = jax.jit(ours.apply)(variables, images)
    with torch.no_grad():
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(nchw(images)))))
        expected = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(x))))
    return [("backbone", got, nhwc(expected))]


def photograph(size):
    """A real image [1 h w 3] of bytes, which scikit-learn brings."""
    image = datasets.load_sample_image("flower.jpg")
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)[None]


def efficientnet_lite(variant, size):
    """The package's own network with its ImageNet weights, on a real image: (our maps after every
    row beside its, our five likeliest classes and its by way of its own last layers)."""
    name = f"efficientnet-lite{variant}"
    path = efficientnet.PACKAGES[name].find()
    # By default its padding is that of 224² or so, whatever the image.
    theirs = lite.from_pretrained(name, weights_path=str(path), image_size=None).eval()
    table = efficientnet.rows(variant)
    ported = ported_weights.load(name, efficientnet)
    assert (ported.origin, ported.depth) == ("efficientnet_lite", variant)
    images = efficientnet.PREPROCESSING[ported.origin].normalise(jnp.array(photograph(size)))
    ours = efficientnet.Encoder(variant, stages=tuple(range(1, len(table) + 1)))
    variables = {"params": ported.params["backbone"], "frozen": ported.frozen["backbone"]}
    maps, expected = jax.jit(ours.apply)(variables, images), []
    ends = np.cumsum([row.blocks for row in table]) - 1
    with torch.no_grad():
        x = theirs._swish(theirs._bn0(theirs._conv_stem(nchw(images))))
        for number, block in enumerate(theirs._blocks):
            x = block(x)
            if number in ends:
                expected.append(nhwc(x))
        classes = []
        for last in (nchw(maps[-1]), x):
            pooled = theirs._swish(theirs._bn1(theirs._conv_head(last))).mean((2, 3))
            classes.append(theirs._fc(pooled)[0].topk(5).indices.tolist())
    pairs = [(f"row {n}", *p) for n, p in enumerate(zip(maps, expected, strict=True), start=1)]
    return pairs, classes


def torchvision_models():
    """torchvision's models, which want no operators: those may not load beside a CPU PyTorch."""
    try:
        import torchvision
    except RuntimeError:
        for name in [n for n in sys.modules if n.startswith("torchvision")]:
            del sys.modules[name]
        sys.modules["torchvision._meta_registrations"] = types.ModuleType("none")
        import torchvision
    return torchvision.models


RATES = {"backbone": 2.5e-5, "aspp": 2.5e-4, "prototypes": 2.5e-4}
PIXELS = Preprocessing(mean=(120.0, 120.0, 120.0), std=(60.0, 60.0, 60.0))


@dataclasses.dataclass
class Joint:
    """The joint phase in both frameworks; each pair is (ours, theirs).

    Attributes:
      losses: of each step.
      gradients: of eq. 7 at the first step, a pair for each trained tensor of a group.
      moved: how far each trained tensor is from its start after the last step.
    """

    losses: list
    gradients: dict
    moved: dict


def batches(count):
    rng = np.random.default_rng(3)
    for _ in range(count):
        labels = rng.integers(0, C, (2, 5, 5)).repeat(13, 1).repeat(13, 2)
        labels[0, :20] = 255
        images = rng.integers(0, 256, (2, 65, 65, 3)).astype(np.uint8)
        yield {"image": images, "label": labels.astype(np.uint8)}


def group_of(name):
    """The parameter group of one of the counterpart's tensors; None: not trained."""
    if name.startswith("aspp."):
        return "aspp"
    if name == "prototype_vectors":
        return "prototypes"
    return "backbone" if name.endswith("conv.weight") else None


def joint_phase(count=10):
    """Steps with coupled L2, poly schedule and per-group rates, against torch.optim.Adam."""
    model, variables, counterpart = network(26, 16, "1x1", (2, 4, 6, 12))
    phase = Phase("joint", "train", 30, RATES, "poly")
    groups = {n: group_of(n) for n in counterpart.tensors}
    trained = {n: counterpart.tensors[n].requires_grad_() for n, g in groups.items() if g}
    optimizer = torch.optim.Adam(
        [
            {
                "params": [t for n, t in trained.items() if groups[n] == group],
                "lr": rate,
                "weight_decay": 0.0 if group == "prototypes" else 5e-4,
            }
            for group, rate in RATES.items()
        ],
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (1 - t / 30) ** 0.9)

    pool = DevicePool(jax.local_devices()[:1])
    size = (9, 9)
    inference = Inference(model, PIXELS, (65, 65), tuple(CLASSES.tolist()), C)
    config = configs.default()
    terms, rules = losses.terms(config.loss, CLASSES, C), models.decay(config.model)
    step = pool.map(
        steps.make_step(inference, phase, terms, rules, accumulate=1, feature_sizes=[size])
    )
    start = variables["params"]
    _, frozen = steps.split(start, phase)
    state = pool.replicate(steps.init_state(start, phase, rules))
    frozen, constants = pool.replicate((frozen, {"frozen": variables["frozen"]}))
    result = Joint([], {}, {})
    for number, batch in enumerate(batches(count)):
        labels = shrink_labels(jnp.array(batch["label"]), None, size)
        _, d2, logits = counterpart(nchw(PIXELS.normalise(jnp.array(batch["image"]))))
        expected = total_loss(d2, logits, torch.tensor(np.array(labels)).long(), CLASSES, 0.25)
        if number == 0:
            grads = our_gradients(inference, terms[:2], variables, batch, labels)
            found = torch.autograd.grad(expected, list(trained.values()), retain_graph=True)
            theirs = as_ours(counterpart, dict(zip(trained, found, strict=True)))
            result.gradients = {g: leaf_pairs(grads[g], theirs[g]) for g in RATES}
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        schedule.step()
        state, metrics = step(state, frozen, constants, pool.shard(batch))
        result.losses.append((float(metrics["loss"][0]), expected.item()))
    learnt, theirs = pool.first(state).trainable, as_ours(counterpart, {})
    for group in RATES:
        ours, others = (jax.tree.map(np.subtract, p[group], start[group]) for p in (learnt, theirs))
        result.moved[group] = leaf_pairs(ours, others)
    return result


def as_ours(counterpart, changed):
    """The counterpart's tensors, or `changed` ones in their place, in our names and layouts."""
    tensors = {**counterpart.tensors, **changed}
    return resnet.port({n: t.detach().numpy() for n, t in tensors.items()}, "made").params


def leaf_pairs(ours, theirs):
    return list(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))


def our_gradients(inference, terms, variables, batch, labels):
    """Of eq. 7, by parameter."""
    counts = {term.name: term.count(labels) for term in terms}

    def loss(params):
        output = inference({**variables, "params": params}, jnp.array(batch["image"]))
        return losses.objective(terms, losses.means(terms, [output], [labels], [counts]))

    return jax.jit(jax.grad(loss))(variables["params"])
