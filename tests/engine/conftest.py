# SPDX-License-Identifier: Apache-2.0
"""The engine's tests share stage.py and scenarios.py, which lie beside them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
