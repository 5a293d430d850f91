# SPDX-License-Identifier: Apache-2.0
"""DFlash: a block of tokens in one forward, conditioned on the target's hidden states."""
