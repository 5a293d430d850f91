# SPDX-License-Identifier: Apache-2.0
"""What makes an optimizer step. The learning rate is a pure function of the step, so it needs no state of its own."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from specdist.draft.base import DraftModel
from specdist.training.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: float, total: float) -> float:
    """The rate of step `step` (0-based) of `total`; not whole numbers where earlier steps were of another size."""
    warmup = math.ceil(config.warmup * total)
    if step < warmup:
        return config.lr * min((step + 1) / warmup, 1.0)
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        progress = (step - warmup) / max(total - warmup, 1)
        falling = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    else:
        decay = max(math.ceil(config.decay * total), 1)
        falling = min(max((total - step) / decay, 0.0), 1.0)
    return config.lr * (config.final_lr + (1 - config.final_lr) * falling)


class DraftOptimizer:
    """What changes the weights (fp32 master weights, sharded as the model is): fused AdamW, or Muon for the matrices
    between states and AdamW for the rest; and, with `optimizer.ema`, their moving average. `parts`: the optimizers of
    torch. `average`: the moving average by parameter name, in fp32 and sharded as the parameters are; None without
    one."""

    def __init__(self, model: DraftModel, config: OptimizerConfig) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._config = config
        self.parts: list[torch.optim.Optimizer] = []
        rest = trained
        if config.method == "muon":
            matrices = model.matrices()  # in one order on all ranks: Muon multiplies across them
            rest = {name: p for name, p in trained.items() if name not in matrices}
            muon = torch.optim.Muon(
                [trained[name] for name in matrices],
                lr=config.muon_lr or config.lr,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
            self.parts.append(muon)
        adam = torch.optim.AdamW(
            rest.values(), config.lr, config.betas, config.eps, weight_decay=config.weight_decay, fused=True
        )
        self.parts.append(adam)
        self._weights = trained
        self.average = {name: p.detach().clone() for name, p in trained.items()} if config.ema else None
        self.rate = config.lr
        """That of the last step, of AdamW."""

    @torch.no_grad()
    def step(self, step: float, total: float, fine: Tensor | None = None) -> None:
        """Step `step` (0-based) of `total`, see `learning_rate`; takes the gradients away. Where `fine`, bool [] on the
        device, is false, all stays as it is, momenta and moving averages too: the host need not know."""
        self.rate = learning_rate(self._config, step, total)
        for part in self.parts:
            peak = self._config.lr if isinstance(part, torch.optim.AdamW) else self._config.muon_lr or self._config.lr
            for group in part.param_groups:
                group["lr"] = self.rate * peak / self._config.lr
            if fine is None:
                part.step()
            elif isinstance(part, torch.optim.AdamW):
                part.found_inf, part.grad_scale = (~fine).float(), None  # type: ignore[attr-defined]  # as GradScaler
                part.step()
            else:
                _step_if(fine, part)
            part.zero_grad(set_to_none=True)
        if self.average is not None:
            keep = min(self._config.ema, (1 + step) / (10 + step))
            for name, weight in self._weights.items():
                share = 1 - keep if fine is None else fine * (1 - keep)
                local(self.average[name]).lerp_(local(weight), share)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside it the model's sharded weights are the moving average, if there is one."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in (self.average or {}).items():
            weight, average = local(self._weights[name]), local(average)
            held = weight.clone()
            weight.copy_(average)
            average.copy_(held)


def _step_if(fine: Tensor, muon: torch.optim.Optimizer) -> None:
    """A step of Muon, which takes no condition: where not `fine` its momentum meets itself in the place of the
    gradient, and so stays as it is, and the weights are put back."""
    weights = [p for group in muon.param_groups for p in group["params"] if p.grad is not None]
    before = [local(weight).clone() for weight in weights]
    for weight in weights:
        gradient, momentum = local(weight.grad), muon.state[weight].get("momentum_buffer")
        gradient.copy_(torch.where(fine, gradient, 0.0 if momentum is None else local(momentum)))
    muon.step()
    for weight, earlier in zip(weights, before, strict=True):
        local(weight).copy_(torch.where(fine, local(weight), earlier))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of it, where it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
