# SPDX-License-Identifier: Apache-2.0
"""AWQ and GPTQ checkpoints as the values that their codes stand for.

Both hold in the place of a matrix, as `torch.nn.Linear` has it [N, K], `qweight`, `qzeros` and `scales` [groups, N]: a
weight is (code - zero) * scale, with one zero and scale for a group of the K inputs. Codes are packed into int32.

- AWQ, gemm layout (AutoAWQ's `WQLinear_GEMM`): codes [K, N / 8] and zeros [groups, N / 8] along the outputs, eight in
  an int32 in the order of `AWQ_ORDER`, lowest bits first; groups are runs of inputs.
- GPTQ (AutoGPTQ's `QuantLinear`): codes [K * bits / 32, N] along the inputs, zeros [groups, N * bits / 32] along the
  outputs, lowest bits first; `g_idx` [K] has the group of each input. Zeros are stored less one, but not in `gptq_v2`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def dequantised(weights: dict[str, Tensor], said: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a checkpoint, with each matrix that is quantised as a `weight` [N, K] in `dtype`."""
    read = READERS[said["quant_method"]]
    plus = 0 if said.get("checkpoint_format") == "gptq_v2" else 1
    plain = dict(weights)
    for name in [n for n in weights if n.endswith(".qweight")]:
        module = name.removesuffix("qweight")
        parts = [plain.pop(module + part, None) for part in ("qweight", "qzeros", "scales", "g_idx")]
        plain[f"{module}weight"] = read(*parts, plus).to(dtype)
    return plain


def _awq(codes: Tensor, zeros: Tensor, scales: Tensor, _: None, __: int) -> Tensor:
    place = torch.tensor(AWQ_ORDER).argsort()  # where the code of each of eight outputs is
    values, zeros = (unpack(x, 4).unflatten(1, (-1, 8))[:, :, place].flatten(1) for x in (codes, zeros))
    return _scaled(values, zeros, scales)


def _gptq(codes: Tensor, zeros: Tensor, scales: Tensor, group: Tensor | None, plus: int) -> Tensor:
    bits = 32 * zeros.shape[1] // scales.shape[1]  # of this matrix: they may differ (GPTQModel's `dynamic`)
    values = unpack(codes.T, bits).T
    return _scaled(values, unpack(zeros, bits) + plus, scales, group)


def _scaled(codes: Tensor, zeros: Tensor, scales: Tensor, group: Tensor | None = None) -> Tensor:
    if group is None:
        group = torch.arange(len(codes)) // (len(codes) // len(scales))
    return ((codes - zeros[group]) * scales.float()[group]).T.contiguous()


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The numbers [R, C * 32 / bits] of which the rows of int32 `packed` [R, C] are made, lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (packed[:, :, None] >> shifts & 2**bits - 1).flatten(1)


READERS: dict[str, Callable[..., Tensor]] = {"awq": _awq, "gptq": _gptq}
"""By the `quant_method` of config.json."""
