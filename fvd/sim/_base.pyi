# SPDX-License-Identifier: Apache-2.0
"""The simulated base: another value in every sector, so that a wrong offset is seen."""

def base_content(base_size: int, offset_bytes: int, length_bytes: int) -> bytes:
    """What a base of `base_size` bytes holds there. Cut off where the base ends."""
