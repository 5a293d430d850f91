# SPDX-License-Identifier: Apache-2.0
"""The learning rate at the points where its shape is known."""

import math

import pytest

from specdist.core.errors import ConfigError
from specdist.training.config import OptimizerConfig
from specdist.training.optimizer import learning_rate


def rates(total=100, **settings):
    config = OptimizerConfig(lr=2.0, warmup=0.1, **settings)
    return [learning_rate(config, step, total) for step in range(total)]


def test_warmup_is_linear_and_never_zero():
    assert rates()[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])


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
    ],
)
def test_what_cannot_be(settings):
    with pytest.raises(ConfigError, match=r"optimizer\."):
        OptimizerConfig(**settings)
