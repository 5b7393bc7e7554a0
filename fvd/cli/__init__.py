# SPDX-License-Identifier: Apache-2.0
"""The command ``fvd-lv``: one command per file, over the public Python API and nothing below it."""
