# SPDX-License-Identifier: Apache-2.0
"""How a target world finds the draft world: a file in the run directory, or an address and a secret given to both."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import msgspec

from specdist.core.errors import ConfigError
from specdist.core.files import sync_directory
from specdist.core.launch_env import reachable_address, run_token


@dataclass(frozen=True)
class ControlAddress:
    """The control plane of a draft world: its address, and the secret that admits a rank to it."""

    address: str
    token: bytes


class Rendezvous:
    """Where the control plane of a run is published. `scheduler`: `world.scheduler`; empty: the file is used."""

    def __init__(self, run_dir: Path, scheduler: str):
        self._file, self._scheduler = run_dir / "scheduler.json", scheduler

    def __str__(self) -> str:
        return self._scheduler or str(self._file)

    def place(self) -> tuple[str, int]:
        """For the draft world: the interface and port to bind to (0: a free one). Raises ConfigError: no such host."""
        if not self._scheduler:
            return reachable_address(), 0
        host, _, port = self._scheduler.rpartition(":")
        try:
            found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise ConfigError.at("world.scheduler", f": host '{host}' is not known here: {error}") from error
        return str(found[0][4][0]), int(port)

    def publish(self, control: ControlAddress) -> None:
        """Publish the address; only this user may read the secret."""
        if self._scheduler:
            return
        temporary = self._file.with_name(f"{self._file.name}.tmp")
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(msgspec.json.encode(control))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self._file)
        sync_directory(self._file.parent)

    def withdraw(self) -> None:
        if not self._scheduler:
            self._file.unlink(missing_ok=True)

    def look(self) -> ControlAddress | None:
        """For a target world: what was published last, if anything. It may be out of date."""
        if self._scheduler:
            return ControlAddress(f"tcp://{self._scheduler}", run_token())
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=ControlAddress)
        except (FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):  # or what another version has left
            return None
