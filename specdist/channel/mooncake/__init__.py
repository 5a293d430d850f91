# SPDX-License-Identifier: Apache-2.0
"""The Mooncake channel: one-sided writes over RDMA or TCP into rings that the draft ranks own."""
