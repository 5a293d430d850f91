# SPDX-License-Identifier: Apache-2.0
"""What drafts of all algorithms are made of."""
