"""Made-up state dicts, named as torchvision, transformers, the PyTorch DeepLabv2 port and the
authors do."""

import numpy as np

STAGES = {14: (1, 1, 1, 1), 26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
STAGES |= {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 152: (3, 8, 36, 3)}


def stem_names(naming):
    """(convolution, BatchNorm) of the stem."""
    if naming == "torchvision":
        return "conv1", "bn1"
    if naming == "transformers":
        return "embedder.embedder.convolution", "embedder.embedder.normalization"
    return "layer1.conv1.conv", "layer1.conv1.bn"


def block_names(naming, stage, block):
    """(convolution, BatchNorm) of a block's three convolutions and of its shortcut; from 0."""
    if naming == "torchvision":
        name = f"layer{stage + 1}.{block}."
        inner = [(f"{name}conv{i}", f"{name}bn{i}") for i in (1, 2, 3)]
        return [*inner, (name + "downsample.0", name + "downsample.1")]
    if naming == "transformers":
        name = f"encoder.stages.{stage}.layers.{block}."
        parts = ("layer.0", "layer.1", "layer.2", "shortcut")
        return [(f"{name}{part}.convolution", f"{name}{part}.normalization") for part in parts]
    name = f"layer{stage + 2}.block{block + 1}."
    parts = ("reduce", "conv3x3", "increase", "shortcut")
    return [(f"{name}{part}.conv", f"{name}{part}.bn") for part in parts]


def backbone(naming, depth, width, rng):
    """Tensors of a ResNet with statistics that are not trivial.

    Blocks add little to their shortcuts, or 33 of them would add up to values far from what
    trained networks have.
    """
    tensors = {}

    def add(names, out, into, k, gain=1.0):
        conv, norm = names
        tensors[f"{conv}.weight"] = rng.normal(0, np.sqrt(1 / (k * k * into)), (out, into, k, k))
        tensors[f"{norm}.weight"] = gain * rng.uniform(0.5, 1.5, out)
        tensors[f"{norm}.bias"] = gain * rng.normal(0, 0.3, out)
        tensors[f"{norm}.running_mean"] = rng.normal(0, 0.3, out)
        tensors[f"{norm}.running_var"] = rng.uniform(0.5, 2, out)
        tensors[f"{norm}.num_batches_tracked"] = np.array(7)

    add(stem_names(naming), width, 3, 7)
    channels = width
    for stage, blocks in enumerate(STAGES[depth]):
        inner = width * 2**stage
        for block in range(blocks):
            *convs, shortcut = block_names(naming, stage, block)
            if depth in (18, 34):
                add(convs[0], inner, channels, 3)
                add(convs[1], inner, inner, 3, gain=0.3)
                if block == 0 and stage:
                    add(shortcut, inner, channels, 1)
                channels = inner
                continue
            add(convs[0], inner, channels, 1)
            add(convs[1], inner, inner, 3)
            add(convs[2], 4 * inner, inner, 1, gain=0.3)
            if block == 0:
                add(shortcut, 4 * inner, channels, 1)
            channels = 4 * inner
    return {n: np.asarray(t, np.float32) for n, t in tensors.items()}


def protoseg(depth, width, rates, features, prototype_classes, num_classes, seed=0):
    """A state dict of the authors' ProtoSeg, with the given class of each prototype."""
    rng = np.random.default_rng(seed)
    tensors = backbone("deeplab", depth, width, rng)
    spread = 1 / np.sqrt(len(rates) * 9 * 32 * width)  # so that the sigmoid is not saturated
    for i in range(len(rates)):
        tensors[f"aspp.c{i}.weight"] = rng.normal(0, spread, (features, 32 * width, 3, 3))
        tensors[f"aspp.c{i}.bias"] = rng.normal(size=features)
    tensors = {f"features.base.{n}": t for n, t in tensors.items()}
    count = len(prototype_classes)
    tensors["prototype_vectors"] = rng.uniform(size=(count, features, 1, 1))
    tensors["ones"] = np.ones((count, features, 1, 1))
    last = np.where(np.arange(num_classes)[:, None] == prototype_classes, 1.0, -0.5)
    tensors["last_layer.weight"] = last + rng.normal(0, 0.05, last.shape)
    return {n: np.asarray(t, np.float32) for n, t in tensors.items()}
