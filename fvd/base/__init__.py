# SPDX-License-Identifier: Apache-2.0
"""What shows through where a disk has no block of its own: the base, and how it is copied."""
