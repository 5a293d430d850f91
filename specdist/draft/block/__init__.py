# SPDX-License-Identifier: Apache-2.0
"""What drafts have in common that fill a block of masked tokens in one forward."""
