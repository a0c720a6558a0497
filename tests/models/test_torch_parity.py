"""The whole network against a PyTorch counterpart, written here from the method."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from protoseg_jax import models
from protoseg_jax.models.deeplab import ASPP
from protoseg_jax.models.layers import convolve, max_pool
from protoseg_jax.models.resnet import BLOCKS

torch = pytest.importorskip("torch")
F = torch.nn.functional
pytestmark = pytest.mark.parity


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def nhwc(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


def oihw(kernel):
    return torch.from_numpy(np.ascontiguousarray(np.transpose(kernel, (3, 2, 0, 1))))


def assert_close(got, expected, relative=1e-4):
    """Worst error relative to the largest value."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= relative * np.abs(expected).max()


@pytest.mark.parametrize("size", [(1, 2), (5, 6), (7, 8), (33, 64), (161, 97)])
def test_max_pool(size):
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    expected = F.max_pool2d(nchw(x), 3, 2, 1, ceil_mode=True)
    np.testing.assert_array_equal(max_pool(x), nhwc(expected))


@pytest.mark.parametrize("size", [(33, 20), (32, 21)])
@pytest.mark.parametrize(
    ("k", "stride", "dilation"), [(7, 2, 1), (3, 1, 1), (3, 2, 1), (3, 1, 2), (3, 1, 4), (1, 2, 1)]
)
def test_convolution(size, k, stride, dilation):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, 8)).astype(np.float32)
    kernel = rng.normal(size=(k, k, 8, 6)).astype(np.float32)
    pad = dilation * (k - 1) // 2
    expected = F.conv2d(nchw(x), oihw(kernel), None, stride, pad, dilation)
    assert_close(convolve(jnp.array(x), jnp.array(kernel), stride, dilation), nhwc(expected), 1e-5)


def torch_aspp(x, params, rates):
    return sum(
        F.conv2d(x, params[f"c{i}.weight"], params[f"c{i}.bias"], 1, rate, rate)
        for i, rate in enumerate(rates)
    )


def test_aspp_and_its_gradients():
    rates = (6, 12, 18, 24)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 20, 33, 32)).astype(np.float32)
    upstream = rng.normal(size=(2, 20, 33, 8)).astype(np.float32)
    aspp = ASPP(8, rates)
    params = jax.tree.map(np.asarray, aspp.init(jax.random.key(0), x)["params"])
    params = {n: {**p, "bias": rng.normal(size=8).astype(np.float32)} for n, p in params.items()}
    got, vjp = jax.vjp(lambda p, x: aspp.apply({"params": p}, x), params, x)
    grads, grad_x = vjp(jnp.array(upstream))

    tensors = {f"{n}.weight": oihw(p["kernel"]).requires_grad_() for n, p in params.items()}
    biases = {f"{n}.bias": torch.tensor(p["bias"], requires_grad=True) for n, p in params.items()}
    inputs = nchw(x).requires_grad_()
    expected = torch_aspp(inputs, {**tensors, **biases}, rates)
    expected.backward(nchw(upstream))
    assert_close(got, nhwc(expected))
    assert_close(grad_x, nhwc(inputs.grad))
    for name in params:
        weight = np.transpose(tensors[f"{name}.weight"].grad.numpy(), (2, 3, 1, 0))
        assert_close(grads[name]["kernel"], weight)
        assert_close(grads[name]["bias"], biases[f"{name}.bias"].grad)


class TorchProtoSeg:
    """DeepLabv2-ResNet and prototypes in evaluation mode; tensors named as in torchvision."""

    def __init__(self, depth, width, stride_in, rates, num_features, num_prototypes, num_classes):
        self.depth, self.stride_in, self.rates = depth, stride_in, rates
        self.rng = np.random.default_rng(0)
        self.tensors = {}
        self.add_conv_and_norm("conv1", "bn1", 7, 3, width)
        channels = width
        for stage, blocks in enumerate(BLOCKS[depth]):
            inner = width * 2**stage
            for block in range(blocks):
                name = f"layer{stage + 1}.{block}."
                if block == 0:
                    names = (name + "downsample.0", name + "downsample.1")
                    self.add_conv_and_norm(*names, 1, channels, 4 * inner)
                self.add_conv_and_norm(name + "conv1", name + "bn1", 1, channels, inner)
                self.add_conv_and_norm(name + "conv2", name + "bn2", 3, inner, inner)
                self.add_conv_and_norm(name + "conv3", name + "bn3", 1, inner, 4 * inner)
                channels = 4 * inner
        for i in range(len(rates)):
            self.add(f"c{i}.weight", self.rng.normal(0, 0.05, (num_features, channels, 3, 3)))
            self.add(f"c{i}.bias", self.rng.normal(size=num_features))
        self.add("prototype_vectors", self.rng.uniform(size=(num_prototypes, num_features, 1, 1)))
        self.add("last_layer.weight", self.rng.normal(size=(num_classes, num_prototypes)))

    def add(self, name, values):
        self.tensors[name] = torch.tensor(np.asarray(values, np.float32))

    def add_conv_and_norm(self, conv, norm, k, i, o):
        rng = self.rng
        self.add(conv + ".weight", rng.normal(0, np.sqrt(1 / (k * k * i)), (o, i, k, k)))
        self.add(norm + ".weight", rng.uniform(0.5, 1.5, o))
        self.add(norm + ".bias", rng.normal(0, 0.3, o))
        self.add(norm + ".running_mean", rng.normal(0, 0.3, o))
        self.add(norm + ".running_var", rng.uniform(0.5, 2, o))

    def conv(self, x, conv, norm, stride=1, dilation=1):
        t = self.tensors
        weight = t[conv + ".weight"]
        x = F.conv2d(x, weight, None, stride, dilation * (weight.shape[-1] // 2), dilation)
        statistics = t[norm + ".running_mean"], t[norm + ".running_var"]
        return F.batch_norm(x, *statistics, t[norm + ".weight"], t[norm + ".bias"], False, 0, 1e-5)

    def __call__(self, x):
        """Images → (features, squared distances, logits)."""
        x = F.max_pool2d(F.relu(self.conv(x, "conv1", "bn1", 2)), 3, 2, 1, ceil_mode=True)
        for stage, blocks in enumerate(BLOCKS[self.depth]):
            for block in range(blocks):
                name = f"layer{stage + 1}.{block}."
                stride = 2 if (stage, block) == (1, 0) else 1
                first, second = (stride, 1) if self.stride_in == "1x1" else (1, stride)
                shortcut = x
                if block == 0:
                    names = (name + "downsample.0", name + "downsample.1")
                    shortcut = self.conv(x, *names, stride)
                x = F.relu(self.conv(x, name + "conv1", name + "bn1", first))
                dilation = (1, 1, 2, 4)[stage]
                x = F.relu(self.conv(x, name + "conv2", name + "bn2", second, dilation))
                x = F.relu(self.conv(x, name + "conv3", name + "bn3") + shortcut)
        z = torch.sigmoid(torch_aspp(x, self.tensors, self.rates))
        p = self.tensors["prototype_vectors"][:, :, 0, 0]
        points = z.permute(0, 2, 3, 1)
        d2 = (points[..., None, :] - p).square().sum(-1)
        logits = torch.log((d2 + 1) / (d2 + 1e-4)) @ self.tensors["last_layer.weight"].T
        return points, d2, logits

    def variables(self):
        """The same weights in our names, layouts and frozen affine maps."""
        params, frozen = {"aspp": {}, "backbone": {}}, {"backbone": {}}
        t = {name: tensor.numpy() for name, tensor in self.tensors.items()}

        def place(tree, path, leaf):
            for key in path[:-1]:
                tree = tree.setdefault(key, {})
            tree[path[-1]] = leaf

        for name in t:
            module, _, kind = name.rpartition(".")
            ours = module.replace("downsample.0", "downsample_conv")
            ours = ours.replace("downsample.1", "downsample_norm").replace("bn", "norm")
            path = ours.replace(".", "_", 1).split(".") if ours.startswith("layer") else [ours]
            if kind == "running_var":
                scale = t[module + ".weight"] / np.sqrt(t[name] + 1e-5)
                bias = t[module + ".bias"] - t[module + ".running_mean"] * scale
                place(frozen["backbone"], path, {"scale": scale, "bias": bias})
            elif module in [f"c{i}" for i in range(len(self.rates))]:
                leaf = t[name] if kind == "bias" else np.transpose(t[name], (2, 3, 1, 0))
                place(params["aspp"], [module, "bias" if kind == "bias" else "kernel"], leaf)
            elif t[name].ndim == 4 and module:
                kernel = np.transpose(t[name], (2, 3, 1, 0))
                place(params["backbone"], [*path, "kernel"], kernel)
        params["prototypes"] = {"vectors": t["prototype_vectors"][:, :, 0, 0]}
        params["head"] = {"kernel": t["last_layer.weight"].T}
        return {"params": params, "frozen": frozen}


@pytest.mark.parametrize("stride_in", ["3x3", "1x1"])
@pytest.mark.parametrize("size", [(97, 80), (64, 105)])
def test_whole_network(stride_in, size):
    config = ml_collections.ConfigDict(
        {
            "backbone": "resnet",
            "depth": 26,
            "width": 16,
            "norm": "frozen_batch",
            "stride_in": stride_in,
            "output_stride": 8,
            "aspp_rates": (2, 4, 6, 24),
            "head": "prototypes",
            "features": 16,
        }
    )
    counterpart = TorchProtoSeg(26, 16, stride_in, (2, 4, 6, 24), 16, 12, 4)
    model = models.build(config, num_classes=4, num_prototypes=12, dtype=jnp.float32)
    variables = counterpart.variables()
    images = np.random.default_rng(1).normal(size=(2, *size, 3)).astype(np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_equal(ours.shape, theirs.shape), shapes, variables
    )

    output = jax.jit(model.apply)(variables, images)
    features, distances, logits = counterpart(nchw(images))
    assert features.std() > 0.05, "the features hardly vary: the comparison says nothing"
    assert_close(output.features, features)
    assert_close(output.distances, distances)
    assert_close(output.logits, logits)
