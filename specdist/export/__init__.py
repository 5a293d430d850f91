# SPDX-License-Identifier: Apache-2.0
"""Drafts as directories that serving engines load, and back: `export_draft` and `load_exported`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from specdist.core.errors import ConfigError
from specdist.draft.export_config import ExportConfig, Format

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

    from specdist.draft.config import DraftConfig
    from specdist.draft.exported import ExportedDraft

__all__ = ["ExportConfig", "Format", "check_servable", "export_draft", "load_exported"]


def export_draft(
    directory: str | Path,
    format: Format,
    draft: DraftConfig,
    state: Mapping[str, Tensor],
    vocabulary: Tensor,
    target: PretrainedConfig,
    target_path: str | Path,
    options: ExportConfig | None = None,
    embedding: Tensor | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a trained draft for serving engines; the directory appears complete or not at all.

    Args:
        draft: the configuration it was trained with; `draft.algorithm` picks the exporter.
        state: the whole state dict, on the CPU, in any floating-point type, with or without a vocabulary map.
        vocabulary: int64 [V_d], the target id of every draft id, ascending.
        target: the target's configuration, as transformers reads it.
        target_path: the target's directory or Hugging Face name, as a server would be given it.
        embedding: [V, H], the target's input embedding; needed when `options.embedding` is true.
        overwrite: replace an export that is already in the directory.

    Returns:
        The directory.

    Raises:
        ConfigError: the directory is taken, or the engines cannot serve such a draft; the message says why.
        DataError: a tensor is missing, unknown, of the wrong shape or not finite, or the vocabulary is none.
    """
    # Imported here: the configuration of a job, which imports this package, has no use for torch and transformers.
    from specdist.draft.dflash.export import DFlashExport
    from specdist.draft.eagle3.export import Eagle3Export
    from specdist.export.directory import check_free, write_directory

    options = options or ExportConfig()
    if options.embedding and embedding is None:
        raise ConfigError.at("export.embedding", "is true, but the target's embedding was not given")
    check_free(Path(directory), overwrite)
    exporter = DFlashExport if draft.algorithm == "dflash" else Eagle3Export
    export = exporter.of(draft, target, vocabulary, format)
    config = export.config_json(str(target_path), options)
    tensors = export.tensors(state, vocabulary, options, embedding if options.embedding else None)
    return write_directory(Path(directory), config, tensors, overwrite)


def check_servable(draft: DraftConfig, options: ExportConfig, target_layers: int) -> None:
    """Raise ConfigError where the engines could not serve the draft as it is to be written.

    Args:
        target_layers: of the target.
    """
    from specdist.draft.dflash import export as dflash
    from specdist.draft.eagle3 import export as eagle3

    if draft.algorithm == "dflash" and options.embedding:
        raise ConfigError.at("export.embedding", "=true: engines serve DFlash drafts with the target's embedding only")
    for format in options.written(draft.algorithm):
        if draft.algorithm == "dflash":
            dflash.check_servable(draft.dflash.captured_layers(target_layers), target_layers)
        else:
            eagle3.check_servable(draft.eagle3.captured_layers(target_layers), target_layers, format)


def load_exported(directory: str | Path) -> ExportedDraft:
    """Read an exported draft of any format, ours or another's, with the names that the draft's state dict has.

    Raises:
        DataError: files or keys are missing, or a tensor is missing, unknown or of the wrong shape.
    """
    from specdist.draft.dflash import reader as read_dflash
    from specdist.draft.eagle3 import reader as read_eagle3
    from specdist.export.directory import read_directory

    config, tensors = read_directory(Path(directory))
    reader = read_dflash if read_dflash.ARCHITECTURE in (config.get("architectures") or ()) else read_eagle3
    return reader.read(Path(directory), config, tensors)
