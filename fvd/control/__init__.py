# SPDX-License-Identifier: Apache-2.0
"""The control socket of a served disk: JSON requests and answers, one a line. Knows volumes and errors, not NBD."""
