# SPDX-License-Identifier: Apache-2.0
"""Which network interface of this host leads to another one, and where this job can be reached."""

import contextlib
import ipaddress

import psutil

from specdist.core.launch_env import address_towards


def interface_towards(host: str, port: int) -> str | None:
    """The interface on the route to `host`; None where that is this host itself, or no interface has the address.

    On a host with several networks NCCL and gloo would guess, and each host of a job might guess another one.
    """
    own = ipaddress.ip_address(address_towards(host, port).partition("%")[0])
    if own.is_loopback:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == str(own) for address in addresses):
            return str(name)
    return None


def listening_addresses() -> tuple[str, ...]:
    """ADDRESS:PORT of every TCP port on which this process, or the launcher that started it, listens."""
    found = set()
    for process in (psutil.Process(), psutil.Process().parent()):
        with contextlib.suppress(psutil.Error):  # the launcher is another user's, or gone
            for connection in process.net_connections("tcp") if process is not None else ():
                if connection.status == psutil.CONN_LISTEN:
                    found.add(f"{connection.laddr.ip}:{connection.laddr.port}")
    return tuple(sorted(found))
