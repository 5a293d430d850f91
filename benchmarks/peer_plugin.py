# SPDX-License-Identifier: Apache-2.0
"""SpecForge's and TorchSpec's steps as algorithms of a job: `run.plugins=[benchmarks.peer_plugin]`."""

from benchmarks.peer_drafts import PEERS
from specdist.draft.registry import register

for peer in PEERS.values():
    register(peer)
