# SPDX-License-Identifier: Apache-2.0
"""The life of a disk: provision, open and recovery, extend, close, remove; and one moment of it, to look at."""
