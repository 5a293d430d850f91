# SPDX-License-Identifier: Apache-2.0
"""The page of one or several runs: what their directories hold, its charts and tables, and the HTML file of them."""
