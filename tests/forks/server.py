# SPDX-License-Identifier: Apache-2.0
"""Imports what a run needs, once, and forks for whoever asks: `python -m tests.forks.server DIRECTORY [MODULE ...]`.

One thread serves all: forks are made by a process without threads. A client that is gone takes its fork along, as a
SIGKILL would have.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

PRELOADED = (
    "torch.distributed.run", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo",
    "torch.distributed.checkpoint.state_dict_saver", "torch.utils.tensorboard", "accelerate", "pyarrow.parquet",
    "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3", "specdist.run.runtime", "specdist_launch.cli", "specdist_launch.agent",
)  # fmt: skip
PACKAGES = ("specdist", "specdist_launch")


def main(directory: Path, modules: Sequence[str]) -> None:
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG: nothing is served for tests that are gone
    for name in (*PRELOADED, *modules):
        importlib.import_module(name)
    for package in PACKAGES:  # those that need what is not installed are left to who uses them
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            with contextlib.suppress(ImportError):
                importlib.import_module(module.name)
    _prepare()
    threads = [thread.name for thread in threading.enumerate()]
    assert len(os.listdir("/proc/self/task")) == 1, f"an import has started threads: {threads}"
    Server(directory).serve()


def _prepare() -> None:
    """Do here what every fork would do anew."""
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from specdist.core import config
    from specdist.job.config import JobConfig

    get_checkpoint_conversion_mapping("")  # compiles a thousand patterns
    config.Sources([], ["target.path=x", "run.dir=x"]).load(JobConfig)  # keeps the defaults
    # For the names in its log an agent reads the sources of all its frames, with a look at all modules for each.
    dynamic_rendezvous.get_method_name = lambda depth=2: sys._getframe(depth).f_code.co_name  # noqa: SLF001
    gc.collect()
    gc.freeze()  # a fork that visited all these objects would copy their pages


class Server:
    def __init__(self, directory: Path):
        self._directory = directory
        self._selector = selectors.DefaultSelector()
        self._forks: dict[int, tuple[int, socket.socket, Path]] = {}  # what tells of its end, its client, its note
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(directory / "starting"))
        self._listener.listen(64)
        (directory / "starting").rename(directory / "socket")
        self._selector.register(self._listener, selectors.EVENT_READ, None)

    def serve(self) -> NoReturn:
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    self._accept()
                elif key.data[0] in self._forks:  # not ended by an event before it
                    self._ended(*key.data)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        wanted, streams = _wanted(client)
        if wanted is None:
            client.close()
            return
        pid = os.fork()
        if pid == 0:
            self._selector.close()
            self._listener.close()
            client.close()
            run(wanted, streams)
        for stream in streams:
            os.close(stream)
        note = self._directory / str(wanted["pid"])
        note.with_suffix(".new").write_text(str(pid))
        note.with_suffix(".new").rename(note)
        end = os.pidfd_open(pid)
        self._forks[pid] = end, client, note
        self._selector.register(end, selectors.EVENT_READ, (pid, False))
        self._selector.register(client, selectors.EVENT_READ, (pid, True))
        _say(client, pid)

    def _ended(self, pid: int, killed: bool) -> None:
        """A fork has ended, or its client is gone."""
        end, client, note = self._forks.pop(pid)
        if killed:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        note.unlink()  # another process may get the client's number
        for source in (end, client):
            self._selector.unregister(source)
        os.close(end)
        _say(client, os.waitstatus_to_exitcode(status))
        client.close()


def _wanted(client: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """What a client asks for, and its standard streams; None: it was killed before it had said so."""
    head, streams, _, _ = socket.recv_fds(client, 4, 3)
    missing, text = int.from_bytes(head, "big"), b""
    while missing and (part := client.recv(missing)):
        text, missing = text + part, missing - len(part)
    if len(head) == 4 and not missing:
        return json.loads(text), streams
    for stream in streams:
        os.close(stream)
    return None, []


def _say(client: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):
        client.sendall(f"{number}\n".encode())


def run(wanted: dict[str, Any], streams: list[int]) -> NoReturn:
    """In the fork: become the interpreter that the client was called as."""
    status = 1
    try:
        _become(wanted, streams)
        if sys.argv[0] == "-m":
            del sys.argv[0]
            sys.modules.pop(sys.argv[0], None)  # it is run as __main__, not imported
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
            runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as leaving:
        status = _status(leaving.code)
    except KeyboardInterrupt:
        traceback.print_exc()
        _flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:  # noqa: BLE001 - what an interpreter does with what nobody has caught
        traceback.print_exc()
    finally:
        _leave(status)


def _become(wanted: dict[str, Any], streams: list[int]) -> None:
    import torch

    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = os.fdopen(os.dup(0))
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    for original, stream in zip(
        ("__stdin__", "__stdout__", "__stderr__"), (sys.stdin, sys.stdout, sys.stderr), strict=True
    ):
        setattr(sys, original, stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(wanted["environment"])
    os.chdir(wanted["directory"])
    os.getppid = lambda: wanted["parent"]
    sys.executable, sys.argv = wanted["executable"], wanted["arguments"][:]
    sys.path[0] = wanted["directory"]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())).partition(",")[0]))


def _status(code: object) -> int:
    if isinstance(code, int):
        return code & 0xFF
    if code is not None:
        print(code, file=sys.stderr)
    return 0 if code is None else 1


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _leave(status: int) -> NoReturn:
    import atexit

    threading._shutdown()  # type: ignore[attr-defined]  # noqa: SLF001 - as the interpreter does at its end
    atexit._run_exitfuncs()  # noqa: SLF001
    _flush()
    os._exit(status)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
