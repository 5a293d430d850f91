# SPDX-License-Identifier: Apache-2.0
"""The DFlash draft: config -> algorithm -> model (blocks, layer, attention, ops, loss) -> proposer."""
