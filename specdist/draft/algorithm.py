# SPDX-License-Identifier: Apache-2.0
"""A draft algorithm: everything that the rest of the project asks of one. `registry.py` names those that there are.

Login nodes use algorithms too, so their modules are light to import: `build`, `cost`, `export` and `read` import the
model and what else is heavy when they are called.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeAlias, TypeVar

from specdist.core.errors import ConfigError, check_range

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig

    from specdist.core.records import FeatureLayout, PackedTokens, TargetVocabulary
    from specdist.draft.base import DraftModel
    from specdist.draft.common.sizes import LayerSizes
    from specdist.draft.common.vocabulary import DraftVocabulary


@dataclass(frozen=True)
class ServedBy:
    """One engine that serves an algorithm.

    Attributes:
        engine: the engine.
        method: the algorithm's name there. Engines guess it from the path's name where it is not given.
        since: the first version whose code was read and serves every draft of it that we write.
        formats: the forms it loads.
        block: drafts come out of one pass, not of one pass each (SGLang takes `--speculative-num-steps` of a chain).
    """

    engine: Literal["SGLang", "vLLM"]
    method: str
    since: str
    formats: tuple[str, ...] = ("sglang",)
    block: bool = False


C = TypeVar("C")
Contents: TypeAlias = "tuple[dict[str, Any], dict[str, Tensor]]"
"""What a directory for a serving engine holds: config.json, and the tensors of the weight file."""
Serving = Literal["greedy", "sampled"]
"""What `draft.serving` may be."""
WIDE = 4
"""Bytes of a number in fp32, which sums are made in."""


class TargetDirectory(Protocol):
    """The target's model directory."""

    @property
    def path(self) -> Path: ...
    @property
    def vocab_size(self) -> int: ...


@dataclass(frozen=True)
class Trained:
    """A trained draft that is to be exported.

    Attributes:
        state: the whole state dict, on the CPU, in any floating-point type.
        vocabulary: int64 [V_d], the target id of every draft id, ascending.
        target: the target's configuration, as transformers reads it.
        target_path: the target's directory or Hugging Face name, as a server would be given it.
        embedding: [V, H], the target's input embedding, where it is exported too.
    """

    state: Mapping[str, Tensor]
    vocabulary: Tensor
    target: PretrainedConfig
    target_path: str
    embedding: Tensor | None = None


@dataclass(frozen=True)
class ExportedDraft(ABC, Generic[C]):
    """An exported draft, read back.

    Attributes:
        algorithm: the name of its algorithm.
        config: config.json as it is.
        state: the trained tensors under the names of the draft's state dict, in the type they were written in.
        vocabulary: int64 [V_d], the target id of every draft id; None where the draft has the target's tokens.
    """

    algorithm: str
    config: Mapping[str, Any]
    state: dict[str, Tensor]
    vocabulary: Tensor | None

    @abstractmethod
    def options(self, base: C, target: PretrainedConfig) -> C:
        """`base` with everything that the weights decide set to what they are; its losses and lengths stay. Raises
        ConfigError: no options give this draft beside this target."""


@dataclass(frozen=True)
class ExportConfig:
    """What a run writes for serving when training ends."""

    formats: tuple[str, ...] | None = None
    """sglang: the directory that SGLang and vLLM load; speculators, where the algorithm has it: the format of the
    speculators library, which vLLM serves without naming the target. null: all that the draft's algorithm has."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the exported weights; choose the one the target is served in."""
    embedding: bool = False
    """Write the target's input embedding too. Engines share the target's; vLLM's pipeline parallelism cannot."""
    speculative_tokens: int | None = None
    """Draft tokens a target forward that the export asks servers for, of algorithms that draft a chain; a block is as
    long as it was trained. null: as many as the evaluation forecasts to be fastest for one sequence, up to 5."""

    def __post_init__(self) -> None:
        check_range("export", self, "speculative_tokens", least=1)
        if self.formats is not None and len(set(self.formats)) < len(self.formats):
            raise ConfigError.at("export.formats", f"names a format twice: {list(self.formats)}")

    @property
    def chain(self) -> int:
        """`speculative_tokens`, 5 where that is open."""
        return 5 if self.speculative_tokens is None else self.speculative_tokens


class Cost(ABC):
    """What training a draft of one target costs."""

    @abstractmethod
    def flops(self, batch: PackedTokens) -> float:
        """Floating-point operations that a step over `batch`, on the CPU, needs on all ranks that share it."""

    def evaluated(self, batch: PackedTokens) -> float:
        """What the loss and the replay of an evaluation of `batch` need, in training steps over it. A forward is about
        a third of one, and a chain is replayed by the steps that training unrolls."""
        return 2 / 3

    @abstractmethod
    def frozen_rows(self, tied: bool) -> int:
        """Rows of the target's tables on a draft rank's device. `tied`: whether embedding and head are one."""

    @abstractmethod
    def step_bytes(self, tokens: int, share: int, itemsize: int, compiled: bool) -> dict[str, int]:
        """The parts of a step's peak of memory in bytes, by name, without weights, optimizer and features.

        Args:
            tokens: of the micro-batch, all supervised.
            share: of them, those of one context-parallel rank.
            itemsize: bytes of a number in the compute dtype.
            compiled: `draft.compile`.
        """


class Algorithm(ABC, Generic[C]):
    """One way to draft, with the options of its section of the configuration. Layers are 0-based.

    Attributes:
        name: in `draft.algorithm`, and of the section `draft.<name>`.
        section: the frozen dataclass of that section. All its keys have defaults.
        changeable: its keys that may differ when a run directory is used again.
        benchmark: `key=value` words of its section for measurements, which have neither prompts nor a tokenizer.
        formats: what a draft can be written as.
        served_by: the engines that serve it.
        config: the options, with what follows from `draft.serving` filled in.
    """

    name: ClassVar[str]
    section: ClassVar[type]
    changeable: ClassVar[tuple[str, ...]] = ()
    benchmark: ClassVar[tuple[str, ...]] = ()
    formats: ClassVar[tuple[str, ...]]
    served_by: ClassVar[tuple[ServedBy, ...]] = ()

    def __init__(self, config: C, serving: Serving = "greedy") -> None:
        self.config = config

    # What follows from the configuration.

    def completed(self, target: Callable[[], TargetDirectory]) -> C:
        """The options with what follows from the target filled in, which is part of the draft from then on. Raises
        ConfigError, DataError: it does not follow."""
        return self.config

    def check(self, dtype: str, device: str, draft_tokens: int | None) -> None:
        """Check the options beside other sections' keys. Raises ConfigError: they do not go together.

        Args:
            dtype: `draft.dtype`.
            device: `world.device`.
            draft_tokens: how many an evaluation asks for at once (`evaluate.draft_tokens`); None without one.
        """

    def check_replay(self, temperature: float) -> None:
        """Raise ConfigError where `DraftModel.replay` cannot tell what serving at `evaluate.temperature` accepts."""
        if temperature:
            raise ConfigError.at(
                "evaluate.temperature",
                f"={temperature}: the features of draft.algorithm={self.name} lack the target's distribution, so only "
                "greedy serving can be replayed: leave it at 0",
                "draft.algorithm",
            )

    def sizes(self, target: PretrainedConfig) -> str:
        """What the draft's layers are made of, in words for the plan: given, or from the target. Raises ConfigError."""
        return ""

    def made_of(self, target: PretrainedConfig) -> object:
        """What the options make the draft beside this target, to compare: open ones as what they come to. Raises
        ConfigError."""
        return self.config

    @abstractmethod
    def layout(self, target: PretrainedConfig, dtype: torch.dtype) -> FeatureLayout:
        """What the draft needs of every token; `dtype` is that of the wire. Raises ConfigError: a captured layer does
        not exist, the layers do not ascend, or sizes do not go together."""

    def taught(self, batch: PackedTokens, draw: int | None) -> Tensor:
        """bool [T], on the CPU: at which rows the draft reads the last hidden state, and the argmax beside it, so that
        they are sent to it. `draw`: of a batch that is trained on, as `DraftModel.supervise` has it; None: it is
        evaluated, and replayed with any number of drafts. By default at all rows."""
        import torch

        return torch.ones_like(batch.supervised, dtype=torch.bool)

    @property
    def vocab_size(self) -> int | None:
        """Tokens of a draft vocabulary smaller than the target's; None where the draft proposes any token."""
        return None

    @property
    def moves(self) -> Mapping[str, str]:
        """The `key=value` that moves work to the side `draft` or `target`, where there is one."""
        return {}

    # The draft, and what it costs.

    @abstractmethod
    def build(
        self, target: PretrainedConfig, ends: TargetVocabulary, vocabulary: DraftVocabulary, compiled: bool
    ) -> DraftModel:
        """The draft with uninitialised fp32 weights on the device of `vocabulary`, the tokens that it may propose.
        `ends`: the target's embedding and head. Raises ConfigError, DataError: the options, the target and the
        vocabulary do not go together."""

    @abstractmethod
    def cost(self, target: PretrainedConfig) -> Cost:
        """What its training costs."""

    def weights_read(self, trained: int, target: PretrainedConfig, count: int) -> int:
        """How many weights are read to draft `count` tokens of one sequence, of a draft that has `trained` ones. By
        default those of a chain, which runs the whole draft for each."""
        return trained * count

    @property
    def embedding_on_host(self) -> bool:
        """Whether the target's embedding stays in the host's memory."""
        return False

    # Directories of serving engines.

    def draft_tokens(self, options: ExportConfig) -> int:
        """How many drafts a target forward a server is told to make: `evaluate.draft_tokens` where that is null."""
        return options.chain

    @abstractmethod
    def check_export(self, format: str, options: ExportConfig, target: PretrainedConfig) -> None:
        """Raise ConfigError where no engine could serve the draft as it is to be written."""

    @abstractmethod
    def export(self, format: str, trained: Trained, options: ExportConfig) -> Contents:
        """A trained draft as a directory of `format`. Raises ConfigError: the engines cannot serve such a draft.
        DataError: a tensor is missing, unknown, of the wrong shape or not finite, or the vocabulary is none."""

    @classmethod
    def faults(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
        """What engines would read otherwise than it was trained, in a draft's config.json: `KEY: why`."""
        return []

    @classmethod
    def served(cls, config: Mapping[str, Any], target: Sequence[str]) -> tuple[ServedBy, ...]:
        """`served_by` of the draft with this config.json, beside a target of these architectures."""
        return cls.served_by

    @classmethod
    @abstractmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Whether a directory with this config.json holds such a draft, ours or another project's."""

    @classmethod
    @abstractmethod
    def read(cls, directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ExportedDraft[C]:
        """Understand a directory. Raises DataError: a key or a tensor is missing, or it is a variant that we lack."""


def check_attention(key: str, backend: str, device: str) -> None:
    """Raises ConfigError where FlexAttention is asked for on a CPU; `key` is where `backend` was read from."""
    if backend == "flex" and device == "cpu":
        raise ConfigError.at(
            key, "=flex needs a CUDA device, and world.device is cpu: auto takes what works", "world.device"
        )


def for_vllm(key: str, why: str) -> ConfigError:
    """What is raised of a draft that SGLang cannot serve; `key` is what it follows from."""
    return ConfigError.at(key, f"{why} serve with vLLM (export.formats=[speculators])", "export.formats")


def check_last_layer(key: str, layers: Sequence[int], target_layers: int) -> None:
    """Raises ConfigError where SGLang cannot hand out the captured `layers`, 0-based, which `key` asks for."""
    if max(layers) == (last := target_layers - 1):
        why = f": {list(layers)}: SGLang cannot capture the output of the target's last layer, {last}"
        raise for_vllm(key, f"{why}; train without it, or")


def check_same_sizes(ours: LayerSizes, theirs: LayerSizes) -> None:
    """Raises ConfigError where `theirs`, those of an exported draft, are others than `ours`."""
    differing = [key for key in vars(ours) if vars(ours)[key] != vars(theirs)[key]]
    if unlike := [key for key in differing if key != "max_position_embeddings"]:
        listed = "; ".join(f"{key} is {vars(theirs)[key]}, {vars(ours)[key]} beside this target" for key in unlike)
        raise ConfigError(f"the exported draft does not fit this target: {listed}")
