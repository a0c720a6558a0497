"""DeepLabv2, prototypes and losses in PyTorch, written from the method, for comparisons."""

import numpy as np
import torch
from torch.nn import functional as F

from tests.models import weights


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def nhwc(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


def torch_aspp(x, params, rates):
    return sum(
        F.conv2d(x, params[f"c{i}.weight"], params[f"c{i}.bias"], 1, rate, rate)
        for i, rate in enumerate(rates)
    )


class TorchProtoSeg:
    """DeepLabv2-ResNet and prototypes in evaluation mode, over a state dict of the authors' code.

    Args:
      state_dict: NumPy arrays, as `weights.protoseg` makes them.
      stride_in: "3x3" (torchvision) or "1x1" (Caffe).
      rates: of the ASPP.
    """

    def __init__(self, state_dict, depth, stride_in, rates):
        self.tensors = {
            n.removeprefix("features.base."): torch.tensor(t) for n, t in state_dict.items()
        }
        self.depth, self.stride_in, self.rates = depth, stride_in, rates

    def conv(self, x, names, stride=1, dilation=1):
        conv, norm = names
        t = self.tensors
        weight = t[conv + ".weight"]
        x = F.conv2d(x, weight, None, stride, dilation * (weight.shape[-1] // 2), dilation)
        statistics = t[norm + ".running_mean"], t[norm + ".running_var"]
        return F.batch_norm(x, *statistics, t[norm + ".weight"], t[norm + ".bias"], False, 0, 1e-5)

    def backbone(self, x):
        x = F.relu(self.conv(x, weights.stem_names("deeplab"), 2))
        x = F.max_pool2d(x, 3, 2, 1, ceil_mode=True)
        for stage, blocks in enumerate(weights.STAGES[self.depth]):
            for block in range(blocks):
                reduce, conv3x3, increase, shortcut = weights.block_names("deeplab", stage, block)
                stride = 2 if (stage, block) == (1, 0) else 1
                first, second = (stride, 1) if self.stride_in == "1x1" else (1, stride)
                y = F.relu(self.conv(x, reduce, first))
                y = F.relu(self.conv(y, conv3x3, second, (1, 1, 2, 4)[stage]))
                y = self.conv(y, increase)
                x = F.relu(y + (self.conv(x, shortcut, stride) if block == 0 else x))
        return x

    def maps(self, x):
        """The D-channel maps before the sigmoid."""
        aspp = {n.removeprefix("aspp."): t for n, t in self.tensors.items() if "aspp." in n}
        return torch_aspp(self.backbone(x), aspp, self.rates)

    def classify(self, maps):
        """D-channel maps → (features, squared distances, logits), channels last."""
        points = torch.sigmoid(maps).permute(0, 2, 3, 1)
        p = self.tensors["prototype_vectors"][:, :, 0, 0]
        d2 = (points[..., None, :] - p).square().sum(-1)
        logits = torch.log((d2 + 1) / (d2 + 1e-4)) @ self.tensors["last_layer.weight"].T
        return points, d2, logits

    def __call__(self, x):
        """Images → (features, squared distances, logits)."""
        return self.classify(self.maps(x))


def total_loss(d2, logits, labels, prototype_classes, diversity):
    """Eq. 7, one image, class and pair after the other; means over what is present.

    Args:
      d2: squared distances [b h w m].
      logits: [b h w c].
      labels: [b h w], 255 is void.
      prototype_classes: [m].
      diversity: λ_J.
    """
    cross_entropy = F.cross_entropy(logits.permute(0, 3, 1, 2), labels, ignore_index=255)
    present = []
    for image in range(len(labels)):
        for c in np.unique(prototype_classes):
            points = d2[image][labels[image] == c]
            if len(points) < 2:
                continue
            v = [torch.log_softmax(points[:, j], 0) for j in np.flatnonzero(prototype_classes == c)]
            similar = []
            for i in range(len(v)):
                for j in range(i + 1, len(v)):
                    kl = (v[i].exp() * (v[i] - v[j])).sum() + (v[j].exp() * (v[j] - v[i])).sum()
                    similar.append(torch.exp(-0.5 * kl))
            present.append(torch.stack(similar).mean())
    return cross_entropy + diversity * torch.stack(present).mean()
