# SPDX-License-Identifier: Apache-2.0
"""What tests and benchmarks drive fvd with, and nobody else: it may import fvd, fvd never imports it, and no package contains it.

Compiled by `make build`, `make checked` and `make fuzzed` (FVD_DEVTOOLS=1, setup.py).
"""
