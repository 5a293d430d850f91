# SPDX-License-Identifier: Apache-2.0
"""The parallel groups of SGLang, as every rank of the world has to know them. Imports nothing of SGLang."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from specdist.core.engine_groups import EngineGroups
from specdist.target.sglang import adapter


def sglang_groups(replicas: Sequence[Sequence[int]], ep: int, device: torch.device) -> EngineGroups:
    """The groups for `replicas`, lists of equally many ranks, with `ep` expert-parallel ranks in each."""
    lists = adapter.group_lists(replicas, ep)
    backends = (adapter.backend(device), "gloo")  # a coordinator has a group of each
    calls = [(ranks, backend) for _, divided in lists for ranks in divided for backend in backends]
    return EngineGroups(calls, partial(adapter.make_coordinators, lists, device, ep))
