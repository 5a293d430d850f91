# SPDX-License-Identifier: Apache-2.0
"""The `hf` engine: a transformers model, on one device or tensor parallel over a subgroup of the world.

The decoder is called without the language-model head, hooks copy the outputs of the captured layers straight into the
rows of the item, and what the decoder returns is the final state after its norm. Documents are packed into one
forward where the model allows it (see `attention`), else they run one after the other.
"""

import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import PretrainedConfig, PreTrainedModel

from specdist.core.errors import ConfigError, DataError
from specdist.core.records import FeatureLayout, PackedTokens, moved_to
from specdist.target.base import TargetModel
from specdist.target.config import TargetConfig
from specdist.target.description import TargetDescription, compute_dtype
from specdist.target.hf import attention
from specdist.target.hf.against_transformers import compare_with_transformers, is_tested
from specdist.target.hf.attention import Documents, NotPackable
from specdist.target.loading import find_decoder, load_model
from specdist.target.verify import TOLERANCE, beyond, deviations

log = logging.getLogger(__name__)


class HfTarget(TargetModel):
    """A target that transformers runs. `decoder`: the model without its head, and without the encoders of a multimodal
    one. `packs`: whether the documents of a batch share one forward."""

    def __init__(
        self,
        config: TargetConfig,
        target: TargetDescription,
        layout: FeatureLayout,
        device: torch.device,
        group: ProcessGroup | None = None,
        tokens: int | None = None,
    ) -> None:
        self.layout, self.device, self.dtype = layout, device, compute_dtype(config, target)
        # Of the model only the decoder is kept: what else was loaded is freed at the end.
        model = load_model(target, self.dtype, device, group)
        self.decoder, layers = find_decoder(model, target.layers)
        self._own_attention = own_attention(self.decoder, target.text_config)
        self.decoder.set_attn_implementation(self._own_attention)
        self.packs = False
        self._out: Tensor | None = None
        self._layers = len(layers)
        for column, index in enumerate(layout.captured_layers):
            layers[index].register_forward_hook(self._capture(column, index))
        tested = is_tested(target.text_config.model_type)
        if config.verify_against == "hf" or (config.verify_against == "auto" and not tested):
            compare_with_transformers(model, layers, target, layout, self.forward)
        self._settle_prefill(config, target)

    @torch.no_grad()
    def forward(self, batch: PackedTokens, out: Tensor, final: Tensor | None = None) -> None:
        lengths = [n for n in batch.lengths if n]
        if not lengths:
            return
        tokens, positions = (moved_to(t, self.device) for t in (batch.tokens, batch.positions))
        if not self.packs:
            finals = [None] * len(lengths) if final is None else final.split(lengths)
            parts = (x.split(lengths) for x in (tokens, positions, out))
            for ids, places, rows, last in zip(*parts, finals, strict=True):
                self._run(ids, places, rows, last)
            return
        documents = Documents(lengths, moved_to(batch.cu_seqlens, self.device))
        self._run(tokens, positions, out, final, documents=documents)
        if documents.attended != self._layers:
            raise NotPackable(f"its {self._layers} layers called their attention {documents.attended} times")

    def _run(self, tokens: Tensor, positions: Tensor, out: Tensor, final: Tensor | None, **kwargs: Any) -> None:
        self._out = out
        states = self.decoder(input_ids=tokens[None], position_ids=positions[None], use_cache=False, **kwargs)
        if self.layout.final:
            final = self.layout.final_state(out)
        if final is not None:
            final.copy_(states.last_hidden_state[0])
        self._out = None

    def _capture(self, column: int, layer: int) -> Callable[[nn.Module, Any, Any], None]:
        columns = slice(column * self.layout.hidden_size, (column + 1) * self.layout.hidden_size)

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._out is None:  # the whole model runs, to be compared with
                return
            hidden_1TH = output[0] if isinstance(output, tuple) else output
            if hidden_1TH.shape[-2:] != (len(self._out), self.layout.hidden_size):
                raise DataError.at(
                    "target.path",
                    f": layer {layer} of {type(self.decoder).__name__} hands out {list(hidden_1TH.shape)}, and not one "
                    f"hidden state of {self.layout.hidden_size} a token: such a target has no features for a draft",
                )
            self._out[:, columns].copy_(hidden_1TH[0])

        return hook

    def _settle_prefill(self, config: TargetConfig, target: TargetDescription) -> None:
        """Decide, once, whether documents share a forward: `self.packs`, and the decoder's attention with it."""
        if config.prefill == "documents":
            return
        obstacle = packing_obstacle(self.decoder, target.text_config) or self._try_packing(target.vocab_size)
        if obstacle is None:
            log.info("target %s: the documents of a batch share one forward", target.path)
            return
        if config.prefill == "packed":
            raise ConfigError.at("target.prefill", f"=packed: {target.path} cannot be packed: {obstacle}")
        log.warning("target %s: documents run one after the other, which is slower: %s", target.path, obstacle)

    def _try_packing(self, vocab_size: int) -> str | None:
        """Run three short documents with the model's own attention, one by one, and packed; what is wrong, if so."""
        lengths = [24, 1, 39]
        ids = [(torch.arange(n) * 7919 + 101 * n) % vocab_size for n in lengths]
        batch = PackedTokens.from_documents(ids, [torch.zeros(n, dtype=torch.bool) for n in lengths])
        alone, packed = (self.layout.empty(sum(lengths), self.device) for _ in range(2))
        self.forward(batch, alone)
        self.decoder.set_attn_implementation(attention.register())
        self.packs = True
        try:
            self.forward(batch, packed)
        except NotPackable as e:
            obstacle = str(e)
        else:
            off = beyond(deviations(self.layout, packed, alone, lengths), TOLERANCE[self.dtype])
            if off is None:
                return None
            obstacle = (
                f"packed features of {off.part} are off by {off.worst:.1e}, more than {TOLERANCE[self.dtype]:.0e}"
            )
        self.packs = False
        self.decoder.set_attn_implementation(self._own_attention)
        return obstacle


def own_attention(decoder: PreTrainedModel, config: PretrainedConfig) -> str:
    """transformers' attention for documents one by one: its default, or `eager` where that would drop a soft cap.

    Up to 5.17 at least, the default (sdpa) ignores `attn_logit_softcapping` without a word.
    """
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "eager"
    return decoder.get_correct_attn_implementation(None)


def packing_obstacle(decoder: PreTrainedModel, config: PretrainedConfig) -> str | None:
    """Why the documents of an item cannot share a forward of this model, as far as its structure tells."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of another kind than full and sliding attention ({', '.join(sorted(kinds))})"
    if any(isinstance(m, nn.Conv1d) for m in decoder.modules()):
        return "its convolutions mix tokens over document boundaries"
    if rope := length_dependent_rope(config):
        return f"its rotary embedding ({rope}) depends on the longest document"
    if not decoder.is_backend_compatible():
        return f"{type(decoder).__name__} does not take its attention from transformers' AttentionInterface"
    if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(decoder.forward).parameters.values()):
        return f"{type(decoder).__name__} does not hand keyword arguments to its attention"
    return None


def length_dependent_rope(config: PretrainedConfig) -> str | None:
    """The type of a rotary embedding whose frequencies follow from the longest sequence of a forward, if it is one."""
    return min(set(_rope_types(getattr(config, "rope_parameters", None))) & {"dynamic", "longrope"}, default=None)


def _rope_types(parameters: dict[str, Any] | None) -> Iterator[str]:
    """The `rope_type`s in a model's rope parameters, which may be nested by kind of layer."""
    for key, value in (parameters or {}).items():
        if isinstance(value, dict):
            yield from _rope_types(value)
        elif key == "rope_type":
            yield value
