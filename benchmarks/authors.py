"""The authors' form of network, loss and step in PyTorch, over the parameters of one of ours.

Convolutions of PyTorch's, BatchNorm in evaluation mode or GroupNorm, squared distances by the
expanded square, the diversity loss one image, class and pair after the other. What a `job` holds is
said in benchmarks/pytorch.py. Needs PyTorch; knows nothing of JAX.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from tests.models.torch_counterpart import total_loss
from tests.models.weights import STAGES


def tensor(name: str, array: np.ndarray) -> torch.Tensor:
    """One of our parameters as PyTorch lays it out."""
    if name.endswith("taps/kernel"):  # of the transposed convolution
        array = array.reshape(len(array), 2, 2, -1).transpose(0, 3, 1, 2)
    elif name.endswith("out/kernel") or "/lateral" in name and array.ndim == 2:
        array = array.T[:, :, None, None]
    elif name.endswith("vectors"):
        array = array[:, :, None, None]
    elif array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)
    return torch.tensor(np.ascontiguousarray(array))


class Network:
    """DeepLabv2-ResNet, U-Net or EfficientNet-Lite with prototypes, with or without MSC."""

    def __init__(self, job: dict, memory_format: torch.memory_format):
        self.model, self.rows = job["model"], job["rows"]
        self.tensors = {name: tensor(name, x) for name, x in job["parameters"].items()}
        for name, x in self.tensors.items():
            if x.dim() == 4:
                self.tensors[name] = x.contiguous(memory_format=memory_format)
        self.ones = torch.ones_like(self.tensors["prototypes/vectors"])
        self.mean, self.std = (torch.tensor(x).view(1, 3, 1, 1) for x in job["normal"])

    def conv(self, x, name, stride=1, dilation=1, bias=None):
        weight = self.tensors[f"{name}/kernel"]
        pad = dilation * (weight.shape[-1] // 2)
        return F.conv2d(x, weight, bias, stride, pad, dilation)

    def norm(self, x, name):
        scale, bias = (self.tensors[f"{name}/{part}"] for part in ("scale", "bias"))
        if self.model["backbone"] == "unet" or self.model["norm"] == "group":
            return F.group_norm(x, max(1, x.shape[1] // 16), scale, bias)
        mean, var = torch.zeros_like(scale), torch.full_like(scale, 1 - 1e-5)
        return F.batch_norm(x, mean, var, scale, bias, False, 0, 1e-5)

    def resnet(self, x):
        x = F.relu(self.norm(self.conv(x, "backbone/conv1", 2), "backbone/norm1"))
        x = F.max_pool2d(x, 3, 2, 1, ceil_mode=True)
        for stage, blocks in enumerate(STAGES[self.model["depth"]]):
            for block in range(blocks):
                name = f"backbone/layer{stage + 1}_{block}"
                stride = 2 if (stage, block) == (1, 0) else 1
                strides = (stride, 1) if self.model["stride_in"] == "1x1" else (1, stride)
                y = self.conv(x, f"{name}/conv1", strides[0])
                y = F.relu(self.norm(y, f"{name}/norm1"))
                y = self.conv(y, f"{name}/conv2", strides[1], (1, 1, 2, 4)[stage])
                y = F.relu(self.norm(y, f"{name}/norm2"))
                y = self.norm(self.conv(y, f"{name}/conv3"), f"{name}/norm3")
                if block == 0:
                    x = self.conv(x, f"{name}/downsample_conv", stride)
                    x = self.norm(x, f"{name}/downsample_norm")
                x = F.relu(y + x)
        return sum(
            self.conv(x, f"aspp/c{i}", dilation=rate, bias=self.tensors[f"aspp/c{i}/bias"])
            for i, rate in enumerate(self.model["aspp_rates"])
        )

    def double_conv(self, x, name):
        for n in (1, 2):
            x = F.relu(self.norm(self.conv(x, f"{name}/conv{n}"), f"{name}/norm{n}"))
        return x

    def unet(self, x):
        skips = []
        for level in range(self.model["depth"] + 1):
            if level:
                x = F.max_pool2d(x, 2, ceil_mode=True)
            x = self.double_conv(x, f"backbone/down{level}")
            skips.append(x)
        for level in reversed(range(self.model["depth"])):
            if 2**level < self.model["output_stride"]:
                break
            taps, skip = self.tensors[f"decoder/up_conv{level}/taps/kernel"], skips[level]
            x = F.conv_transpose2d(x, taps, stride=2)[:, :, : skip.shape[2], : skip.shape[3]]
            x = self.double_conv(torch.cat([skip, x], 1), f"decoder/up{level}")
        return self.conv(x, "decoder/out", bias=self.tensors["decoder/out/bias"])

    def same_conv(self, x, name, stride=1, dilation=1):
        """With TensorFlow's padding; depthwise where the kernel is."""
        weight, pads = self.tensors[f"{name}/kernel"], []
        for n in reversed(x.shape[2:]):
            reach = dilation * (weight.shape[-1] - 1) + 1
            zeros = max((-(-n // stride) - 1) * stride + reach - n, 0)
            pads += [zeros // 2, zeros - zeros // 2]
        groups = x.shape[1] // weight.shape[1]
        return F.conv2d(F.pad(x, pads), weight, None, stride, 0, dilation, groups)

    def efficientnet(self, x):
        def normed(x, name, *how):
            return self.norm(self.same_conv(x, f"{name}_conv", *how), f"{name}_norm")

        stride, dilation, number, maps = 2, 1, 0, []
        x = F.relu6(normed(x, "backbone/stem", 2))
        for stage, (blocks, _, row_stride, expansion, _) in enumerate(self.rows, start=1):
            for block in range(blocks):
                name, own = f"backbone/block{number}", row_stride if block == 0 else 1
                if stride * own > self.model["output_stride"]:
                    own = 1
                y = F.relu6(normed(x, f"{name}/expand")) if expansion > 1 else x
                y = F.relu6(normed(y, f"{name}/depthwise", own, dilation))
                y = normed(y, f"{name}/project")
                x = x + y if x.shape == y.shape else y
                if block == 0:
                    stride, dilation = stride * own, dilation * row_stride // own
                number += 1
            maps += [x] if stage in self.model["stages"] else []
        total = 0
        for n, x in enumerate(maps):
            lateral = f"decoder/lateral{n}"
            x = self.conv(x, lateral, bias=self.tensors[f"{lateral}/bias"])
            size = {"size": maps[0].shape[2:], "mode": "bilinear", "align_corners": False}
            total = total + (F.interpolate(x, **size) if n else x)
        return self.conv(F.relu(total), "decoder/smooth_conv", bias=self.tensors["decoder/bias"])

    def maps(self, x):
        """The decoder's maps of all that training learns from, the last one inference's."""
        network = getattr(self, self.model["backbone"])
        whole = network(x)
        if not self.model["msc"]:
            return [whole]
        how, copies = {"mode": "bilinear", "align_corners": False}, []
        for scale in self.model["msc"]:
            smaller = F.interpolate(x, scale_factor=scale, recompute_scale_factor=False, **how)
            copies.append(network(smaller))
        same = [whole, *(F.interpolate(m, size=whole.shape[2:], **how) for m in copies)]
        return [whole, *copies, torch.stack(same).amax(0)]

    def classify(self, maps):
        """Maps → (squared distances [b h w m], logits [b h w c])."""
        points, p = torch.sigmoid(maps), self.tensors["prototypes/vectors"]
        squares = F.conv2d(points**2, self.ones)
        own = (p**2).sum((1, 2, 3)).view(-1, 1, 1)
        d2 = F.relu(squares - 2 * F.conv2d(points, p) + own).permute(0, 2, 3, 1)
        similarities = torch.log((d2 + 1) / (d2 + 1e-4))
        flat = similarities.reshape(-1, similarities.shape[3])
        return d2, (flat @ self.tensors["head/kernel"]).reshape(*d2.shape[:3], -1)

    def prepare(self, images):
        """uint8 [b 3 h w] → the backbone's input."""
        return (images.float() - self.mean) / self.std


def make(job: dict, memory_format: str, threads: int) -> Callable[[], float]:
    """A call that takes one step, and returns its loss; or that passes forward, and returns the
    mean size of a logit."""
    torch.set_num_threads(threads)
    layout = getattr(torch, memory_format)
    network = Network(job, layout)
    images = torch.tensor(np.ascontiguousarray(job["image"].transpose(0, 3, 1, 2)))
    images = images.contiguous(memory_format=layout)

    @torch.no_grad()
    def forward() -> float:
        return network.classify(network.maps(network.prepare(images))[-1])[1].abs().mean().item()

    return _training(job, network, images) if "phase" in job else forward


def _training(job: dict, network: Network, images: torch.Tensor) -> Callable[[], float]:
    phase, groups = job["phase"], {}
    for name, x in network.tensors.items():
        if name in job["trained"]:
            groups.setdefault((name.partition("/")[0], name in job["decayed"]), []).append(x)
    optimizer = torch.optim.Adam(
        [
            {
                "params": [x.requires_grad_() for x in tensors],
                "lr": phase["learning_rates"][group],
                "weight_decay": job["weight_decay"] if decays else 0.0,
            }
            for (group, decays), tensors in groups.items()
        ],
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: (1 - t / phase["steps"]) ** 0.9
    )
    labels = [torch.tensor(x).long() for x in job["labels"]]

    def loss_of(maps: torch.Tensor, own: torch.Tensor) -> Any:
        d2, logits = network.classify(maps)
        if not job["diversity"]:
            return F.cross_entropy(logits.permute(0, 3, 1, 2), own, ignore_index=255)
        return total_loss(d2, logits, own, job["owners"], job["diversity"])

    def step() -> float:
        optimizer.zero_grad()
        maps = network.maps(network.prepare(images))
        loss = sum(map(loss_of, maps, labels)) / len(maps)
        loss.backward()
        optimizer.step()
        schedule.step()
        return loss.item()

    return step
