# SPDX-License-Identifier: Apache-2.0
"""Loading a causal language model with transformers, whole or as one rank's share of a tensor-parallel replica."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from specdist.core.errors import DataError
from specdist.target.description import TargetDescription
from specdist.target.weights import weight_files


def load_model(
    target: TargetDescription,
    dtype: torch.dtype,
    device: torch.device,
    group: ProcessGroup | None = None,
) -> PreTrainedModel:
    """The target in evaluation mode on `device`. With a `group` of several ranks, all of them call this.

    Raises DataError when weights that the model needs are missing: transformers would fill them with random numbers.
    """
    model_class = type(target.blank())  # the public way to the class that an auto class picks
    options: dict[str, Any] = {"config": target.config, "dtype": dtype, "local_files_only": True}
    if getattr(target.text_config, "attn_logit_softcapping", None) is not None:
        options["attn_implementation"] = "eager"  # up to 5.17 at least, sdpa drops the soft cap without a word
    files = weight_files(target.path)
    if len(files) > 1 and not list(target.path.glob("*.index.json")):
        # transformers reads several files only through an index; safetensors are mapped, not read, by load_file
        options["state_dict"] = {name: t for file in files for name, t in load_file(file).items()}
    if group is not None and group.size() > 1 and hasattr(DistributedConfig, "tp_size"):
        model_class = _sharded(model_class, group, device)
        options["distributed_config"] = DistributedConfig(tp_size=group.size())
    elif group is not None and group.size() > 1:  # transformers 5.12, which SGLang asks for, takes a mesh itself
        options |= {"tp_plan": "auto", "device_mesh": DeviceMesh.from_group(group, device.type)}
    else:
        options["device_map"] = device
    where = None if "state_dict" in options else target.path
    loaded: Any = model_class.from_pretrained(where, output_loading_info=True, **options)
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise DataError(
            f"{target.path}: the checkpoint lacks {len(missing)} of the model's weights: {', '.join(missing[:8])}"
        )
    return model.eval().requires_grad_(False)


class _SubgroupMesh:
    """In the place of transformers' mesh manager: whatever axes are asked for, the replica's is the answer."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh

    def get_mesh(self, dims: str | tuple[str, ...]) -> DeviceMesh:
        return self._mesh


def _sharded(base: type[PreTrainedModel], group: ProcessGroup, device: torch.device) -> type[PreTrainedModel]:
    """The model's class, loading itself onto the replica's ranks instead of onto the whole world.

    `from_pretrained` builds its mesh over the default process group and refuses one of another size. The hook in which
    it does so, `prepare_distribute_model`, is a class method; a subclass answers it with the mesh of the replica.
    """
    mesh = DeviceMesh.from_group(group, device.type)

    def prepare_distribute_model(cls: type, distributed_config: DistributedConfig, **options: Any) -> tuple[Any, ...]:
        # transformers up to 5.17 hands a mesh in and wants one back, later ones want an object that picks the mesh
        return distributed_config, device, mesh if "device_mesh" in options else _SubgroupMesh(mesh)

    # The name and module stay: transformers reads the module's source and finds defaults by the class's name.
    members = {"__module__": base.__module__, "prepare_distribute_model": classmethod(prepare_distribute_model)}
    return type(base.__name__, (base,), members)
