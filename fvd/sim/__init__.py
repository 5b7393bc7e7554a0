# SPDX-License-Identifier: Apache-2.0
"""The simulated disk and the tester: owns the order of every event and every crash, and knows what the contract allows.

For tests and ``fvd-lv torture`` only: it may import anything up to the engine and the volume's recovery, and nothing else imports it.
See docs/internals/simulation.md.
"""
