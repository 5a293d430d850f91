# SPDX-License-Identifier: Apache-2.0
"""AdamW with a learning rate that is a pure function of the step, so that it needs no state of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from specdist.core.errors import ConfigError


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule. The defaults are what published drafts were trained with."""

    lr: float = 1e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    clip_norm: float = 0.5
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After warmup: cosine to final_lr; wsd (stable, then linear to final_lr over the last decay share); constant."""
    warmup: float = 0.015
    """Share of all steps over which the rate rises linearly from 0."""
    decay: float = 0.2
    """wsd only: share of all steps over which the rate falls."""
    final_lr: float = 0.0
    """The rate at the end, as a share of the peak."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError.at("optimizer.lr", f"is > 0, not {self.lr}")
        for key in ("clip_norm", "weight_decay", "eps"):
            if getattr(self, key) < 0:
                off = " (0 turns it off)" if key != "eps" else ""
                raise ConfigError.at(f"optimizer.{key}", f"is at least 0{off}, not {getattr(self, key)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError.at("optimizer.betas", f"are at least 0 and less than 1, not {list(self.betas)}")
        for key in ("warmup", "decay", "final_lr"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError.at(f"optimizer.{key}", f"is a share between 0 and 1, not {getattr(self, key)}")
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ConfigError.at(
                "optimizer.warmup",
                f"+ optimizer.decay = {self.warmup + self.decay} is more than all steps",
                "optimizer.decay",
            )


def learning_rate(config: OptimizerConfig, step: int, total: int) -> float:
    """The rate of step `step` (0-based) of `total`."""
    warmup = math.ceil(config.warmup * total)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        progress = (step - warmup) / max(total - warmup, 1)
        falling = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    else:
        decay = max(math.ceil(config.decay * total), 1)
        falling = min(max((total - step) / decay, 0.0), 1.0)
    return config.lr * (config.final_lr + (1 - config.final_lr) * falling)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters (fp32 master weights, sharded as the model is)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
