# SPDX-License-Identifier: Apache-2.0
"""The draft over its ranks: FSDP2."""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from specdist.draft.base import DraftModel
from specdist.world.groups import Groups


def shard_draft(model: DraftModel, groups: Groups, dtype: torch.dtype, sharding: str) -> DraftModel:
    """FSDP2 over the draft ranks: fp32 master weights, `dtype` compute, fp32 gradient reduction.

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
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    register_fsdp_forward_method(model, "replay")
    assert isinstance(model, FSDPModule)
    model.set_gradient_divide_factor(1.0)
    model.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    return model
