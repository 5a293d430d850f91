# SPDX-License-Identifier: Apache-2.0
"""Where the memory lies that Mooncake reads and writes: on the GPU where the network card reaches it there, else on the
host."""

import ctypes
import logging

import torch

from specdist.channel.config import MooncakeConfig
from specdist.channel.mooncake.engine import TransferEngine
from specdist.core.errors import WorldError

log = logging.getLogger(__name__)

_RDMA_SUPPORTED, _WRITES_ORDERING = 116, 118
"""CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED and ..._WRITES_ORDERING of the CUDA driver API."""
_ORDERED_FOR_OWNER = 100
"""CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER: kernels of the GPU see what has arrived without a flush of their own."""
_PROBE_BYTES = 2 * 2**20


def device_of(engine: TransferEngine, config: MooncakeConfig, device: torch.device) -> torch.device:
    """The device on which rings are registered by a rank that computes on `device`: see `MooncakeConfig.memory`."""
    host = torch.device("cpu")
    if device.type != "cuda" or config.memory == "host":
        return host
    if config.memory == "device":
        return device
    # Over TCP the engine itself would copy through the host, and without a pipeline.
    if engine.protocol != "rdma" or not orders_remote_writes(device):
        return host
    probe = torch.empty(_PROBE_BYTES, dtype=torch.uint8, device=device)
    try:
        engine.register(probe)
    except WorldError as error:
        log.warning("features are staged in host memory (channel.mooncake.memory=auto): %s", error)
        return host
    engine.forget(probe)
    return device


def orders_remote_writes(device: torch.device) -> bool:
    """Whether the GPU can be written to by a network card, and a kernel that is launched once a write is known to have
    ended sees it."""
    driver = ctypes.CDLL("libcuda.so.1")
    index = torch.cuda.current_device() if device.index is None else device.index
    return bool(_attribute(driver, _RDMA_SUPPORTED, index)) and (
        _attribute(driver, _WRITES_ORDERING, index) >= _ORDERED_FOR_OWNER
    )


def _attribute(driver: ctypes.CDLL, attribute: int, index: int) -> int:
    """An attribute of GPU number `index` of this process."""
    number, value = ctypes.c_int(), ctypes.c_int()
    for status in (
        driver.cuDeviceGet(ctypes.pointer(number), index),
        driver.cuDeviceGetAttribute(ctypes.pointer(value), attribute, number),
    ):
        if status != 0:
            raise WorldError(f"the CUDA driver does not tell attribute {attribute} of GPU {index} (status {status})")
    return value.value
