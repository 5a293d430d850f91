# SPDX-License-Identifier: Apache-2.0
"""DFlash: a block is filled in one forward, each of its tokens on its own."""
