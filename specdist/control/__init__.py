# SPDX-License-Identifier: Apache-2.0
"""The control plane: small typed messages between every rank and the scheduler on rank 0, over ZeroMQ."""
