# SPDX-License-Identifier: Apache-2.0
"""What all tests start from."""

from __future__ import annotations

import signal

# A shell's background job ignores SIGINT, and whatever it starts inherits that; the tests are about being interrupted.
signal.signal(signal.SIGINT, signal.default_int_handler)
