# SPDX-License-Identifier: Apache-2.0
"""The transports that there are. A new one is a value here, or a plugin that calls `register`."""

import torch

from specdist.channel.base import Transport
from specdist.channel.mooncake import MOONCAKE
from specdist.channel.p2p import GLOO, NCCL
from specdist.core.errors import ConfigError

_TRANSPORTS = {transport.name: transport for transport in (NCCL, GLOO, MOONCAKE)}


def register(transport: Transport) -> None:
    """Make a transport of a plugin known by its name, before a configuration that names it is loaded."""
    _TRANSPORTS[transport.name] = transport


def transport_for(name: str, device: torch.device | None = None) -> Transport:
    """What channel.transport=`name` means between ranks on such devices (None: not known yet). Raises ConfigError:
    there is no such transport, or it cannot serve these devices."""
    if name == "auto":
        return NCCL if device is not None and device.type == "cuda" else GLOO
    if name not in _TRANSPORTS:
        raise ConfigError.at("channel.transport", f"={name}: it is one of auto, {', '.join(sorted(_TRANSPORTS))}")
    transport = _TRANSPORTS[name]
    if transport.needs_gpus and device is not None and device.type != "cuda":
        raise ConfigError.at(
            "channel.transport", f"={name} moves features between GPUs, and none is used: auto finds what fits"
        )
    return transport
