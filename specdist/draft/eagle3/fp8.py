# SPDX-License-Identifier: Apache-2.0
"""Products of the layer in FP8 (e4m3): every row of an input, and every row of a weight, has a scale of its own.

Weights are rounded once per micro-batch, in both orientations, for the forward and for the gradients of inputs. The
gradients of weights are not computed here: they take the unrounded values (torchao's recipe "rowwise_with_gw_hp").
"""

import torch
from torch import Tensor

from specdist.core.errors import ConfigError
from specdist.draft.common.precision import at_least_fp32
from specdist.draft.eagle3.ops import norm, swiglu, swiglu_backward

FORMAT = torch.float8_e4m3fn
LARGEST = torch.finfo(FORMAT).max
LEAST_SCALE = 1e-12
"""So that a row of zeros stays one."""

CAPABILITY = (8, 9)
"""Of the GPUs that have FP8 products: Ada, Hopper and later."""

Rounded = tuple[Tensor, Tensor]
"""Values [n, m] in e4m3 and the scales [n, 1] in fp32 they are to be multiplied with."""


def quantise(x: Tensor) -> Rounded:
    """Round x [n, m] row by row, such that its largest value is the largest of the format."""
    wide = at_least_fp32(x)
    scale = (wide.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=LEAST_SCALE)
    return (wide / scale).clamp(-LARGEST, LARGEST).to(FORMAT), scale.float()


def quantise_both_ways(weight: Tensor) -> tuple[Rounded, Rounded]:
    """`quantise` of a weight [outputs, inputs] and of its transpose. A function of its own, because each that is
    compiled has few graphs, and weights come in more layouts than activations."""
    return quantise(weight), quantise(weight.T.contiguous())


def rounded_norm(x: Tensor, weight: Tensor, eps: float) -> Rounded:
    """`quantise` of `norm`."""
    return quantise(norm(x, weight, eps))


def rounded_swiglu(gate: Tensor, up: Tensor) -> Rounded:
    """`quantise` of `swiglu`."""
    return quantise(swiglu(gate, up))


def rounded_swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Rounded, Rounded]:
    """`swiglu_backward`, in place; and `quantise` of the gradients of gate and of up."""
    swiglu_backward(grad, gate, up)
    return quantise(gate), quantise(up)


def product(a: Rounded, b: Rounded, dtype: torch.dtype) -> Tensor:
    """a @ b.T, [n, k] and [m, k] to [n, m]. On a CPU with the same rounded values in fp32."""
    (x, x_scale), (w, w_scale) = a, b
    if x.is_cuda:
        return torch._scaled_mm(  # noqa: SLF001 - what torch has for it, as torchao calls it
            x, w.t(), scale_a=x_scale, scale_b=w_scale.t(), out_dtype=dtype, use_fast_accum=True
        )
    return ((x.float() * x_scale) @ (w.float() * w_scale).T).to(dtype)


def check_device(device: torch.device) -> None:
    """Raises ConfigError where the GPU has no FP8 products."""
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        raise ConfigError.at(
            "draft.eagle3.products",
            f"=fp8 needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or more; "
            f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}: use draft.eagle3.products=compute",
        )
