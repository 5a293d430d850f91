# SPDX-License-Identifier: Apache-2.0
"""Loading a causal language model with transformers, whole or as one rank's share of a tensor-parallel replica."""

import copy
import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from transformers import PretrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from specdist.core.errors import DataError
from specdist.core.model_config import quantisation_keys, text_part
from specdist.target import int4
from specdist.target.description import BESIDE_TEXT, TargetDescription
from specdist.target.weights import read_tensors, weight_files


def load_model(
    target: TargetDescription,
    dtype: torch.dtype,
    device: torch.device,
    group: ProcessGroup | None = None,
    layers: range | None = None,
) -> PreTrainedModel:
    """The target in evaluation mode on `device`. With a `group` of several ranks, all of them call this.

    Args:
        layers: those that are loaded, all if None. The others have no forward, and what is beside
            the text is random.

    Raises DataError when weights that the model needs are missing: transformers would fill them with random numbers.
    """
    logging.disable_progress_bar()  # one a rank, among the lines of a log and over the bars of our own
    model_class = type(target.blank())  # the public way to the class that an auto class picks
    options: dict[str, Any] = {"config": _dequantising(target.config), "dtype": dtype, "local_files_only": True}
    if getattr(target.text_config, "attn_logit_softcapping", None) is not None:
        options["attn_implementation"] = "eager"  # up to 5.17 at least, sdpa drops the soft cap without a word
    said, files = quantisation_keys(target.config), weight_files(target.path)
    packed = said.get("quant_method") in int4.READERS
    if layers is not None:
        options["state_dict"] = _weights_of(target, layers)
        model_class = _shortened(model_class, target.layers, layers)
    elif packed or (len(files) > 1 and not list(target.path.glob("*.index.json"))):
        # transformers reads several files only through an index
        options["state_dict"] = _read(target, list(target.tensors))
    if packed:
        options["state_dict"] = int4.dequantised(options["state_dict"], said, dtype)
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
    missing = sorted(report["missing_keys"])
    if layers is not None:
        missing = [name for name in missing if not BESIDE_TEXT.search(name)]
    if missing:
        raise DataError(
            f"{target.path}: the checkpoint lacks {len(missing)} of the model's weights: {', '.join(missing[:8])}"
        )
    for parameter in model.parameters():  # beside quantised ones, transformers leaves them as they are stored
        if parameter.dtype in {torch.float16, torch.bfloat16} - {dtype}:
            parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


def _dequantising(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration, by which quantised weights are loaded as the values that they stand for."""
    config = copy.deepcopy(config)
    for part in (config, text_part(config)):
        if isinstance(said := getattr(part, "quantization_config", None), dict):
            if said["quant_method"] in int4.READERS:  # whose weights are read here
                del part.quantization_config
                continue
            key, value = "dequantize", True
            if said["quant_method"] == "compressed-tensors":
                from transformers.utils.quantization_config import CompressedTensorsConfig

                if key not in inspect.signature(CompressedTensorsConfig).parameters:  # transformers 5.12
                    key, value = "run_compressed", False
            part.quantization_config = {**said, key: value}
    return config


def find_decoder(model: PreTrainedModel, count: int) -> tuple[PreTrainedModel, nn.ModuleList]:
    """The model without its head, and its `count` layers: the first list of so many modules, from the outside in."""
    decoder = model.get_decoder()
    lists = [(name, m) for name, m in decoder.named_modules() if isinstance(m, nn.ModuleList)]
    for name, modules in sorted(lists, key=lambda found: found[0].count(".")):
        if len(modules) == count:
            # What `get_decoder` hands out may have the head still (Llama 4's language model alone).
            held = decoder.get_submodule(name.rpartition(".")[0])
            return held if isinstance(held, PreTrainedModel) else decoder, modules
    found = ", ".join(f"{name} ({len(m)})" for name, m in lists) or "none"
    raise DataError.at("target.path", f": {type(decoder).__name__} has no list of {count} layers; it has: {found}")


def _weights_of(target: TargetDescription, layers: range) -> dict[str, Tensor]:
    """The checkpoint's tensors but for those of other layers and of what is beside the text."""
    model = target.blank()
    found = find_decoder(model, target.layers)[1]
    name = next(name for name, module in model.named_modules() if module is found).rpartition(".")[2]
    numbered = re.compile(rf"(^|\.){name}\.(\d+)\.")
    wanted = [n for n in target.tensors if not BESIDE_TEXT.search(n)]
    return _read(target, [n for n in wanted if (m := numbered.search(n)) is None or int(m[2]) in layers])


def _read(target: TargetDescription, names: list[str]) -> dict[str, Tensor]:
    """These tensors of the checkpoint, mapped, not read."""
    weights: dict[str, Tensor] = {}
    for file in {target.tensors[n].file for n in names}:
        weights |= read_tensors(file, (n for n in names if target.tensors[n].file == file))
    return weights


class _Absent(nn.Module):
    """In the place of a layer that is not loaded. What a decoder reads of a layer besides is the layer's own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer,)  # and no part of the model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"][0], name)


def _shortened(base: type[PreTrainedModel], count: int, kept: range) -> type[PreTrainedModel]:
    """The model's class, with those of its layers that are `kept`."""

    def __init__(self: PreTrainedModel, *arguments: Any, **options: Any) -> None:
        base.__init__(self, *arguments, **options)
        layers = find_decoder(self, count)[1]
        for index in set(range(count)) - set(kept):
            layers[index] = _Absent(layers[index])

    return type(base.__name__, (base,), {"__module__": base.__module__, "__init__": __init__})


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
