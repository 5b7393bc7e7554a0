# SPDX-License-Identifier: Apache-2.0
"""lvm2 and device-mapper through their own commands: what is there, made, extended, removed. Knows no disks."""
