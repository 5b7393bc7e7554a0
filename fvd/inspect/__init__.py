# SPDX-License-Identifier: Apache-2.0
"""What an administrator sees of a disk: info, map, check, dump, picture. Changes nothing."""
