# SPDX-License-Identifier: Apache-2.0
"""Bytes and their meaning: geometry, superblock, maps, journal. The code of FORMAT.md.

Pure: knows no files, no devices, no time and no randomness.
"""
