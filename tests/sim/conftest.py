# SPDX-License-Identifier: Apache-2.0
"""The directed scenarios lie beside the engine's tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
