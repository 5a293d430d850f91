# SPDX-License-Identifier: Apache-2.0
"""DSpark: a block is filled in one forward, and its tokens are chosen from left to right."""
