# SPDX-License-Identifier: Apache-2.0
"""Real worlds on the CPU that something happens to at a random moment: `python -m tests.chaos --seeds 20`.

A seed chooses a world (split, colocated, two worlds), a phase, a fault and the process that it hits. Then the run is
started again until it is done. It must have lost nothing: see `tests.chaos.seed`.
"""
