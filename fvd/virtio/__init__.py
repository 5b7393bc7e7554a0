# SPDX-License-Identifier: Apache-2.0
"""Virtio: a guest's memory (_guest_memory), a ring of its disk (_blk_ring), and what vhost-user says of both (messages), without I/O."""
