"""What a GPU is given to compute, as far as that can be seen without one: the lowered train step.

XLA's GPU compiler turns the convolution of a weight gradient, whose kernel is a whole map, into
cuDNN's filter gradient where its window moves by one; where it moves by more, as a dilated
convolution's own gradient does, cuDNN is left with a kernel of that size. What comes of it is in
`benchmarks/gpu_program.py`.
"""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo

from benchmarks import gpu_program
from benchmarks.flops import for_gpu
from protoseg_jax import config as configs
from protoseg_jax import inference as inferences
from protoseg_jax import losses, models
from protoseg_jax.models.prototypes import equal_blocks
from protoseg_jax.run import phases
from protoseg_jax.training import step as steps

CLASSES, CROP = 3, (97, 97)
LARGE = 7  # no forward convolution has a larger kernel


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A kernel's spatial size, and how its window moves and spreads."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def left_as_it_is(self) -> bool:
        """Whether its kernel is a map and XLA cannot make it a filter gradient."""
        return max(self.kernel) > LARGE and max(self.stride) > 1


def convolutions(operation: ir.Operation) -> Iterator[Convolution]:
    """Those of a StableHLO module, of all its functions and of what is nested in them."""
    for region in operation.regions:
        for block in region:
            for inner in block:
                if inner.operation.name == "stablehlo.convolution":
                    yield _convolution(inner.operation)
                yield from convolutions(inner.operation)


def _convolution(operation: ir.Operation) -> Convolution:
    attributes = operation.attributes
    numbers = stablehlo.ConvDimensionNumbers(attributes["dimension_numbers"])
    shape = ir.RankedTensorType(operation.operands[1].type).shape
    kernel = tuple(shape[n] for n in numbers.kernel_spatial_dimensions)

    def each(name: str) -> tuple[int, ...]:
        return tuple(attributes[name]) if name in attributes else (1,) * len(kernel)

    return Convolution(kernel, each("window_strides"), each("rhs_dilation"))


def lowered_joint_step(dtype: str) -> ir.Module:
    """The joint step of a small DeepLab for CUDA devices, as StableHLO."""
    config = configs.default()
    config.compute_dtype, config.crop_size, config.eval_size = dtype, CROP, CROP
    config.model.update({"depth": 14, "width": 8, "aspp_rates": (2, 4), "features": 8})
    config.model.update({"stride_in": "3x3", "preprocessing": "imagenet"})
    inference = inferences.from_config(config, CLASSES, equal_blocks(2 * CLASSES, CLASSES))
    phase = next(p for p in phases.from_config(config) if p.name == "joint")
    rules = models.decay(config.model)
    step = steps.make_step(
        inference,
        phase,
        losses.terms(config.loss, inference.classes, CLASSES),
        rules,
        accumulate=1,
        feature_sizes=inference.feature_sizes(CROP),
    )

    def initial(key):
        variables = inference.model.init(key, np.zeros((1, *CROP, 3), np.float32))
        params = variables.pop("params")
        _, frozen = steps.split(params, phase)
        return steps.init_state(params, phase, rules), frozen, variables

    arguments = jax.eval_shape(initial, jax.random.key(0))
    batch = {
        "image": jax.ShapeDtypeStruct((2, *CROP, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((2, *CROP), np.uint8),
    }
    return for_gpu(step, *arguments, batch).compiler_ir("stablehlo")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_weight_gradient_is_left_a_convolution_with_a_map_for_a_kernel(dtype):
    found = list(convolutions(lowered_joint_step(dtype).operation))
    assert any(max(c.kernel) <= LARGE and max(c.dilation) > 1 for c in found)
    assert [c for c in found if c.left_as_it_is] == []


HLO = """HloModule jit_step, is_scheduled=true

%fused_slice (p: s32[], q: f32[4,100]) -> f32[1,100] {
  %q = f32[4,100]{1,0} parameter(1)
  %p = s32[] parameter(0)
  %zero = s32[] constant(0)
  ROOT %taken = f32[1,100]{1,0} dynamic-slice(%q, %p, %zero), dynamic_slice_sizes={1,100}
}

%body (state: (s32[], f32[4,100])) -> (s32[], f32[4,100]) {
  %state = (s32[], f32[4,100]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[4,100]{1,0} get-tuple-element(%state), index=1
  %row = f32[1,100]{1,0} fusion(%i, %x), kind=kLoop, calls=%fused_slice
  %sum = f32[1,100]{1,0} all-reduce-start(%row), to_apply=%add
  %done = f32[1,100]{1,0} all-reduce-done(%sum)
  ROOT %next = (s32[], f32[4,100]{1,0}) tuple(%i, %x)
}

ENTRY %main (a: (s32[], f32[4,100]), b: bf16[2,9,9,8], k: bf16[8,65,65,8]) -> bf16[2,9,9,8] {
  %a = (s32[], f32[4,100]{1,0}) parameter(0)
  %b = bf16[2,9,9,8]{3,2,1,0:T(8,128)} parameter(1)
  %k = bf16[8,65,65,8]{3,2,1,0} parameter(2)
  %loop = (s32[], /*index=1*/f32[4,100]{1,0}) while(%a), condition=%less, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %c = (bf16[2,9,9,8]{3,2,1,0}, u8[0]{0}) custom-call(%b, %k), window={size=65x65 stride=2x2 \
pad=2_2x2_2 rhs_dilate=4x4}, custom_call_target="__cudnn$convForward"
  %g = f32[8,8]{1,0} custom-call(%b, %b), custom_call_target="__cublas$gemm"
  ROOT %out = bf16[2,9,9,8]{3,2,1,0} get-tuple-element(%c), index=0
}
"""


def test_a_program_is_counted_from_its_text():
    hlo = gpu_program.Hlo(HLO)
    ((convolution, number),) = gpu_program.convolutions(hlo).items()
    assert (convolution.kind, number, convolution.large) == ("forward", 1, True)
    assert str(convolution) == "65x65, stride 2x2, dilation 4x4"
    assert gpu_program.matmuls(hlo) == (1, 0)
    assert gpu_program.collectives(hlo) == "1 all-reduce (0.0 MB)"
    row, b, k = 4 * 100, 2 * 2 * 9 * 9 * 8, 2 * 8 * 65 * 65 * 8
    # Each round takes a row by its number and writes it, then reads and writes it once more.
    loop = 3 * (4 + 2 * row + 2 * row)
    assert hlo.traffic(hlo.entry) == loop + (b + k + b) + (b + b + 4 * 8 * 8)
