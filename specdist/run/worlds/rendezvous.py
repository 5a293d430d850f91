# SPDX-License-Identifier: Apache-2.0
"""How a target world finds the draft world: a file in the run directory, or an address and a secret given to both."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from specdist.core.errors import ConfigError
from specdist.core.files import sync_directory
from specdist.core.launch_env import reachable_address, shared_token
from specdist.scheduler.wire import TOKEN_BYTES, new_token


@dataclass(frozen=True)
class Door:
    """The control plane of a draft world: its address, and the secret that opens it."""

    address: str
    token: bytes


class Rendezvous:
    """Where the door of a run is told.

    Args:
        scheduler: `world.scheduler`; empty: the file is used.
    """

    def __init__(self, run_dir: Path, scheduler: str):
        self._file, self._scheduler = run_dir / "scheduler.json", scheduler

    def __str__(self) -> str:
        return self._scheduler or str(self._file)

    def place(self) -> tuple[str, int, bytes]:
        """For the draft world: the interface and port to bind to (0: a free one), and the secret.

        Raises:
            ConfigError: world.scheduler names no host, or there is no common secret.
        """
        if not self._scheduler:
            return reachable_address(), 0, new_token()
        host, _, port = self._scheduler.rpartition(":")
        try:
            found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise ConfigError.at("world.scheduler", f": host '{host}' is not known here: {error}") from error
        return str(found[0][4][0]), int(port), shared_token(TOKEN_BYTES)

    def publish(self, door: Door) -> None:
        """Tell where the door is; only this user may read the secret."""
        if self._scheduler:
            return
        temporary = self._file.with_name(f"{self._file.name}.tmp")
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump({"address": door.address, "token": door.token.hex()}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self._file)
        sync_directory(self._file.parent)

    def withdraw(self) -> None:
        """The draft world ends."""
        if not self._scheduler:
            self._file.unlink(missing_ok=True)

    def look(self) -> Door | None:
        """For a target world: the door that was told last, if any. Nobody need be behind it."""
        if self._scheduler:
            return Door(f"tcp://{self._scheduler}", shared_token(TOKEN_BYTES))
        try:
            told = json.loads(self._file.read_text())
        except FileNotFoundError:
            return None
        return Door(told["address"], bytes.fromhex(told["token"]))
