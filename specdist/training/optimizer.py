# SPDX-License-Identifier: Apache-2.0
"""AdamW with a learning rate that is a pure function of the step, so that it needs no state of its own."""

from __future__ import annotations

import math

import torch
from torch import nn

from specdist.training.config import OptimizerConfig


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
