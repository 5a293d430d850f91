# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of torch.distributed.checkpoint (DCP): reading those that others may have written, and writing ours.

DCP unpickles a checkpoint's `.metadata`, and every value that is no tensor, which would run whatever code a stranger
has put there. These take the classes that DCP itself writes, and nothing else.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, Metadata
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from specdist.core.progress import FileSum

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_DCP = "torch.distributed.checkpoint"
_CLASSES = {
    f"{_DCP}.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
        *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    ),
    f"{_DCP}.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
}
"""What the metadata of torch 2.11 to 2.13 consists of, by module."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of a checkpoint")


class CheckpointReader(FileSystemReader):
    """The storage of a checkpoint's directory."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checkpoint's description. Raises pickle.UnpicklingError where it is made of anything else."""
        file = Path(self.path) / ".metadata"
        try:
            metadata = _Unpickler(io.BytesIO(file.read_bytes())).load()
        except MemoryError as error:  # of a number that says how many
            raise pickle.UnpicklingError(f"{file} asks for too much memory") from error
        if not isinstance(metadata, Metadata) or metadata.storage_meta is None:
            raise pickle.UnpicklingError(f"{file} is no metadata of a checkpoint")
        metadata.storage_meta.load_id = self.load_id
        return metadata


class CheckpointPlanner(DefaultLoadPlanner):
    """Reads values that are no tensors, such as the optimizer's settings, as numbers, texts, and lists of them."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        set_element(self.original_state_dict, self.mappings[name], torch.load(value, weights_only=True))


_BUFFER = 2**20


class CheckpointWriter(FileSystemWriter):
    """One file a rank, and DCP's metadata. `sums`: of this rank's files; on the coordinator in the end of all. `fence`:
    raises where a file is not to be opened, or not to be given its name."""

    def __init__(self, path: Path, fence: Callable[[], None] = lambda: None):
        super().__init__(path)
        self.sums: dict[str, FileSum] = {}
        self.fs = _SummingFileSystem(self.sums, fence)

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
    def __init__(self, sums: dict[str, FileSum], fence: Callable[[], None]):
        self._sums, self._fence = sums, fence

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        assert mode == "wb", mode
        self._fence()
        with SummedFile(path, mode) as file, io.BufferedWriter(file, _BUFFER) as stream:
            yield stream
        self._sums[Path(path).name] = FileSum(file.size, file.crc)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        self._fence()
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
