# SPDX-License-Identifier: Apache-2.0
"""Where Mooncake's rings lie, with an engine and a driver that are played; and a ring that is the GPU's own.
tests/distributed/test_channel_contract.py moves rows, on GPUs too."""

from __future__ import annotations

import ctypes
import logging
from dataclasses import replace
from typing import Any, Literal

import msgspec
import pytest
import torch
import torch.distributed as dist

from specdist.channel.base import Wire, store_book
from specdist.channel.config import MooncakeConfig
from specdist.channel.mooncake import engine as memory
from specdist.channel.mooncake.ends import MooncakeReceiver
from specdist.channel.mooncake.engine import Endpoint
from specdist.core.errors import WorldError
from tests.unit.test_channel_p2p import ROWS, make_item, wire

GPU, HOST = torch.device("cuda", 1), torch.device("cpu")


class PlayedEngine:
    def __init__(self, protocol: Literal["rdma", "tcp"] = "rdma", refuses: bool = False):
        self.protocol, self.session, self._refuses = protocol, "here:1", refuses
        self.registered: list[torch.Tensor] = []

    def register(self, tensor: torch.Tensor) -> None:
        if self._refuses:
            raise WorldError("Mooncake cannot register")
        self.registered.append(tensor)

    def forget(self, tensor: torch.Tensor) -> None:
        self.registered.remove(tensor)


class PlayedDriver:
    """Of GPU 1 of the process, which is number 7 to the driver."""

    def __init__(self, attributes: dict[int, int], status: int = 0):
        self._attributes, self._status = attributes, status

    def cuDeviceGet(self, number: Any, index: int) -> int:
        number.contents.value = index + 6
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, number: ctypes.c_int) -> int:
        assert number.value == 7
        value.contents.value = self._attributes.get(attribute, 0)
        return self._status


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU is played by the host's memory, and orders remote writes."""
    monkeypatch.setattr(memory, "orders_remote_writes", lambda device: True)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **how: empty(*size, **(how | {"device": "cpu"})))


def device_of(engine: PlayedEngine, config: MooncakeConfig, device: torch.device = GPU) -> torch.device:
    found: Any = engine
    return memory.device_of(found, config, device)


@pytest.mark.usefixtures("orders")
def test_auto_takes_the_gpu_over_rdma_alone() -> None:
    engine = PlayedEngine()
    assert device_of(engine, MooncakeConfig()) == GPU
    assert engine.registered == []  # the probe is gone
    assert device_of(PlayedEngine("tcp"), MooncakeConfig()) == HOST
    assert device_of(PlayedEngine(), MooncakeConfig(), HOST) == HOST


@pytest.mark.usefixtures("orders")
def test_auto_says_why_it_stages(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert device_of(PlayedEngine(refuses=True), MooncakeConfig()) == HOST
    assert "staged in host memory (channel.mooncake.memory=auto): Mooncake cannot register" in caplog.text


@pytest.mark.usefixtures("orders")
def test_what_is_asked_for_is_taken() -> None:
    assert device_of(PlayedEngine("tcp"), MooncakeConfig(memory="device")) == GPU
    assert device_of(PlayedEngine(), MooncakeConfig(memory="host")) == HOST
    assert device_of(PlayedEngine(), MooncakeConfig(memory="device"), HOST) == HOST


@pytest.mark.parametrize(
    ("attributes", "ordered"),
    [({116: 1, 118: 100}, True), ({116: 1, 118: 200}, True), ({116: 1, 118: 0}, False), ({118: 100}, False)],
)
def test_the_driver_says_whether_remote_writes_are_ordered(
    monkeypatch: pytest.MonkeyPatch, attributes: dict[int, int], ordered: bool
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: PlayedDriver(attributes))
    assert memory.orders_remote_writes(GPU) == ordered


def test_a_driver_that_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: PlayedDriver({}, status=1))
    with pytest.raises(WorldError, match=r"does not tell attribute 116 of GPU 1 \(status 1\)"):
        memory.orders_remote_writes(GPU)


def test_a_slot_of_the_gpus_own_ring_is_free_once_its_reads_have_run(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class PlayedEvent:
        def record(self) -> None:
            said.append("record")

        def synchronize(self) -> None:
            said.append("synchronize")

    monkeypatch.setattr(Wire, "on_gpu", True)
    monkeypatch.setattr(torch.cuda, "Event", PlayedEvent)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    engine: Any = PlayedEngine()
    book = store_book(dist.HashStore())
    receiver = MooncakeReceiver(replace(wire(1), address_book=book), 2, ROWS, engine)
    ring, _ = engine.registered
    assert msgspec.json.decode(book.find(1, "rank 1", 1.0, lambda: None), type=Endpoint).ring == ring.data_ptr()
    item = make_item(3)
    receiver.post(item, 0, 1)
    rows = receiver.take(item, timeout_s=5)
    assert rows.data_ptr() == ring[1].data_ptr()  # no copy
    assert said == []
    freed = dist.HashStore()
    receiver.release(item, lambda: (said.append("freed"), freed.set("freed", "")))
    freed.wait(["freed"])
    assert said == ["record", "synchronize", "freed"]
