# SPDX-License-Identifier: Apache-2.0
"""Real acceptance length by real speculative decoding: greedy, one sequence at a time, a chain of K drafts.

The target checks the last verified token and the K drafts in one forward, keeps the drafts that are its own greedy
choice, and adds one token of its own (the bonus token). Whatever the draft proposes, the text is what the target alone
would have written; `check` decodes that as well and counts the sequences that differ. In fp32 none does. In bf16 a few
may: K + 1 rows at once are not rounded as single rows are, and two tokens with nearly equal logits can change places.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from specdist.core.errors import ConfigError, DataError
from specdist.core.records import FeatureLayout, Features
from specdist.draft.base import Proposer
from specdist.evaluate.config import EvaluateConfig
from specdist.evaluate.report import EvaluationReport, Tally

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

    from specdist.target.description import TargetDescription

ROLLBACK_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Layer types whose cache is a list of keys and values, so that rejected tokens can be cut off its end."""


class EvaluationTarget:
    """A target model that decodes: one forward gives greedy choices and the features that the draft asks for."""

    def __init__(self, model: PreTrainedModel, layout: FeatureLayout) -> None:
        config = model.config.get_text_config()
        known = config.to_dict()
        unknown = set(known.get("layer_types") or ()) - ROLLBACK_LAYERS
        if unknown:
            raise ConfigError(
                f"evaluation cannot take rejected tokens back from layers of type {', '.join(sorted(unknown))} "
                f"(of {type(model).__name__}); it can from {', '.join(sorted(ROLLBACK_LAYERS))}"
            )
        layers = decoder_layers(model)
        wrong = [b for b in layout.captured_layers if not 0 <= b < len(layers)]
        if wrong:
            raise ConfigError(f"captured layers {wrong} are not among the target's {len(layers)} layers (0-based)")
        if layout.hidden_size != config.hidden_size:
            raise ConfigError(
                f"the draft expects hidden size {layout.hidden_size}; the target has {config.hidden_size}"
            )
        self.model = model.eval()
        self.layout = replace(layout, argmax_lse=False)
        self.device = next(model.parameters()).device
        self.max_positions: int | None = known.get("max_position_embeddings")
        self.eos_tokens = eos_tokens(model)
        self._captured: dict[int, Tensor] = {}
        self._final = torch.empty(0)
        for layer in sorted(set(layout.captured_layers)):
            layers[layer].register_forward_hook(self._capture(layer))
        model.get_decoder().register_forward_hook(self._keep_final)

    @classmethod
    def load(
        cls,
        target: TargetDescription,
        layout: FeatureLayout,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> EvaluationTarget:
        """The model of a target's directory, whole, on `device`, in `dtype`."""
        from specdist.target.loading import load_model

        return cls(load_model(target, dtype, torch.device(device)), layout)

    @staticmethod
    def new_cache() -> DynamicCache:
        """An empty key-value cache. Without a configuration its layers keep all keys, so that any can be cut off."""
        from transformers import DynamicCache

        return DynamicCache()

    def forward(self, tokens: Sequence[int], cache: DynamicCache, last: int) -> Tensor:
        """Append `tokens` to the sequence in `cache`; the greedy choices after its last `last` tokens, int64 [last]."""
        ids = torch.tensor([list(tokens)], dtype=torch.long, device=self.device)
        output = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=last)
        return output.logits[0].argmax(-1)

    def features(self, count: int) -> Features:
        """The features of the first `count` tokens of the last forward."""
        parts = [self._captured[b][0, :count] for b in self.layout.captured_layers]
        if self.layout.final:
            parts.append(self._final[0, :count])
        return Features(self.layout, torch.cat(parts, dim=-1).to(self.layout.dtype))

    def _capture(self, layer: int) -> Callable[[nn.Module, object, object], None]:
        def hook(_module: nn.Module, _args: object, output: object) -> None:
            self._captured[layer] = output[0] if isinstance(output, tuple) else output  # type: ignore[assignment]

        return hook

    def _keep_final(self, _module: nn.Module, _args: object, output: object) -> None:
        self._final = output.last_hidden_state  # type: ignore[attr-defined]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a causal language model: the one list of modules as long as its number of layers."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.get_decoder().children() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(lists) != 1:
        raise ConfigError(
            f"{type(model).__name__}: found {len(lists)} lists of {count} layers in its decoder, need one"
        )
    return lists[0]


def eos_tokens(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end a sequence, by the generation config, else by the model's."""
    generation = model.generation_config.eos_token_id if model.generation_config is not None else None
    eos = model.config.get_text_config().eos_token_id if generation is None else generation
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)


class Reply:
    """The tokens of one sequence as they are kept, and what became of the drafts."""

    def __init__(self, settings: EvaluateConfig, eos: frozenset[int], first: int) -> None:
        self.tokens = [first]
        self.limit = settings.max_new_tokens
        self.eos = eos
        self.forwards = 0
        self.drafted = [0] * settings.draft_tokens
        self.reached = [0] * settings.draft_tokens
        self.accepted = [0] * settings.draft_tokens

    @property
    def finished(self) -> bool:
        return self.tokens[-1] in self.eos or len(self.tokens) >= self.limit

    @property
    def drafts_wanted(self) -> int:
        """A forward gives one token more than the drafts it accepts, so the last tokens need fewer of them."""
        return min(len(self.drafted), self.limit - len(self.tokens) - 1)

    def verify(self, drafts: Sequence[int], chosen: Sequence[int]) -> int:
        """Keep what one forward gives; `chosen[k]` is the target's token where `drafts[k]` stands, and one more.

        Returns how many tokens were kept: the accepted drafts and, unless one of them ended the sequence, the bonus.
        """
        self.forwards += 1
        for k in range(len(drafts)):
            self.drafted[k] += 1
        kept = 0
        for k, token in enumerate(chosen):
            kept += 1
            self.tokens.append(token)
            if k == len(drafts):
                break
            self.reached[k] += 1
            if drafts[k] != token:
                break
            self.accepted[k] += 1
            if token in self.eos:
                break
        return kept

    def tally(self, seconds: float) -> Tally:
        return Tally(
            prompts=1,
            tokens=len(self.tokens),
            forwards=self.forwards,
            drafted=tuple(self.drafted),
            reached=tuple(self.reached),
            accepted=tuple(self.accepted),
            seconds=seconds,
        )


@torch.no_grad()
def speculate(target: EvaluationTarget, proposer: Proposer, prompt: Sequence[int], settings: EvaluateConfig) -> Reply:
    """Decode one sequence by drafting and verifying. The prefill gives the first token of the reply."""
    cache = target.new_cache()
    chosen = target.forward(prompt, cache, last=1)
    after_prompt = torch.tensor([*prompt[1:]], dtype=torch.long, device=target.device)
    reply = Reply(settings, target.eos_tokens, int(chosen))
    next_tokens, rows = torch.cat([after_prompt, chosen]), len(prompt)
    while not reply.finished:
        proposer.extend(target.features(rows), next_tokens)
        wanted = reply.drafts_wanted
        drafts = proposer.propose(wanted) if wanted else []
        if len(drafts) != wanted:
            raise ValueError(f"the proposer gave {len(drafts)} drafts where {wanted} were asked for")
        chosen = target.forward([reply.tokens[-1], *drafts], cache, last=1 + wanted)
        rows = reply.verify(drafts, chosen.tolist())
        if rows <= wanted:
            cache.crop(rows - wanted - 1)  # negative: how many of the tokens just checked were not kept
        next_tokens = chosen[:rows]
    return reply


@torch.no_grad()
def decode_greedily(target: EvaluationTarget, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """The target's own greedy reply, one token per forward."""
    cache = target.new_cache()
    tokens = [int(target.forward(prompt, cache, last=1))]
    while tokens[-1] not in target.eos_tokens and len(tokens) < max_new_tokens:
        tokens.append(int(target.forward(tokens[-1:], cache, last=1)))
    return tokens


Progress = Callable[[int, int, Tally], None]
"""Called after every prompt with the prompts done, their number, and the tally of all done so far."""


def evaluate(
    target: EvaluationTarget,
    proposer_factory: Callable[[], Proposer],
    prompts: Sequence[Sequence[int]],
    settings: EvaluateConfig,
    progress: Progress | None = None,
    sources: Sequence[str] | None = None,
) -> EvaluationReport:
    """Decode every prompt with a fresh proposer and report what the target accepted.

    Args:
        prompts: token ids of each prompt, as the chat template renders it, its generation prompt included.
        sources: the file each prompt is of (`prompts` when not given): the report keeps them apart.

    Raises:
        DataError: there is no prompt, one is empty, or none is short enough for the target.
    """
    if not prompts:
        raise DataError("there is no prompt to evaluate")
    names = ["prompts"] * len(prompts) if sources is None else list(sources)
    files = {name: Tally.empty(settings.draft_tokens) for name in names}
    done = Tally.empty(settings.draft_tokens)
    for i, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        tally = _evaluate_prompt(target, proposer_factory, prompt, settings)
        files[name] += tally
        done += tally
        if progress is not None:
            progress(i + 1, len(prompts), done)
    if not done.prompts:
        raise DataError(
            f"all {len(prompts)} prompts are too long: with {settings.max_new_tokens} new tokens they exceed the "
            f"target's {target.max_positions} positions (evaluate.max_new_tokens)",
            "evaluate.max_new_tokens",
        )
    return EvaluationReport(settings.draft_tokens, files)


def _evaluate_prompt(
    target: EvaluationTarget,
    proposer_factory: Callable[[], Proposer],
    prompt: Sequence[int],
    settings: EvaluateConfig,
) -> Tally:
    if not prompt:
        raise DataError("a prompt to evaluate has no tokens")
    empty = Tally.empty(settings.draft_tokens)
    if target.max_positions is not None and len(prompt) + settings.max_new_tokens > target.max_positions:
        return replace(empty, too_long=1)
    start = time.perf_counter()
    reply = speculate(target, proposer_factory(), prompt, settings)
    tally = reply.tally(time.perf_counter() - start)
    if not settings.check:
        return tally
    start = time.perf_counter()
    plain = decode_greedily(target, prompt, settings.max_new_tokens)
    seconds = time.perf_counter() - start
    return replace(
        tally, checked=1, differing=int(plain != reply.tokens), plain_tokens=len(plain), plain_seconds=seconds
    )
