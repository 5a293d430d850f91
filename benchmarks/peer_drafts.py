# SPDX-License-Identifier: Apache-2.0
"""SpecForge's and TorchSpec's EAGLE-3 step and loss as draft algorithms: `run.plugins=[benchmarks.peer_plugin]`.

Prompts, batches, features, start, optimizer, checkpoints and evaluations are those of any run, and so are the names of
the weights; the forward and the loss that train them are the peer's own code, unmodified, read from a checkout
(`draft.specforge.path`); `python -m benchmarks.peers` runs them side by side. A packed micro-batch becomes right-
padded rows as their collators make them, of documents alike in length and a few calls a micro-batch; the calls are
weighed so that the loss is that of one call over all, and the micro-batches of a step count alike, as in their data
parallelism. Read in SpecForge a6b6b02 (August 2026) and TorchSpec 6f21829 (April 2026).

What stands in for what is not installed, none of it called by their step: triton, numba, wandb, on the CPU alone. There
SpecForge's Triton loss is its own reference of it (`_compute_loss`), and nothing is compiled.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal
from unittest.mock import MagicMock

import torch
import torch._inductor.compile_fx  # which looks for triton: before anything stands in for it
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import flex_attention  # noqa: F401
from torch.utils._triton import has_triton_package
from transformers import LlamaConfig

from specdist.core.errors import ConfigError
from specdist.core.records import Features, LogitMap, PackedTokens
from specdist.draft.algorithm import Serving
from specdist.draft.base import DraftModel, Supervision
from specdist.draft.eagle3.algorithm import Eagle3
from specdist.draft.eagle3.config import Eagle3Config, Eagle3Dims
from specdist.draft.eagle3.model import Eagle3Draft

STAND_INS = ("triton", "triton.language", "numba", "wandb")
"""Modules that the peers import."""
Found = tuple[Tensor, list[Tensor], list[Tensor]]
"""The loss of a micro-batch; and, of every TTT step, its loss and how often the target's choice was met."""


@dataclass(frozen=True)
class PeerConfig(Eagle3Config):
    """EAGLE-3 as a peer trains it: the options of `draft.eagle3` that it has too."""

    path: str = ""
    """The peer's checkout."""
    backend: Literal["sdpa", "flex_attention"] = "sdpa"
    """The peer's attention. flex_attention needs CUDA, and compiles anew for every length."""
    rows: int = 16384
    """Tokens of a call at most, padding included, where there is more than one document in it."""


@dataclass(frozen=True)
class Rows:
    """Some documents of a micro-batch, one a row, padded on the right.

    Attributes:
        tokens: int64 [B, T].
        valid: int64 [B, T], where there is a token.
        answer: int64 [B, T], the supervised ones.
        captured: [B, T, L * H], the captured layers.
        final: [B, T, H], the target's last hidden states.
    """

    tokens: Tensor
    valid: Tensor
    answer: Tensor
    captured: Tensor
    final: Tensor


def padded(batch: PackedTokens, lengths: Sequence[int], features: Features, most: int) -> list[Rows]:
    """The documents of a micro-batch, the longest first: calls of `most` tokens, padding included, and each document at
    least a quarter as long as the longest."""
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    calls: list[list[int]] = []
    for n in order:
        longest = lengths[calls[-1][0]] if calls else 0
        if not calls or (len(calls[-1]) + 1) * longest > most or 4 * lengths[n] < longest:
            calls.append([])
        calls[-1].append(n)

    def pad(values: Tensor, call: list[int]) -> Tensor:
        parts = [values[starts[n] : starts[n + 1]] for n in call]
        return nn.utils.rnn.pad_sequence(parts, batch_first=True)

    answer = batch.supervised.long()
    told = (batch.tokens, torch.ones_like(answer), answer, features.captured, features.final)
    return [Rows(*(pad(values, call) for values in told)) for call in calls]


def shifted(values: Tensor, by: int = 1) -> Tensor:
    """What stands so many places further on in every row; zeros behind the end."""
    return functional.pad(values.transpose(1, -1), (0, by))[..., by:].transpose(1, -1)


class Step(nn.Module):
    """A peer's step over the calls of a micro-batch."""

    def __init__(self, model: Any, head: Tensor) -> None:
        """`model`: the peer's, whose `draft_model` has the weights of ours under their names. `head`: [V, H], the
        target's."""
        super().__init__()
        self.model, self._head = model, (head,)

    model: Any

    @abstractmethod
    def forward(self, calls: list[Rows]) -> Found: ...


class SpecForgeStep(Step):
    """`Eagle3TrainStrategy.forward_loss`, whose mean is over all positions: a call weighs by its size."""

    def __init__(self, model: Any, head: Tensor) -> None:
        from specforge.runtime.contracts import TrainBatch
        from specforge.training.strategies.base import Eagle3TrainStrategy

        super().__init__(model, head)
        self._strategy, self._batch = Eagle3TrainStrategy(model), TrainBatch

    def forward(self, calls: list[Rows]) -> Found:
        whole, outputs = sum(call.tokens.numel() for call in calls), []
        for call in calls:
            tensors = {
                "input_ids": shifted(call.tokens),
                "attention_mask": call.valid,
                "loss_mask": shifted(call.answer)[..., None],
                "hidden_state": call.captured,
                "target": functional.linear(shifted(call.final), self._head[0]),
            }
            batch = self._batch([], "eagle3", tensors, {"target_repr": "logits"})
            outputs.append((self._strategy.forward_loss(batch), call.tokens.numel() / whole))
        loss = torch.stack([output.loss * share for output, share in outputs]).sum()
        losses, met = (
            [sum(output.metrics[key][k] * share for output, share in outputs) for k in range(self.model.length)]
            for key in ("plosses", "acces")
        )
        return loss, losses, met


class TorchSpecStep(Step):
    """`Eagle3Trainer._forward` and `_backward`, whose mean is over what counts: a call weighs by that. The loss mask is
    not shifted there, and neither is it here."""

    def __init__(self, model: Any, head: Tensor) -> None:
        from torchspec.models import eagle3

        super().__init__(model, head)
        self._pruned, self._whole = eagle3.compute_target_p_padded, eagle3.compute_lazy_target_padded

    def forward(self, calls: list[Rows]) -> Found:
        length, head, targets, counts = self.model.length, self._head[0], [], []
        for call in calls:
            final, mask = shifted(call.final), call.answer
            if self.model.vocab_pruning:
                targets.append(self._pruned(final, head, self.model.draft_model.t2d, mask, length))
                mask = targets[-1].position_mask
            else:
                targets.append(self._whole(final, head, length))
            counts.append(torch.stack([mask[:, k:].sum() for k in range(length)]))
        shares = torch.stack(counts) / torch.stack(counts).sum(0).clamp(min=1)
        losses, met = (torch.zeros(length, device=head.device) for _ in range(2))
        for call, target, share in zip(calls, targets, shares, strict=True):
            found, _, agreed = self.model(
                input_ids=shifted(call.tokens),
                attention_mask=call.valid,
                target=target,
                loss_mask=call.answer,
                hidden_states=call.captured,
            )
            losses, met = losses + torch.stack(found) * share, met + torch.stack(agreed) * share
        loss = sum(0.8**k * own for k, own in enumerate(losses))
        return loss, list(losses), list(met)


@contextmanager
def imported(path: str) -> Iterator[None]:
    """Inside it the packages of a checkout can be imported, and what they import and is not installed has a stand-in:
    nothing else shall take that for the library."""
    stand_ins = {name: MagicMock() for name in STAND_INS if find_spec(name.split(".")[0]) is None}
    has_triton_package()  # which remembers
    sys.path.insert(0, path)
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        sys.path.remove(path)
        for name in stand_ins:
            del sys.modules[name]


class PeerDraft(Eagle3Draft):
    """Our draft, trained by a peer's step; evaluated, exported and decoded as ours."""

    config: PeerConfig

    def __init__(self, make: Any, draft: Eagle3Draft) -> None:
        """`make`: see `Peer.step`. `draft`: ours, whose state this one takes over."""
        self.__setstate__(vars(draft))
        config, vocabulary, head = self.config, self.frozen.vocabulary, self.frozen.whole_head
        assert head is not None
        if head.is_cpu:
            torch.compiler.set_stance("force_eager")
        with imported(config.path), torch.device(head.device):
            step: Step = make(config, llama(self.dims), head)
        names = ("t2d", "d2t") if hasattr(step.model.draft_model, "t2d") else ()
        for name in names:
            getattr(step.model.draft_model, name).copy_(getattr(vocabulary, name))
        self._step = (step.train(),)  # no part of this module: neither sharded nor saved

    def supervise(
        self, batch: PackedTokens, host_batch: PackedTokens, features: Features, draw: int = 0
    ) -> Supervision:
        """As ours; and the micro-batch itself is counted."""
        found = super().supervise(batch, host_batch, features, draw)
        return replace(found, counts=torch.cat([found.counts, found.counts.new_ones(1)]))

    def forward(
        self, batch: PackedTokens, features: Features, supervision: Supervision, totals: Tensor
    ) -> tuple[Tensor, Tensor]:
        """In evaluations, which have no gradients, the loss is ours: that of all can be compared."""
        if not torch.is_grad_enabled():
            return super().forward(batch, features, supervision, totals[:-1])
        self.ready(*self.late)
        config, lengths, dtype = self.config, supervision.data["lengths"], self.fc.weight.dtype
        assert isinstance(lengths, tuple)
        weights: dict[str, Tensor] = {f"model.draft_model.{name}": own for name, own in self.named_parameters()}
        weights["model.draft_model.embed_tokens.weight"] = self.frozen.embedding.to(dtype)
        calls = padded(batch, lengths, Features(features.layout, features.rows.to(dtype)), config.rows)
        loss, losses, met = torch.func.functional_call(self._step[0], weights, (calls,))
        one = torch.ones((), device=totals.device)
        sums = [torch.stack([own.detach(), one, 0 * one, share, one]) for own, share in zip(losses, met, strict=True)]
        return loss.float() / totals[-1].float(), torch.cat(sums).double()


def llama(dims: Eagle3Dims) -> LlamaConfig:
    """The draft's sizes as the peers read them."""
    return LlamaConfig(  # type: ignore[call-arg]
        hidden_size=dims.hidden_size,
        intermediate_size=dims.intermediate_size,
        num_attention_heads=dims.num_attention_heads,
        num_key_value_heads=dims.num_key_value_heads,
        head_dim=dims.head_dim,
        rms_norm_eps=dims.rms_norm_eps,
        vocab_size=dims.vocab_size,
        draft_vocab_size=dims.draft_vocab_size,
        max_position_embeddings=dims.max_position_embeddings,
        rope_parameters=dict(dims.rope_parameters),
        num_hidden_layers=1,
        pad_token_id=None,
        pretraining_tp=1,
    )


class Peer(Eagle3):
    """See `Algorithm`. The loss of evaluations is `kl`, which is the peers' own too."""

    section = PeerConfig
    config: PeerConfig
    changeable: ClassVar[tuple[str, ...]] = ("path", "rows")  # type: ignore[assignment]

    def __init__(self, config: PeerConfig, serving: Serving = "greedy") -> None:
        super().__init__(config, "sampled")

    def check(self, dtype: str, device: str, draft_tokens: int | None) -> None:
        super().check(dtype, device, draft_tokens)
        config, key = self.config, f"draft.{self.name}"
        if not (Path(config.path) / self.name).is_dir():
            raise ConfigError.at(f"{key}.path", f"={config.path}: there is no folder {self.name} in it")
        own = {"norm_output", "norm_before_fc", "norm_before_residual", "fc_norm", "stacked"}
        if more := sorted(name for name in own if getattr(config, name)):
            raise ConfigError.at(f"{key}.{more[0]}", ": the peers' draft of the paper is one layer without it")
        if config.teacher_head == "target" or config.step_decay != 0.8:
            raise ConfigError.at(f"{key}.teacher_head", "must be draft, and step_decay 0.8, as the peers have it")

    def build(self, *given: Any, **named: Any) -> DraftModel:
        draft = super().build(*given, **named)
        assert isinstance(draft, Eagle3Draft)
        if draft.fc.weight.is_meta:
            return draft
        if draft.frozen.logit_map != LogitMap():
            raise ConfigError.at("target.path", ": the peers know no scale and no cap of the target's logits")
        return PeerDraft(self.step, draft)

    @staticmethod
    @abstractmethod
    def step(config: PeerConfig, sizes: LlamaConfig, head: Tensor) -> Step:
        """The peer's. `head`: [V, H], the target's, on the device where it is computed."""


class SpecForge(Peer):
    """See `Peer`."""

    name = "specforge"

    @staticmethod
    def step(config: PeerConfig, sizes: LlamaConfig, head: Tensor) -> Step:
        from specforge.algorithms.eagle3 import model as eagle3
        from specforge.core.loss import _compute_loss
        from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3

        if head.is_cpu:
            eagle3.LogSoftmaxLoss = SimpleNamespace(apply=_compute_loss)
        draft = LlamaForCausalLMEagle3(sizes, attention_backend=config.backend)
        return SpecForgeStep(eagle3.OnlineEagle3Model(draft, config.ttt_length, config.backend), head)


class TorchSpec(Peer):
    """See `Peer`."""

    name = "torchspec"

    @staticmethod
    def step(config: PeerConfig, sizes: LlamaConfig, head: Tensor) -> Step:
        from torchspec.models.draft.llama3_eagle import LlamaForCausalLMEagle3
        from torchspec.models.eagle3 import Eagle3Model

        rope = dict(sizes.rope_parameters or {})  # read as transformers 4 says it
        sizes.rope_scaling = None if rope["rope_type"] == "default" else rope
        sizes.rope_theta = rope["rope_theta"]
        draft = LlamaForCausalLMEagle3(sizes, attention_backend=config.backend)
        return TorchSpecStep(Eagle3Model(draft, config.ttt_length, config.backend), head)


PEERS = {peer.name: peer for peer in (SpecForge, TorchSpec)}
