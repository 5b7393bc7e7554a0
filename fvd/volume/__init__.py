# SPDX-License-Identifier: Apache-2.0
"""Floor 4: the life of a disk (provision, open, grow, close, remove) and what an administrator sees of it."""
