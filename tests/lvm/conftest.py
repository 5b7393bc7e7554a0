# SPDX-License-Identifier: Apache-2.0
"""The files in `real/` need a machine with device-mapper, udev and lvm2, and root on it: `test_real_lvm.py` runs them on one."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("FVD_REAL_LVM") == "1" else ["real"]
