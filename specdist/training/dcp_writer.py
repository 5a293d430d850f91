# SPDX-License-Identifier: Apache-2.0
"""Writing a checkpoint's files, with a checksum of each: taken of the bytes as they are written, in the thread that
writes them."""

from __future__ import annotations

import contextlib
import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from specdist.core.progress import FileSum

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_BUFFER = 2**20


class CheckpointWriter(FileSystemWriter):
    """One file a rank, and DCP's metadata. `sums`: by name, of the files of this rank; on the coordinator, once all is
    written, of all ranks."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.sums: dict[str, FileSum] = {}
        self.fs = _SummingFileSystem(self.sums)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = super().write_data(plan, planner).wait()
        written: Future[list[WriteResult]] = Future()
        written.set_result(_Written(results, self.sums))
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        for written in results:
            assert isinstance(written, _Written)
            self.sums |= written.sums
        super().finish(metadata, results)


class _Written(list[WriteResult]):
    """What a rank has written, as DCP sends it to the coordinator."""

    def __init__(self, results: list[WriteResult] = [], sums: dict[str, FileSum] | None = None):  # noqa: B006
        super().__init__(results)
        self.sums = sums or {}


class _SummingFileSystem(FileSystem):
    def __init__(self, sums: dict[str, FileSum]):
        self._sums = sums

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        assert mode == "wb", mode
        with SummedFile(path, mode) as file, io.BufferedWriter(file, _BUFFER) as stream:
            yield stream
        self._sums[Path(path).name] = FileSum(file.size, file.crc)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self._sums[Path(new_path).name] = self._sums.pop(Path(path).name)


class SummedFile(io.FileIO):
    """A file that counts what is written into it; `crc` is its CRC-32."""

    size = crc = 0

    def write(self, data: ReadableBuffer) -> int:
        written = super().write(data)
        self.crc = zlib.crc32(memoryview(data).cast("B")[:written], self.crc)
        self.size += written
        return written
