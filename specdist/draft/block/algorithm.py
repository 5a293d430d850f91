# SPDX-License-Identifier: Apache-2.0
"""What algorithms that draft blocks have in common as the project sees them."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from specdist.core.errors import ConfigError, DataError
from specdist.core.model_config import read_tokenizer, text_part
from specdist.draft.algorithm import Algorithm, TargetDirectory, check_attention, check_last_layer, for_vllm
from specdist.draft.block.options import BlockDims, BlockOptions
from specdist.draft.block.served import NEWEST, sglang_serves, since

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig

    from specdist.core.records import FeatureLayout, PackedTokens, TargetVocabulary
    from specdist.draft.algorithm import Contents, ExportConfig, ServedBy, Trained
    from specdist.draft.block.backbone import BlockDraft
    from specdist.draft.block.cost import BlockCost
    from specdist.draft.block.reader import ExportedBlocks
    from specdist.draft.common.vocabulary import DraftVocabulary

C = TypeVar("C", bound=BlockOptions)

RARE = re.compile(r"mask|reserved|unused|extra|spare|dummy|placeholder", re.IGNORECASE)
SCALED = ("gemma4_text",)
"""Targets whose embedding is a module that scales, which SGLang calls for its drafts (read in 0.5.20)."""


class BlockAlgorithm(Algorithm[C]):
    """See `Algorithm`. Its name is also that of the speculators form.

    Attributes:
        title: what messages call it.
        architectures: in the form of SGLang and vLLM, and in that of speculators.
        nested: the section of config.json where engines look for a part of the keys.
        plain: keys of config.json and the values that we have, beside those of all drafts of blocks.
    """

    changeable = ("loss_chunk", "attention")
    benchmark = ("mask_token_id=0",)
    formats = ("sglang", "speculators")
    title: ClassVar[str]
    architectures: ClassVar[tuple[str, str]]
    nested: ClassVar[str]
    plain: ClassVar[Mapping[str, tuple[object, ...]]]

    def completed(self, target: Callable[[], TargetDirectory]) -> C:
        if self.config.mask_token_id is not None:
            return self.config
        # A tokenizer that changes later does not change it.
        directory = target()
        return replace(self.config, mask_token_id=find_mask_token(directory.path, directory.vocab_size))

    def sizes(self, target: PretrainedConfig) -> str:
        return f"{BlockDims.of(self.config, target)}, mask token {self.config.mask_token_id}"

    def made_of(self, target: PretrainedConfig) -> object:
        options = self.config
        return BlockDims.of(options, target), options.views, options.mask_token_id, options.made_of(target)

    def check(self, dtype: str, device: str, draft_tokens: int | None) -> None:
        options, section = self.config, self.config.SECTION
        check_attention(f"{section}.attention", options.attention, device)
        if draft_tokens is not None and draft_tokens > options.drafts:
            less = ", less the verified token" if options.silent else ""
            raise ConfigError.at(
                "evaluate.draft_tokens",
                f"={draft_tokens} is more than the {options.drafts} that a block drafts "
                f"({section}.block_size={options.block_size}{less})",
                f"{section}.block_size",
            )

    @property
    @abstractmethod
    def final(self) -> bool:
        """Whether the target's last hidden state is learnt from."""

    def check_replay(self, temperature: float) -> None:
        if not self.final:  # its chances follow from that
            super().check_replay(temperature)

    def layout(self, target: PretrainedConfig, dtype: torch.dtype) -> FeatureLayout:
        from specdist.core.records import FeatureLayout

        BlockDims.of(self.config, target)
        text = target.get_text_config()
        layers = self.config.captured_layers(text.num_hidden_layers)
        return FeatureLayout(layers, text.hidden_size, final=self.final, dtype=dtype)

    def taught(self, batch: PackedTokens, draw: int | None) -> Tensor:
        from specdist.draft.block.blocks import Blocks

        if draw is None:
            blocks = Blocks.at(Blocks.candidates(batch), batch, self.config)
        else:
            blocks = Blocks.draw(batch, self.config, draw)
        return (batch.places < 0).index_fill(0, blocks.rows[blocks.served], True)

    @staticmethod
    @abstractmethod
    def model() -> type[BlockDraft]:
        """The draft's class."""

    def build(
        self, target: PretrainedConfig, ends: TargetVocabulary, vocabulary: DraftVocabulary, compiled: bool
    ) -> BlockDraft:
        dims = BlockDims.of(self.config, target, len(vocabulary.ids))
        return self.model()(self.config, dims, ends.to(vocabulary.ids.device), vocabulary, compiled)

    def cost(self, target: PretrainedConfig) -> BlockCost:
        from specdist.draft.block.cost import BlockCost

        return BlockCost(self.config, BlockDims.of(self.config, target), self.final)

    @property
    def vocab_size(self) -> int | None:
        return self.config.vocab_size

    def weights_read(self, trained: int, target: PretrainedConfig, count: int) -> int:
        """One pass fills a block, and an output head reads it: one of the `trained` weights, or the target's."""
        text = target.get_text_config()
        return trained + (text.vocab_size * text.hidden_size if self.config.vocab_size is None else 0)

    def draft_tokens(self, options: ExportConfig) -> int:
        return self.config.drafts

    @classmethod
    def served(cls, config: Mapping[str, Any], target: Sequence[str]) -> tuple[ServedBy, ...]:
        engines = (since(by, config, target) for by in cls.served_by)
        return tuple(by for by in engines if by.engine != "SGLang" or sglang_serves(target))

    @classmethod
    def faults(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
        from specdist.draft.block.directory import faults

        return faults(config, cls.nested)

    def check_export(self, format: str, options: ExportConfig, target: PretrainedConfig) -> None:
        target_layers = target.get_text_config().num_hidden_layers
        layers, name = self.config.captured_layers(target_layers), self.title
        if options.embedding:
            raise ConfigError.at(
                "export.embedding", f"=true: engines serve {name} drafts with the target's embedding only"
            )
        if format == "speculators":
            self._check_views()
            return
        if self.config.vocab_size is not None:
            why = f"={self.config.vocab_size}: SGLang drafts blocks with the target's own head: leave it at null, or"
            raise for_vllm(f"{self.config.SECTION}.vocab_size", why)
        architectures, kind = tuple(target.architectures or ()), text_part(target).model_type
        if not sglang_serves(architectures):
            why = f"SGLang up to {NEWEST} hands a draft of blocks no layers of {architectures[0]}:"
            raise for_vllm("draft.algorithm", f"={self.name}: {why}")
        if kind in SCALED:
            why = f"SGLang feeds {name} drafts the scaled embedding of {kind}, and they are trained on it as it is:"
            raise for_vllm("draft.algorithm", f"={self.name}: {why}")
        check_last_layer(f"{self.config.SECTION}.layers", layers, target_layers)

    def export(self, format: str, trained: Trained, options: ExportConfig) -> Contents:
        from specdist.draft.block.directory import write_blocks

        self.check_export(format, options, trained.target)
        return write_blocks(self, format, trained, options)

    def own_json(self, format: str, target: PretrainedConfig) -> dict[str, Any]:
        """Keys of config.json beside those of all drafts of blocks."""
        return {}

    @classmethod
    def read(cls, directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ExportedBlocks[C]:
        from specdist.draft.block.reader import read_blocks

        return read_blocks(cls, directory, config, tensors)

    @classmethod
    @abstractmethod
    def read_own(
        cls, config: Mapping[str, Any], keys: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path
    ) -> dict[str, Any]:
        """The options beside those of all drafts of blocks that the weights decide; `keys` are those of `config`, which
        lies at `path`, with what is nested at the top. Raises DataError."""

    @classmethod
    def named(cls, config: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
        """What tells algorithms apart: config.json with what is nested at the top, and the architectures."""
        return {**config, **(config.get(cls.nested) or {})}, set(config.get("architectures") or ())

    def _check_views(self) -> None:
        if len({view.causal for view in self.config.views}) > 1:
            raise ConfigError.at(
                f"{self.config.SECTION}.causal",
                "is null, and some layers slide: the speculators form makes all layers causal or none "
                "(sliding_window_non_causal): say true or false, or write the other form (export.formats=[sglang])",
                "export.formats",
            )


def find_mask_token(target: Path, vocab_size: int) -> int:
    """The tokenizer's own mask token, else the first row of the target's embedding that is no token of its tokenizer.
    Without one a token that hardly occurs in text: one that is reserved by its name, else the last that is neither a
    beginning nor an end. Of a directory without a tokenizer (`specdist plan`) the last row. Raises DataError: the
    tokenizer cannot be read."""
    if not any(any(target.glob(name)) for name in ("tokenizer*", "vocab*", "*.model", "tekken.json")):
        return vocab_size - 1
    try:
        tokenizer = read_tokenizer(target)
    except (OSError, ValueError) as error:
        raise DataError.at("target.path", f": no usable tokenizer in {target}: {error}") from error
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    vocabulary = tokenizer.get_vocab()
    free = max(vocabulary.values()) + 1
    if free < vocab_size:
        return int(free)
    written = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    template = str(tokenizer.chat_template or "")
    added = {
        n: str(t) for n, t in tokenizer.added_tokens_decoder.items() if n not in written and str(t) not in template
    }
    reserved = [number for number, token in added.items() if RARE.search(token)]
    others = sorted(number for number in vocabulary.values() if number not in written)
    return int(next(iter([*reserved, *sorted(added)[::-1], *others[::-1]])))
