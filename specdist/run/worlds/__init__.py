# SPDX-License-Identifier: Apache-2.0
"""A draft world and target worlds of their own (`world.role`): how they find each other, agree, and part."""
