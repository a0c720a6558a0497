"""The whole network against a PyTorch counterpart, written here from the method."""

import sys
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import weights

from protoseg_jax import losses, models
from protoseg_jax.data.preprocessing import Preprocessing
from protoseg_jax.devices import DevicePool
from protoseg_jax.inference import Inference, shrink_labels
from protoseg_jax.models import port_torch
from protoseg_jax.models.deeplab import ASPP
from protoseg_jax.models.layers import convolve, max_pool
from protoseg_jax.training import phases
from protoseg_jax.training import step as steps

torch = pytest.importorskip("torch")
F = torch.nn.functional
pytestmark = pytest.mark.parity

from torch_counterpart import TorchProtoSeg, nchw, nhwc, torch_aspp, total_loss  # noqa: E402


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


C, K, D = 4, 3, 16
CLASSES = np.arange(C).repeat(K)


def network(depth, width, stride_in, rates, msc=()):
    """(our model, its variables, the counterpart) over the same weights."""
    state_dict = weights.protoseg(depth, width, rates, D, CLASSES, C)
    ported = port_torch.port(state_dict, "made")
    assert (ported.origin, ported.depth) == ("protoseg", depth)
    np.testing.assert_array_equal(ported.prototype_classes, CLASSES)
    config = ml_collections.ConfigDict(
        {
            "backbone": "resnet",
            "depth": depth,
            "width": width,
            "norm": "frozen_batch",
            "stride_in": stride_in,
            "output_stride": 8,
            "aspp_rates": rates,
            "head": "prototypes",
            "features": D,
            "msc": msc,
        }
    )
    model = models.build(config, num_classes=C, num_prototypes=len(CLASSES), dtype=jnp.float32)
    variables = {"params": ported.params, "frozen": ported.frozen}
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 65, 65, 3), np.float32))
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), shapes, variables)
    return model, variables, TorchProtoSeg(state_dict, depth, stride_in, rates)


@pytest.mark.parametrize("stride_in", ["3x3", "1x1"])
@pytest.mark.parametrize(
    ("depth", "width", "rates", "size"),
    [
        (26, 16, (2, 4, 6, 24), (97, 80)),
        (26, 16, (2, 4, 6, 24), (64, 105)),
        (101, 64, (6, 12, 18, 24), (321, 321)),
        (101, 64, (6, 12, 18, 24), (200, 512)),
        pytest.param(101, 64, (6, 12, 18, 24), (513, 513), marks=pytest.mark.slow),
        pytest.param(101, 64, (6, 12, 18, 24), (1024, 2048), marks=pytest.mark.slow),
    ],
    ids=lambda x: "x".join(map(str, x)) if isinstance(x, tuple) else str(x),
)
def test_whole_network(stride_in, depth, width, rates, size):
    if size == (1024, 2048) and stride_in == "3x3":
        pytest.skip("the full size is compared once, in the Caffe style")
    model, variables, counterpart = network(depth, width, stride_in, rates)
    batch = 2 if depth == 26 else 1
    images = np.random.default_rng(1).normal(size=(batch, *size, 3)).astype(np.float32)
    output = jax.jit(model.apply)(variables, images)
    with torch.no_grad():
        features, distances, logits = counterpart(nchw(images))
    assert features.std() > 0.05, "the features hardly vary: the comparison says nothing"
    assert_close(output.features, features)
    assert_close(output.distances, distances)
    assert_close(output.logits, logits)


@pytest.mark.parametrize("size", [(97, 80), (64, 105), (321, 321)], ids=str)
def test_multi_scale_maps(size):
    """MSC: every scale's own output, and the maximum of the maps before the sigmoid."""
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
    for output, (features, distances, logits) in zip(outputs, expected, strict=True):
        assert_close(output.features, features)
        assert_close(output.distances, distances)
        assert_close(output.logits, logits)
    fused = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(fused.logits, outputs[-1].logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(321, 321), (128, 224)], ids=str)
def test_torchvision_s_own_resnet(size, tmp_path):
    """Its architecture, our dilation and ceil-mode pooling, its state dict through a .pth file."""
    theirs = torchvision_models().resnet101(weights=None).eval()
    theirs.maxpool.ceil_mode = True
    for stage, dilation in ((theirs.layer3, 2), (theirs.layer4, 4)):
        for block in stage:
            block.conv2.dilation = block.conv2.padding = (dilation, dilation)
            block.conv2.stride = (1, 1)
        stage[0].downsample[0].stride = (1, 1)
    made = weights.backbone("torchvision", 101, 64, np.random.default_rng(0))
    made = {name: torch.tensor(tensor) for name, tensor in made.items()}
    theirs.load_state_dict({**theirs.state_dict(), **made})
    torch.save(theirs.state_dict(), tmp_path / "resnet101.pth")
    ported = port_torch.load(tmp_path / "resnet101.pth")
    assert (ported.origin, ported.depth) == ("torchvision", 101)
    images = np.random.default_rng(1).normal(size=(1, *size, 3)).astype(np.float32)
    ours = models.resnet.ResNet(101, stride_in=port_torch.ORIGINS["torchvision"].stride_in)
    variables = {"params": ported.params["backbone"], "frozen": ported.frozen["backbone"]}
    got = jax.jit(ours.apply)(variables, images)
    with torch.no_grad():
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(nchw(images)))))
        expected = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(x))))
    assert_close(got, nhwc(expected))


def torchvision_models():
    """torchvision's models, which want no operators: those may not load beside a CPU PyTorch."""
    try:
        import torchvision
    except RuntimeError:
        for name in [n for n in sys.modules if n.startswith("torchvision")]:
            del sys.modules[name]
        sys.modules["torchvision._meta_registrations"] = types.ModuleType("none")
        import torchvision
    except ImportError:
        pytest.skip("torchvision is not installed (pip install --no-deps torchvision)")
    return torchvision.models


RATES = {"backbone": 2.5e-5, "aspp": 2.5e-4, "prototypes": 2.5e-4}
PIXELS = Preprocessing(mean=(120.0, 120.0, 120.0), std=(60.0, 60.0, 60.0))


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
    return "backbone" if name.endswith(("conv.weight",)) else None


def test_gradients_and_ten_steps_of_the_joint_phase():
    """Coupled L2, poly schedule, per-group rates, against torch.optim.Adam."""
    model, variables, counterpart = network(26, 16, "1x1", (2, 4, 6, 12))
    phase = phases.Phase("joint", "train", 30, RATES, "poly")
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
    inference = Inference(model, PIXELS, (65, 65))
    step = pool.map(
        steps.make_step(
            inference,
            phase,
            prototype_classes=CLASSES,
            num_classes=C,
            loss_config=ml_collections.ConfigDict(
                {"diversity": 0.25, "l1": 1e-4, "diversity_reduction": "present"}
            ),
            accumulate=1,
            feature_sizes=[size],
        )
    )
    _, frozen = steps.split(variables["params"], phase)
    state = pool.replicate(steps.init_state(variables["params"], phase))
    frozen, constants = pool.replicate((frozen, {"frozen": variables["frozen"]}))
    for number, batch in enumerate(batches(10)):
        labels = shrink_labels(jnp.array(batch["label"]), None, size)
        _, d2, logits = counterpart(nchw(PIXELS.normalise(jnp.array(batch["image"]))))
        expected = total_loss(d2, logits, torch.tensor(np.array(labels)).long(), CLASSES, 0.25)
        if number == 0:
            check_gradients(inference, variables, batch, labels, expected, counterpart.tensors)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        schedule.step()
        state, metrics = step(state, frozen, constants, pool.shard(batch))
        assert float(metrics["loss"][0]) == pytest.approx(expected.item(), rel=1e-3)
    theirs = port_torch.port({n: t.detach().numpy() for n, t in counterpart.tensors.items()}, "")
    learnt = pool.first(state).trainable
    for group in RATES:
        for a, b, start in zip(
            *map(
                jax.tree.leaves, (learnt[group], theirs.params[group], variables["params"][group])
            ),
            strict=True,
        ):
            moved = np.linalg.norm(b - start)
            assert moved > 0
            assert np.linalg.norm(a - b) <= 0.02 * moved


def check_gradients(inference, variables, batch, labels, expected, tensors):
    """Of eq. 7, for every trained tensor, to 1e-3; ported like weights."""

    def loss(params):
        output = inference({**variables, "params": params}, jnp.array(batch["image"]))
        present = losses.diversity_present(labels, CLASSES, C).sum()
        diversity = losses.diversity(output.distances, labels, CLASSES, C).sum() / present
        points = losses.valid_points(labels, C)
        return losses.cross_entropy_sum(output.logits, labels) / points + 0.25 * diversity

    value, grads = jax.jit(jax.value_and_grad(loss))(variables["params"])
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    trained = [n for n in tensors if group_of(n)]
    found = torch.autograd.grad(expected, [tensors[n] for n in trained], retain_graph=True)
    state_dict = {n: t.detach().numpy() for n, t in tensors.items()}
    state_dict |= {n: g.numpy() for n, g in zip(trained, found, strict=True)}
    theirs = port_torch.port(state_dict, "gradients").params
    for group in RATES:
        pairs = zip(jax.tree.leaves(grads[group]), jax.tree.leaves(theirs[group]), strict=True)
        for a, b in pairs:
            assert 0 < np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(b)
