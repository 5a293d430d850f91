# SPDX-License-Identifier: Apache-2.0
"""The EAGLE-3 draft: config -> algorithm -> model (fuse, layer, attention, teacher, loss) -> proposer."""
