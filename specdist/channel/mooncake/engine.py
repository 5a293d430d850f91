# SPDX-License-Identifier: Apache-2.0
"""Mooncake's Transfer Engine as this project uses it: registered memory, writes, and an end to every wait.

What its wheels (0.3.13) do that one has to know: a write that was given up stays alive and may still read its source,
so a failed one ends the job and its buffer is never used again; a write has ended once the other end has acknowledged
it, over TCP too (tests/distributed/test_mooncake.py); an unknown batch number crashes the process, and a
finished one counts as running when asked again; a forked child hangs. It listens on all interfaces of the host and
does not authenticate its peers, like NCCL: use it inside a network that you trust.
"""

import ctypes
import functools
import logging
import os
import time
from collections.abc import Iterable

import msgspec
import torch
from torch import Tensor

from specdist.channel.config import MooncakeConfig
from specdist.core.errors import ConfigError, WorldError

_POLL_S = 0.0002
"""Seconds between two polls of a transfer. Mooncake's own blocking calls spin on a core instead."""
_GRACE_S = 30
"""A whole transfer is given up this many seconds later than one that stalls: never the other way round, see above."""
_WORDS = {-1: "the other end is gone, or refused it", -2: "it timed out"}


class Endpoint(msgspec.Struct, frozen=True):
    """What a target rank must know to write to a draft rank, as the address book has it (JSON).

    `ring` is the address of slot 0 and `slot_bytes` the distance from one slot to the next. `greeting` is the address
    of 8 bytes that are not read: a rank that can write there can write to the ring.
    """

    session: str
    protocol: str
    ring: int
    slot_bytes: int
    greeting: int


class TransferFailed(RuntimeError):
    """A write that failed; the message says why."""


class TransferEngine:
    """This process's end of all its transfers. When the object goes, so does every other rank's access to it.
    `address`: the IP address under which the other ranks reach this host. Raises ConfigError: Mooncake is not
    installed, or does not load. WorldError: it does not come up on this host."""

    def __init__(self, address: str, config: MooncakeConfig):
        self.protocol = config.chosen_protocol()
        settings = {
            "MC_LOG_LEVEL": "ERROR",
            "MC_TCP_SLICE_SIZE": str(2**20),
            "MC_TCP_PROGRESS_TIMEOUT_SEC": str(config.stall_s),
            "MC_TRANSFER_TIMEOUT": str(config.stall_s + _GRACE_S),
        }
        for name, value in settings.items():  # read when the library is loaded
            os.environ.setdefault(name, value)
        self._engine = _load()()
        status = self._engine.initialize(address, "P2PHANDSHAKE", self.protocol, ",".join(config.devices))
        if status != 0:
            raise WorldError(
                f"Mooncake's Transfer Engine does not start on {address} with channel.mooncake.protocol="
                f"{self.protocol} (status {status}); its own messages are in this rank's log"
            )
        self.session = f"{address}:{self._engine.get_rpc_port()}"
        """How other ranks address this one."""
        self._registered: list[Tensor] = []

    def register(self, memory: Tensor) -> None:
        """Let others write to `memory`, or this rank write from it. Contiguous, for as long as the process lives."""
        size = memory.numel() * memory.element_size()
        status = self._engine.register_memory(memory.data_ptr(), size)
        if status != 0:
            hint = (
                "is nvidia-peermem loaded, or can the kernel share the GPU's memory (dma-buf)? "
                "channel.mooncake.memory=host does without"
                if memory.is_cuda
                else "is the limit of locked memory (ulimit -l) unlimited?"
            )
            what = f"{size:,} bytes on {memory.device} for {self.protocol}"
            raise WorldError(f"Mooncake cannot register {what} (status {status}): {hint}")
        self._registered.append(memory)

    def forget(self, memory: Tensor) -> None:
        """Undo `register`: no more writes to `memory` or from it."""
        self._engine.unregister_memory(memory.data_ptr())
        self._registered = [kept for kept in self._registered if kept is not memory]

    def write(self, session: str, source: int, destination: int, size: int) -> int:
        """Start to write `size` bytes from the address `source` here to `destination` there; returns its number. Raises
        TransferFailed: the other end cannot be reached."""
        number = int(self._engine.transfer_submit_write(session, source, destination, size))
        if number == 0:
            raise TransferFailed(_WORDS[-1])
        return number

    def wait(self, writes: Iterable[int], timeout_s: float) -> None:
        """Wait until all `writes`, each waited for once, have ended. Raises TransferFailed: one failed, or has not
        ended after `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        for number in writes:
            while (status := self._engine.transfer_check_status(number)) == 0:
                if time.monotonic() > deadline:
                    raise TransferFailed(f"it did not end within {timeout_s:.0f} s")
                time.sleep(_POLL_S)
            if status < 0:
                raise TransferFailed(_WORDS.get(status, f"status {status}"))


@functools.cache
def process_engine(address: str, config: MooncakeConfig) -> TransferEngine:
    """The engine of this process. It lasts as long: a write that has failed may still use its memory."""
    return TransferEngine(address, config)


def check_installed() -> None:
    """Raises ConfigError where Mooncake cannot be used: before a GPU is asked for."""
    _load()


def _load():  # type: ignore[no-untyped-def]
    try:
        from mooncake.engine import TransferEngine as Engine
    except ImportError as error:
        raise ConfigError.at(
            "channel.transport",
            "=mooncake: Mooncake's Transfer Engine does not load here "
            f"({error}): pip install -e '.[mooncake]' (CUDA 12), mooncake-transfer-engine-cuda13, or "
            "mooncake-transfer-engine-non-cuda on machines without a GPU; on Debian and Ubuntu also apt-get install "
            "libibverbs1",
        ) from error
    return Engine


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
    """Whether a network card can write to the GPU, and a kernel that is launched after a write sees it."""
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
