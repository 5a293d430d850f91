# SPDX-License-Identifier: Apache-2.0
"""The options of the EAGLE-3 draft, and the sizes that follow from them and its target."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from specdist.core.errors import ConfigError, check_range
from specdist.draft.common.loss_kind import LossKind, LossName
from specdist.draft.common.sizes import LayerOptions, LayerSizes, check_layers, check_sliding, evenly, layer_sizes
from specdist.draft.eagle3.latent import Latent

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SECTION = "draft.eagle3"
VARIANT = ("fc_norm", "norm_before_fc", "norm_output", "norm_before_residual")
"""Options that say what a draft computes with its weights, under the names that engines read too."""
FP8_MULTIPLE = 16
"""Rows and columns of FP8 products."""


@dataclass(frozen=True)
class Eagle3Config(LayerOptions):
    """EAGLE-3 (arXiv 2503.01840), its 3.1 norms, and the LK losses (arXiv 2602.23881)."""

    layers: tuple[int, ...] | None = None
    """Captured target layers, as ascending 0-based layer outputs; default [1, n//2 - 1, n - 4] of n layers, of
    fewer than 7 an even spread."""
    ttt_length: int = 7
    """Draft steps unrolled in training (training-time test); serve with at most about as many."""
    step_decay: float = 0.8
    """Step k weighs step_decay^k in the loss."""
    vocab_size: int | None = None
    """Draft vocabulary: the most frequent target tokens the draft may propose; null is the whole vocabulary."""
    fc_norm: bool = False
    """EAGLE-3.1: an RMSNorm on each captured layer's output before they are fused."""
    norm_before_fc: bool = False
    """One RMSNorm on the captured outputs side by side before they are fused, as speculators trains; not with fc_norm.
    SGLang serves it from 0.5.18 on."""
    norm_output: bool = False
    """EAGLE-3.1: the next step takes the normed state instead of the un-normed one."""
    norm_before_residual: bool = False
    """The layer adds its attention to the normed state instead of the un-normed one, as speculators trains. Only vLLM
    serves it."""
    num_layers: int = 1
    """Decoder layers. Those after the first read the state alone. More than one, a window, qk_norm or mla are trained
    by autograd, step by step, in more memory than the one layer of the paper."""
    sliding_window: int | None = None
    """Tokens back that the layers attend to; null is all. Only vLLM serves it, and speculators trains 2048."""
    sliding_layers: tuple[int, ...] | None = None
    """The draft's layers, 0-based, that have sliding_window; null is every one."""
    qk_norm: bool = False
    """Qwen3 layers: an RMSNorm of each head's queries and keys before RoPE. Only vLLM serves it."""
    mla: bool = False
    """Multi-head latent attention, of the sizes that a target of the DeepSeek family has."""
    init_head: Literal["target", "random"] = "target"
    """Where the draft's output head starts: the target's output head, its part for the draft vocabulary, or random."""
    loss: LossName | None = None
    """Null follows draft.serving: mixed for greedy, kl for sampled. argmax: cross entropy with the target's most
    likely token; kl: with its distribution; mixed: half of each. With a the chance that sampling accepts the draft, tv:
    1 - a; lk_alpha: -log a; lk_lambda: a mixture of kl and tv."""
    pairs: Literal["all", "served"] = "all"
    """Which positions a TTT step is trained at: all, or those that serving drafts at, whose next token is of the
    answer."""
    lk_eta: float = 3.0
    """lk_lambda: a position weighs its cross entropy by exp(-lk_eta * acceptance), 1 - acceptance by the rest."""
    loss_chunk: int = 4096
    """Positions whose draft logits, over all TTT steps, are held at one time. Memory of the loss: about loss_chunk x
    draft vocabulary x 3 bytes, twice that in fp32. Fewer make the matrix multiplications slower."""

    products: Literal["compute", "fp8"] = "compute"
    """Precision of the matrix multiplications with the layer's weights, in the TTT steps: the draft's compute dtype, or
    FP8 (e4m3, a scale for each row of a matrix; the gradients of weights as ever). fp8 needs a GPU of compute
    capability 8.9 or more; a CPU plays its rounding."""
    teacher_head: Literal["draft", "target"] = "draft"
    """Which side runs the target's whole output head, whose argmax and log-sum-exp the loss needs. The target's ranks
    share it, the draft's have it each; so `target` makes the draft side faster and smaller, and the target slower."""
    embedding: Literal["device", "host"] = "device"
    """Where the target's input embedding lies: in page-locked host memory the GPU reads only the vectors it needs."""
    recompute: int = 0
    """TTT steps whose MLP and its input are computed again in the backward instead of kept: each saves 4 x intermediate
    size + 2 x hidden size bytes a token in bf16, and costs 1 to 2 % of the time."""

    def __post_init__(self) -> None:
        if not 0 <= self.recompute <= self.ttt_length:
            raise ConfigError.at(
                "draft.eagle3.recompute",
                f"is {self.recompute}: it must be between 0 and ttt_length ({self.ttt_length})",
            )
        check_range(SECTION, self, "ttt_length", "loss_chunk", "num_layers", "vocab_size", least=1)
        check_range(SECTION, self, "step_decay", above=0, most=1)
        check_range(SECTION, self, "lk_eta", least=0)
        if self.fc_norm and self.norm_before_fc:
            raise ConfigError.at(
                "draft.eagle3.norm_before_fc",
                "and draft.eagle3.fc_norm exclude each other: the captured outputs are normed side by side or each",
                "draft.eagle3.fc_norm",
            )
        if self.stacked and self.products == "fp8":
            others = [f"draft.eagle3.{key}" for key in ("sliding_window", "qk_norm", "mla")]
            raise ConfigError.at(
                "draft.eagle3.products",
                f"=fp8 is for drafts of one layer without {', '.join(others)}",
                " ".join(["draft.eagle3.num_layers", *others]),
            )
        if self.sliding_window is not None and self.sliding_window <= self.ttt_length:
            raise ConfigError.at(
                "draft.eagle3.sliding_window",
                f"is {self.sliding_window}: it must be more than ttt_length ({self.ttt_length}), or null",
                "draft.eagle3.ttt_length",
            )
        check_sliding(SECTION, self.sliding_window, self.sliding_layers, self.num_layers)
        without = ("norm_before_fc", "norm_before_residual", "sliding_window", "qk_norm")
        if self.mla and (more := [k for k in without if getattr(self, k)] + ["num_layers"] * (self.num_layers > 1)):
            raise ConfigError.at(
                "draft.eagle3.mla",
                f"=true and {', '.join(more)}: no engine serves them together",
                " ".join(f"draft.eagle3.{key}" for key in more),
            )
        self.check_sizes(SECTION)

    @property
    def loss_kind(self) -> LossKind:
        """`loss`, which the algorithm has filled in (`Algorithm.config`)."""
        assert self.loss is not None
        return LossKind(self.loss, self.lk_eta)

    @property
    def stacked(self) -> bool:
        """Whether `stack.py` unrolls the steps, and not `unroll.py`, which knows the one layer of the paper."""
        return self.num_layers > 1 or self.mla or self.qk_norm or self.sliding_window is not None

    @property
    def divides(self) -> bool:
        return not (self.qk_norm or self.mla)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Tokens back that each layer attends to; None: all."""
        layers, chosen = range(self.num_layers), self.sliding_layers
        return tuple(self.sliding_window if chosen is None or layer in chosen else None for layer in layers)

    def captured_layers(self, num_layers: int) -> tuple[int, ...]:
        """The captured layers of a target of `num_layers` layers. Raises ConfigError: a layer does not exist, the
        layers do not ascend, or there are too few to serve."""
        layers = self.layers
        if layers is None:
            layers = (1, num_layers // 2 - 1, num_layers - 4)
            if not 0 <= layers[0] < layers[1] < layers[2]:  # of a small target all but the first and the last, or so
                layers = evenly(1 if num_layers > 4 else 0, max(num_layers - 2, 1), 3)
        check_layers("draft.eagle3.layers", layers, num_layers)
        if len(layers) < 2:
            # SGLang applies fc only where the features are wider than the hidden state.
            raise ConfigError.at(
                "draft.eagle3.layers", f": {list(layers)} is one layer; serving engines need several (3)"
            )
        return tuple(layers)


@dataclass(frozen=True)
class Eagle3Dims(LayerSizes):
    """Sizes of the draft: Llama layers as wide as its target. `latent`: those of MLA; `head_dim` is then that of its
    queries and keys."""

    latent: Latent | None = None

    @property
    def scale(self) -> float:
        """Of attention scores."""
        factor = self.rope_parameters.get("factor", 1.0) if self.rope_parameters["rope_type"] == "yarn" else 1.0
        return self.latent.scale(factor) if self.latent else float(self.head_dim**-0.5)

    @property
    def value_dim(self) -> int:
        """Of a head's values."""
        return self.latent.v_head_dim if self.latent else self.head_dim

    def projection_weights(self, inputs: int) -> int:
        """Those that make queries, keys and values of `inputs` numbers."""
        if (own := self.latent) is None:
            return inputs * (self.query_width + 2 * self.key_width)
        ranks, up = own.q_lora_rank + own.kv_lora_rank, own.qk_nope_head_dim + own.v_head_dim
        heads = own.q_lora_rank * own.head_dim + own.kv_lora_rank * up
        return inputs * (ranks + own.qk_rope_head_dim) + self.num_attention_heads * heads

    @classmethod
    def of(cls, config: Eagle3Config, target: PretrainedConfig, draft_vocab_size: int | None = None) -> Eagle3Dims:
        """The draft's sizes for a target's configuration.

        `draft_vocab_size` is that of the vocabulary in use; without it `config.vocab_size` counts, then the target's.
        Raises ConfigError: the target does not state a size, or sizes do not go together.
        """
        sizes, latent = layer_sizes(SECTION, config, target, config.vocab_size, draft_vocab_size), None
        if config.mla:
            latent = Latent.of(target, sizes["rope_parameters"]["rope_type"] == "yarn")
            sizes |= {"head_dim": latent.head_dim, "num_key_value_heads": sizes["num_attention_heads"]}
        if config.products == "fp8" and config.intermediate_size is None:
            sizes["intermediate_size"] += -sizes["intermediate_size"] % FP8_MULTIPLE
        dims = cls(**sizes, latent=latent)
        widths = {"hidden size": dims.hidden_size, "MLP": dims.intermediate_size}
        widths |= {"queries": dims.query_width, "keys": dims.key_width}
        for name, width in widths.items() if config.products == "fp8" else ():
            if width % FP8_MULTIPLE:
                raise ConfigError.at(
                    "draft.eagle3.products",
                    f"=fp8 needs widths that are multiples of {FP8_MULTIPLE}, and the draft's {name} "
                    f"has {width}: use draft.eagle3.products=compute",
                )
        return dims


def turned(dims: Eagle3Dims) -> Eagle3Dims:
    """The sizes of what RoPE turns: of MLA a part of the head."""
    return replace(dims, head_dim=dims.latent.qk_rope_head_dim) if dims.latent else dims
