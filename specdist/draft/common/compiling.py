# SPDX-License-Identifier: Apache-2.0
"""How functions of the training step are compiled: once for all micro-batches, whose lengths all differ.

A recompilation costs more than a graph for one length gains.
"""

import inspect
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.fx.experimental import _config as symbolic_shapes

F = TypeVar("F", bound=Callable[..., object])


@cache
def compiled(function: F, *rows: str) -> F:
    """`function`, compiled at its first call. It is called with positional arguments. `rows`: the arguments, tensors or
    lists of them, whose first dimension has another size in every call. All other sizes are taken to stay, which makes
    better kernels: a row's length is known. None: every size may change."""
    # The compiler takes sizes that are equal at first, rows and heads for instance, for equal in every call.
    symbolic_shapes.use_duck_shape = False
    graph = torch.compile(function, dynamic=None if rows else True)
    places = [list(inspect.signature(function).parameters).index(name) for name in rows]

    @wraps(function)
    def call(*arguments: Any) -> object:
        for place in places:
            given = arguments[place]
            for tensor in [given] if isinstance(given, Tensor) else given:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)  # noqa: SLF001 - documented, though it lies there
        return graph(*arguments)

    return cast(F, call) if rows else cast(F, graph)
