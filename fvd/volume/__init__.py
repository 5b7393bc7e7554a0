# SPDX-License-Identifier: Apache-2.0
"""What every room of a volume needs: its name, its tags, its superblocks, what it takes of memory."""
