# SPDX-License-Identifier: Apache-2.0
"""The learning rate at the points where its shape is known; what Muon takes, and the moving average."""

import math

import pytest
import torch

from specdist.core.errors import ConfigError
from specdist.training.config import OptimizerConfig
from specdist.training.optimizer import DraftOptimizer, learning_rate
from tests.unit import dspark_reference, eagle3_reference


def rates(total=100, **settings):
    config = OptimizerConfig(lr=2.0, warmup=0.1, **settings)
    return [learning_rate(config, step, total) for step in range(total)]


def test_warmup_is_linear_and_never_zero():
    assert rates()[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])


def test_a_warmup_between_whole_steps_never_passes_the_peak():
    config = OptimizerConfig(lr=2.0, warmup=0.1)
    assert learning_rate(config, 8.5, 100) == pytest.approx(1.9)
    assert learning_rate(config, 9.5, 100) == 2.0


def test_cosine_falls_from_the_peak_to_the_end():
    found = rates(final_lr=0.1)
    assert found[10] == pytest.approx(2.0)
    assert found[55] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert found[99] == pytest.approx(2.0 * (0.1 + 0.45 * (1 + math.cos(math.pi * 89 / 90))))
    assert found[10:] == sorted(found[10:], reverse=True)


def test_wsd_is_flat_and_then_linear():
    found = rates(schedule="wsd", decay=0.2)
    assert found[10:81] == [2.0] * 71
    assert found[90] == pytest.approx(1.0)
    assert found[99] == pytest.approx(0.1)


def test_constant_stays():
    assert set(rates(schedule="constant")[10:]) == {2.0}


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0.0},
        {"warmup": 1.5},
        {"schedule": "wsd", "warmup": 0.6, "decay": 0.6},
        {"clip_norm": -1.0},
        {"weight_decay": -0.1},
        {"eps": -1e-8},
        {"betas": (0.9, 1.0)},
        {"muon_lr": 1e-3},
        {"ema": 1.0},
    ],
)
def test_what_cannot_be(settings):
    with pytest.raises(ConfigError, match=r"optimizer\."):
        OptimizerConfig(**settings)


def test_muon_takes_the_matrices_between_states():
    draft = eagle3_reference.build_case(fc_norm=True).draft
    layers = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    assert sorted(draft.matrices()) == sorted(["fc.weight", *(f"midlayer.{name}.weight" for name in layers)])
    blocks = dspark_reference.build_case().draft
    assert {name.split(".")[0] for name in blocks.matrices()} == {"fc", "layers"}


def test_a_step_of_muon_is_orthogonal_and_as_large_as_adamws():
    case = eagle3_reference.build_case(dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in case.draft.named_parameters()}
    eagle3_reference.run(case)[0].backward()
    optimizer = DraftOptimizer(case.draft, OptimizerConfig(method="muon", lr=1e-3, muon_lr=2e-3, warmup=0.0))
    optimizer.step(0, 10)
    for name, weight in case.draft.named_parameters():
        change = (weight.detach() - before[name]) / 1e-3
        if name in case.draft.matrices():
            values = torch.linalg.svdvals(change) / (2 * 0.2 * max(change.shape) ** 0.5)
            assert 0.3 < values.mean() < 1.3
        else:
            assert change.abs().max() <= 1.001
    assert all(p.grad is None for p in case.draft.parameters())


def test_the_moving_average_forgets_the_beginning():
    draft = eagle3_reference.build_case(dtype=torch.float32).draft
    optimizer = DraftOptimizer(draft, OptimizerConfig(ema=0.5))
    expected, weight = draft.norm.weight.detach().clone(), draft.norm.weight
    for step in range(12):
        with torch.no_grad():
            weight.fill_(step)
        optimizer.step(step, 12)
        keep = min(0.5, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * step
    with optimizer.averaged():
        torch.testing.assert_close(weight.detach(), expected)
        assert not draft.state_dict()["norm.weight"].eq(11).any()
    assert weight.eq(11).all()


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_a_step_whose_gradients_are_not_finite_is_as_if_it_had_not_been(method):
    weights = []
    for steps in ((0, 2, 4), range(5)):
        case = eagle3_reference.build_case(dtype=torch.float32)
        optimizer = DraftOptimizer(case.draft, OptimizerConfig(method=method, warmup=0.0, ema=0.5, lr=0.01))
        for step in steps:
            eagle3_reference.run(case)[0].backward()
            for p in case.draft.parameters() if step % 2 else ():
                p.grad.fill_(torch.nan)
            optimizer.step(step, 10, torch.tensor(step % 2 == 0))
        states = [value for part in optimizer.parts for state in part.state.values() for value in state.values()]
        weights.append([*case.draft.parameters(), *optimizer.average.values(), *states])
    assert len(weights[0]) == len(weights[1])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
