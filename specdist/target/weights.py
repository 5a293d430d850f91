# SPDX-License-Identifier: Apache-2.0
"""Reading a checkpoint without building the model: which tensors there are, and single ones of them.

Safetensors (one file; sharded with an index; sharded without one) and PyTorch `.bin` files (one, or sharded with an
index) are known. Only headers are read until a tensor is asked for.
"""

import math
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from specdist.core.errors import DataError
from specdist.core.hub import named_weights

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The names of the safetensors format, https://github.com/huggingface/safetensors#format."""


@dataclass(frozen=True)
class StoredTensor:
    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize

    def load(self) -> Tensor:
        """The tensor, on the CPU, in the checkpoint's dtype."""
        return read_tensors(self.file, [self.name])[self.name].clone()


def read_tensors(file: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of one file, on the CPU, in the checkpoint's dtype; mapped, and not read yet."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in names}
    state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    return {name: state[name] for name in names}


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights of the model directory `path`. Raises DataError when there are none."""
    files = [path / name for name in named_weights(path, [p.name for p in path.iterdir()])]
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of the {len(files)} weight files that its index names are missing: "
            f"{', '.join(missing)}"
        )
    if files:
        return files
    raise DataError(
        f"{path}: no weights found. Looked for model.safetensors.index.json, *.safetensors, "
        f"pytorch_model.bin.index.json and *.bin; the directory holds: {_listing(path)}"
    )


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in `path` by name, from the headers alone."""
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(path):
        tensors |= {t.name: t for t in _headers(file)}
    return tensors


def _headers(file: Path) -> list[StoredTensor]:
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
                return [
                    StoredTensor(name, file, tuple(s.get_shape()), DTYPES[s.get_dtype()]) for name, s in slices.items()
                ]
        state = torch.load(file, map_location="meta", mmap=True, weights_only=True)
    except (SafetensorError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise DataError(f"{file}: not a readable weight file: {e}") from e
    return [StoredTensor(n, file, tuple(t.shape), t.dtype) for n, t in state.items() if isinstance(t, Tensor)]


def _listing(path: Path, most: int = 20) -> str:
    names = sorted(p.name for p in path.iterdir())
    return (", ".join(names[:most]) or "nothing") + (f", ... ({len(names)} in all)" if len(names) > most else "")
