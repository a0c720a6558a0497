"""A ResNet of transformers' own, through the folder that it writes, against ours."""

import importlib

import jax
import numpy as np
import pytest

from protoseg_jax.models import resnet, weights
from tests.models import weights as made

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        importlib.util.find_spec("transformers") is None,
        reason="transformers is not installed (pip install transformers)",
    ),
]

cases = importlib.import_module("tests.models.parity_cases")  # which imports PyTorch
WIDTH = 8


def network(depth, in_bottleneck):
    """Its ResNet with our dilation and ceil-mode pooling."""
    cases.torchvision_models()  # which it imports
    transformers = importlib.import_module("transformers")
    basic = depth in resnet.BASIC
    config = transformers.ResNetConfig(
        embedding_size=WIDTH,
        hidden_sizes=[WIDTH * 2**n * (1 if basic else 4) for n in range(4)],
        depths=list(resnet.BLOCKS[depth]),
        layer_type="basic" if basic else "bottleneck",
        downsample_in_bottleneck=in_bottleneck,
        num_labels=3,
    )
    theirs = transformers.ResNetForImageClassification(config).eval()
    body = theirs.resnet
    body.embedder.pooler.ceil_mode = True
    for stage, dilation in ((body.encoder.stages[2], 2), (body.encoder.stages[3], 4)):
        for block in stage.layers:
            for conv in (part.convolution for part in block.layer):
                conv.stride = (1, 1)
                if conv.kernel_size == (3, 3):
                    conv.dilation = conv.padding = (dilation, dilation)
        stage.layers[0].shortcut.convolution.stride = (1, 1)
    tensors = made.backbone("transformers", depth, WIDTH, np.random.default_rng(0))
    tensors = {name: torch.tensor(tensor) for name, tensor in tensors.items()}
    body.load_state_dict({**body.state_dict(), **tensors})
    return theirs


@pytest.mark.parametrize(
    ("depth", "in_bottleneck", "shards"), [(18, False, 1), (50, False, 1), (50, True, 9)]
)
def test_its_maps(depth, in_bottleneck, shards, tmp_path):
    theirs = network(depth, in_bottleneck)
    size = 10**9 if shards == 1 else 200_000  # bytes of a file
    theirs.save_pretrained(tmp_path, max_shard_size=size)
    written = list(tmp_path.glob("*.safetensors"))
    assert len(written) == 1 if shards == 1 else len(written) > 1
    ported = weights.load(tmp_path, resnet)
    assert ported.origin == ("transformers_1x1" if in_bottleneck else "transformers")
    stride_in = resnet.ORIGINS[ported.origin].stride_in
    ours = resnet.ResNet(depth, width=WIDTH, stride_in=stride_in)
    variables = {"params": ported.params["backbone"], "frozen": ported.frozen["backbone"]}
    images = np.random.default_rng(1).normal(size=(1, 97, 80, 3)).astype(np.float32)
    got = np.asarray(jax.jit(ours.apply)(variables, images))
    with torch.no_grad():
        expected = cases.nhwc(theirs.resnet(cases.nchw(images)).last_hidden_state)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
