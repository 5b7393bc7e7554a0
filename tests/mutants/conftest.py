# SPDX-License-Identifier: Apache-2.0
"""The script and its parts lie beside the tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
