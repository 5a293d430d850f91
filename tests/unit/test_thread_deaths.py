# SPDX-License-Identifier: Apache-2.0
"""Whoever depends on a thread hears of its death, and why, not of a wait that took too long."""

from __future__ import annotations

import queue
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from specdist.channel.base import store_book
from specdist.channel.mooncake.ends import Endpoint, MooncakeSender
from specdist.core.worker import telling_deaths
from specdist.run.target_loop import Producer
from tests.unit.test_channel_p2p import ROWS, make_item, wire
from tests.unit.test_mooncake_memory import PlayedEngine


def test_a_thread_of_ours_that_dies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    logged, told = list[str](), queue.SimpleQueue[BaseException]()
    monkeypatch.setattr(threading, "excepthook", lambda death: logged.append(str(death.exc_value)))
    usual = threading.excepthook

    def die() -> None:
        raise RuntimeError(threading.current_thread().name)

    with telling_deaths(told.put):
        for name in ("of another package", "specdist-own"):
            thread = threading.Thread(target=die, name=name)
            thread.start()
            thread.join()
    assert logged == ["of another package", "specdist-own"]
    assert str(told.get(timeout=5)) == "specdist-own"
    assert told.empty()
    assert threading.excepthook is usual


def test_what_ends_the_sending_over_mooncake_reaches_who_waits_for_it() -> None:
    class Broken(PlayedEngine):
        def write(self, *_: object) -> int:
            raise RuntimeError("the library has another interface")

    engine: Any = Broken()
    sender = MooncakeSender(replace(wire(0), address_book=store_book(dist.HashStore())), ROWS, print, engine)
    sender._endpoints[1] = Endpoint("there", "tcp", 0, 8, 0)  # noqa: SLF001
    sender.check()
    item = make_item(1)
    sender.send(item, sender.buffer(item), 0)
    with pytest.raises(RuntimeError, match="the library has another interface"):
        sender.flush(60.0)
    with pytest.raises(RuntimeError, match="the library has another interface"):
        sender.check()


def test_a_target_rank_that_waits_for_work_hears_that_its_sender_is_broken() -> None:
    def broken() -> None:
        raise RuntimeError("nothing is sent any more")

    over = threading.Event()
    client: Any = SimpleNamespace(poll=lambda timeout_s: over.wait(0.01) or [])
    sender: Any = SimpleNamespace(available=True, check=broken)
    engine: Any = SimpleNamespace(device=torch.device("cpu"))
    nothing: Any = None
    with pytest.raises(RuntimeError, match="nothing is sent any more"):
        Producer(engine, sender, nothing, client, nothing, nothing, 0, 5.0).run()
