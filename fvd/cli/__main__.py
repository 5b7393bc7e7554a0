"""``python -m fvd.cli``: the same as ``fvd-lv``."""

import sys

from fvd.cli.main import main

sys.exit(main())
