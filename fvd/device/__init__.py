# SPDX-License-Identifier: Apache-2.0
"""Open files and block devices, who owns them, what else lies on them, and the queues of their operations."""
