# SPDX-License-Identifier: Apache-2.0
"""Which network interface of this host leads to another one."""

from __future__ import annotations

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
