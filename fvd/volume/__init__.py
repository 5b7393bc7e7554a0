# SPDX-License-Identifier: Apache-2.0
"""What every package above needs of a volume: its name, its tags, its superblocks, what it takes of memory."""
