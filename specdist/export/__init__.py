# SPDX-License-Identifier: Apache-2.0
"""Drafts as directories that serving engines load, and back: `export_draft` and `load_exported`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from specdist.core.errors import ConfigError, DataError
from specdist.draft.algorithm import Contents, ExportConfig, ExportedDraft, Trained
from specdist.draft.config import DraftConfig
from specdist.draft.registry import ALGORITHMS, algorithm_of
from specdist.export.config_json import OURS

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ExportConfig", "Trained", "check_servable", "export_draft", "load_exported", "written_formats"]


def export_draft(
    directory: str | Path,
    format: str,
    draft: DraftConfig,
    trained: Trained,
    options: ExportConfig | None = None,
    overwrite: bool = False,
    origin: Mapping[str, Any] | None = None,
) -> Path:
    """Write a trained draft for serving engines; the directory appears complete or not at all. Returns the directory.
    Raises ConfigError: the directory is taken, or the engines cannot serve such a draft; the message says why.
    DataError: a tensor is missing, unknown, of the wrong shape or not finite, or the vocabulary is none.

    Args:
        format: one that the draft's algorithm has.
        draft: the configuration it was trained with.
        overwrite: replace an export that is already in the directory.
        origin: what config.json and the model card say of where the draft comes from (`specdist.run.after_training`).
    """
    from specdist.export.card import model_card
    from specdist.export.directory import check_free, write_directory  # login nodes have no use for it

    options = options or ExportConfig()
    if options.embedding and trained.embedding is None:
        raise ConfigError.at("export.embedding", "is true, but the target's embedding was not given")
    check_free(Path(directory), overwrite)
    config, tensors = _contents(Path(directory), format, draft, trained, options, origin or {})
    card = model_card(config, str(Path(directory).absolute()))
    return write_directory(Path(directory), config, tensors, card, overwrite)


def _contents(
    directory: Path,
    format: str,
    draft: DraftConfig,
    trained: Trained,
    options: ExportConfig,
    origin: Mapping[str, Any],
) -> Contents:
    """What `directory` is to hold, held against what engines read of it. Raises ConfigError, DataError."""
    from specdist.export.directory import check_contents

    config, tensors = draft.chosen.export(format, trained, options)
    config[OURS] = {
        "target": trained.target_path,
        "target_architectures": list(trained.target.architectures or ()),
        "draft_tokens": draft.chosen.draft_tokens(options),
        **origin,
    }
    check_contents(directory, config, tensors)
    return config, tensors


def written_formats(draft: DraftConfig, options: ExportConfig) -> tuple[str, ...]:
    """The formats that such a draft is written in. Raises ConfigError: one is not for its algorithm."""
    known = draft.chosen.formats
    for name in options.formats or ():
        if name not in known:
            raise ConfigError.at(
                "export.formats",
                f": {name} is not for drafts of draft.algorithm={draft.algorithm}: give [{', '.join(known)}], or null",
                "draft.algorithm",
            )
    return known if options.formats is None else options.formats


def check_servable(draft: DraftConfig, options: ExportConfig, target: PretrainedConfig) -> None:
    """Export such a draft in every form without weights, so that what would be wrong with the export after training is
    told before it. Raises ConfigError: the engines could not serve the draft as it is to be written."""
    import torch

    from specdist.draft.build import blank_draft

    formats = written_formats(draft, options)
    for format in formats:  # the reasons that have a key of their own
        draft.chosen.check_export(format, options, target)
    blank, text = blank_draft(draft, target), target.get_text_config()
    vocabulary = torch.arange(draft.chosen.vocab_size or text.vocab_size)
    embedding = torch.empty(text.vocab_size, text.hidden_size, device="meta") if options.embedding else None
    trained = Trained(dict(blank.named_parameters()), vocabulary, target, "", embedding)
    for format in formats:
        try:
            _contents(Path(format), format, draft, trained, options, {})
        except DataError as error:
            raise ConfigError.at("export.formats", f"={format}: {error}", f"draft.{draft.algorithm}") from error


def load_exported(directory: str | Path) -> ExportedDraft[Any]:
    """Read an exported draft of any format, ours or another's, with the names that the draft's state dict has. Raises
    DataError: files or keys are missing, or a tensor is missing, unknown or of the wrong shape."""
    from specdist.export.directory import read_directory

    return understand(Path(directory), *read_directory(Path(directory)))


def understand(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ExportedDraft[Any]:
    """The same of a directory whose files are read already. Raises DataError."""
    if algorithm := algorithm_of(config):
        return algorithm.read(directory, config, tensors)
    names = [config[key] for key in ("architectures", "speculators_model_type") if config.get(key)]
    raise DataError(f"{directory} holds {names or 'nothing named'}, and no draft of {', '.join(ALGORITHMS)}")
