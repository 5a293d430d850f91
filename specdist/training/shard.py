# SPDX-License-Identifier: Apache-2.0
"""The draft over its ranks: FSDP2, and when its communication runs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from specdist.draft.base import DraftModel
from specdist.world.groups import Groups

_LEAST, _MOST = 1 / 32, 1 / 2
"""Shares of the weights from which a part is gathered and reduced on its own, and from which its own parts are."""
_FEWEST = 1 << 20
"""Weights below which it is not: starting a collective takes longer than they do, and many of them cost the host."""


def shard_draft(model: DraftModel, groups: Groups, dtype: torch.dtype, sharding: str) -> DraftModel:
    """FSDP2 over the draft ranks: fp32 master weights, `dtype` compute, fp32 gradient reduction; each large part of the
    draft is a unit. `ShardedWeights` gathers and reduces them: its forward and `replay` take gathered weights.

    The losses of all ranks add up to the step's loss, so gradients are summed, not averaged. "replicate" is FSDP2's
    hybrid form: weights are sharded over the context-parallel ranks alone, often one, and gradients all-reduced over
    the data-parallel ones.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    assert groups.draft is not None
    assert groups.draft_mesh is not None
    mesh = groups.draft_mesh
    if sharding != "replicate":
        mesh = DeviceMesh.from_group(groups.draft, mesh.device_type, mesh_dim_names=("draft",))
    for unit in (*_parts(model, sum(p.numel() for p in model.parameters())), model):
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
        if unit is not model:  # its weights serve calls of the algorithm's own, which these hooks know nothing of
            state = fully_shard.state(unit)  # type: ignore[attr-defined]
            state._pre_forward_hook_handle.remove()  # noqa: SLF001
            state._post_forward_hook_handle.remove()  # noqa: SLF001
    model.ready = _arrive
    return model


def _arrive(*parts: nn.Module) -> None:
    for part in parts:
        if isinstance(part, FSDPModule):
            part.unshard()


def _parts(model: nn.Module, whole: int) -> Iterator[nn.Module]:
    """What it is made of, in its order, as far as that has enough of `whole` weights."""
    for part in model.children():
        own = sum(p.numel() for p in part.parameters())
        share = own / whole
        if isinstance(part, nn.ModuleList | nn.ModuleDict) or (share >= _MOST and any(part.children())):
            yield from _parts(part, whole)
        elif share >= _LEAST and own >= _FEWEST:
            yield part


class ShardedWeights:
    """When the weights of a draft are gathered, and their gradients reduced.

    All are gathered once a step, ahead of the first micro-batch (those of `DraftModel.late` may come while its forward
    runs), and stay until the backward of the last one. In it the gradients of a unit are reduced as soon as they are
    complete, beside the rest of the backward: the units in one order on all ranks, from the last to the first, whatever
    order a rank's own graph has. A CUDA graph (`draft.cuda_graphs`) hands over all at its end.
    """

    def __init__(self, model: DraftModel) -> None:
        self._model = model
        self.units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        """The whole draft, with the weights of no part, and the parts in their order."""
        self._owners: dict[Tensor, FSDPModule] = {}
        """The unit of each weight that is trained, once a backward has come."""
        self._missing: dict[FSDPModule, set[Tensor]] = {}
        """Its weights whose gradient the last backward has not computed yet."""
        self._to_reduce: list[FSDPModule] = []
        """Units that it has not reduced yet, in their order."""

    def owners(self) -> dict[Tensor, FSDPModule]:
        """The unit of each weight: of its shard, or while it is gathered of the whole."""
        return {weight: unit for unit in self.units for weight in unit.parameters()}  # the inner one of two

    def gather(self) -> None:
        """Begin; nothing waits for it. All draft ranks call this at one place in the order of their collectives."""
        for unit in self.units:
            unit.unshard(async_op=True)

    def wait(self) -> None:
        """Until this stream may use them, except late ones; begins what was not begun."""
        _arrive(*(unit for unit in self.units if unit not in self._model.late))

    def free(self) -> None:
        """Let go of them, also of those that are still on their way."""
        _arrive(*self.units)
        for unit in self.units:
            unit.reshard()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """All are there inside it."""
        try:
            _arrive(*self.units)
            yield
        finally:
            self.free()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Of a micro-batch, the step's last one or not. Weights that `loss` does not depend on have a gradient of
        zeros: on other ranks it may depend on them, and all have to reduce the same."""
        if not self._owners:
            self._owners = {weight: unit for weight, unit in self.owners().items() if weight.requires_grad}
            for weight in self._owners:
                weight.register_post_accumulate_grad_hook(self._computed)
        whole, *parts = self.units
        whole.set_requires_gradient_sync(last)  # of the parts as well
        whole.set_reshard_after_backward(last)
        whole.set_is_last_backward(last)
        order, owners = (*reversed(parts), whole), self._owners.items()
        self._missing = {unit: {weight for weight, owner in owners if owner is unit} for unit in order}
        self._to_reduce = [unit for unit, weights in self._missing.items() if last and weights]
        engine = Variable._execution_engine  # noqa: SLF001
        loss.register_hook(lambda _: engine.queue_callback(self._complete))  # before FSDP's own
        loss.backward()

    def _complete(self) -> None:
        """The backward is over: give gradients to the weights that it has not come to."""
        for weight in set[Tensor]().union(*self._missing.values()):
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            self._computed(weight)

    def _computed(self, weight: Tensor) -> None:
        """Its gradient is complete. Autograd says so again, with none, of what was handed over before the end."""
        self._missing[self._owners[weight]].discard(weight)
        while self._to_reduce and not self._missing[self._to_reduce[0]]:
            state = fully_shard.state(self._to_reduce.pop(0))  # type: ignore[attr-defined]
            state._fsdp_param_group.post_backward()  # noqa: SLF001  # as torch's pipelines do
