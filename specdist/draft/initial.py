# SPDX-License-Identifier: Apache-2.0
"""Start a draft from an exported directory: its weights by their names, and its draft vocabulary."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from specdist.errors import DataError

BORROWED = ("d2t", "t2d", "embed_tokens.weight")
"""Exported tensors that are not the draft's own parameters."""


def read_draft(directory: str | Path) -> dict[str, Tensor]:
    """All tensors of an exported draft (`*.safetensors`, else `pytorch_model.bin`), on the CPU.

    Raises:
        DataError: there is no such directory, or no weights in it that can be read.
    """
    directory = Path(directory)
    files = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("pytorch_model*.bin"))
    if not files:
        raise DataError(f"draft.init_from: {directory} has no *.safetensors or pytorch_model.bin")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            loaded = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise DataError(f"draft.init_from: {file} cannot be read: {error}") from error
        tensors.update(loaded)
    return tensors


def initial_vocabulary(directory: str | Path) -> Tensor | None:
    """The draft vocabulary (ascending target ids, int64 [V_d]) of an exported draft; None where it is the whole."""
    offsets = read_draft(directory).get("d2t")
    return None if offsets is None else offsets.long() + torch.arange(len(offsets))


@torch.no_grad()
def load_initial(draft: nn.Module, directory: str | Path) -> None:
    """Copy an exported draft's weights into `draft`.

    Raises:
        DataError: names or shapes differ from the draft's own.
    """
    found = {name: tensor for name, tensor in read_draft(directory).items() if name not in BORROWED}
    parameters = dict(draft.named_parameters())
    wrong = [f"{name} is missing" for name in sorted(parameters.keys() - found.keys())]
    wrong += [f"{name} is unknown" for name in sorted(found.keys() - parameters.keys())]
    wrong += [
        f"{name} is {list(found[name].shape)}, expected {list(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in found and found[name].shape != parameter.shape
    ]
    if wrong:
        raise DataError(f"draft.init_from: {directory} does not fit this draft: {'; '.join(wrong)}")
    for name, parameter in parameters.items():
        parameter.copy_(found[name])
