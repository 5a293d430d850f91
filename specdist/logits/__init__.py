# SPDX-License-Identifier: Apache-2.0
"""What is read off the target's logits, on either side."""
