# SPDX-License-Identifier: Apache-2.0
"""A transport from outside is one value and one name. tests/distributed/test_channel_contract.py holds it to the
contract, and tests/distributed/test_train.py trains over it."""

from __future__ import annotations

import pytest
import torch

from specdist.channel.registry import transport_for
from specdist.core.errors import ConfigError
from specdist.job import config as jobs
from specdist.job.config import load_job
from tests.toy_transport import ToySender


def load(*words: str) -> jobs.JobConfig:
    return load_job([], ["target.path=model", "run.dir=run", "prompts.files=[prompts.jsonl]", *words])


def test_a_plugin_adds_a_transport() -> None:
    job = load("run.plugins=[tests.toy_transport]", "channel.transport=toy")
    toy = jobs.transport(job, torch.device("cpu"))
    assert (toy.name, toy.sender, toy.one_sided) == ("toy", ToySender, True)
    assert load("run.plugins=[tests.toy_transport]", "channel.transport=toy", "world.role=draft").world.role == "draft"


def test_a_transport_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"channel\.transport=rdma: it is one of auto, gloo, mooncake, nccl"):
        load("channel.transport=rdma")
    with pytest.raises(ConfigError, match=r"channel\.transport=gloo with world\.role=draft: a process group cannot"):
        load("channel.transport=gloo", "world.role=draft")


def test_auto_takes_what_fits_the_devices() -> None:
    assert transport_for("auto", torch.device("cpu")).name == "gloo"
    assert transport_for("auto", torch.device("cuda")).name == "nccl"
