# SPDX-License-Identifier: Apache-2.0
"""What a sender hears, over real connections, when the process whose memory it writes to stops or dies."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

import pytest
import torch.distributed as dist

from specdist.channel.mooncake.ends import MooncakeSender
from specdist.channel.mooncake.engine import TransferEngine
from specdist.core.errors import WorldError
from tests.distributed.mooncake_peer import CONFIG, HOST, PATIENCE_S, ROWS, STALL_S, TARGET, check, make_item, wire_of
from tests.distributed.worlds import mooncake_loads, start_command

pytestmark = pytest.mark.skipif(not mooncake_loads(), reason="needs mooncake-transfer-engine, and libibverbs1")


@pytest.fixture
def store():
    return dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def peer(store):
    """The number of the process; a signal to the one that is started here may not reach it: it is a fork."""
    process = start_command([sys.executable, "-m", "tests.distributed.mooncake_peer", str(store.port)])
    number = int(store.get("pid"))
    yield number
    with contextlib.suppress(ProcessLookupError):
        os.kill(number, signal.SIGKILL)
    process.kill()
    process.communicate()


@pytest.fixture
def sender(store):
    def announce(item: int) -> None:
        store.set("announced", str(item))

    return MooncakeSender(wire_of(TARGET, store), ROWS, announce, TransferEngine(HOST, CONFIG))


def send(sender: MooncakeSender, index: int, rows: int = ROWS) -> None:
    item = make_item(index, rows)
    sender.send(item, sender.buffer(item), slot=0)


@pytest.mark.parametrize(
    ("number", "why"), [(signal.SIGKILL, "the other end is gone"), (signal.SIGSTOP, "")], ids=["killed", "stopped"]
)
def test_a_peer_that_is_no_more_is_named_soon(sender, peer, store, number, why):
    """What is announced has arrived: a single row, which any socket buffer takes, is not announced either."""
    sender.connect(PATIENCE_S, check)
    send(sender, 0)
    sender.flush(PATIENCE_S)
    os.kill(peer, number)
    time.sleep(0.2)
    began = time.monotonic()
    send(sender, 1, rows=1)
    with pytest.raises(
        WorldError, match=r"rank 1 \(draft dp 0 cp 0, host b\) did not take what rank 0 .*: batch 1: " + why
    ):
        sender.flush(PATIENCE_S)
    assert time.monotonic() - began < 5 * STALL_S
    assert store.get("announced") == b"0"
    send(sender, 2)
    with pytest.raises(WorldError, match="batch 1"):  # and so it stays: what has failed may still be read
        sender.flush(PATIENCE_S)


def test_a_peer_that_never_comes_is_named(sender):
    with pytest.raises(
        WorldError, match=r"rank 1 \(draft dp 0 cp 0, host b\) did not say within 1 s where its receive buffer is"
    ):
        sender.connect(1.0, check)
