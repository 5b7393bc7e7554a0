# SPDX-License-Identifier: Apache-2.0
"""The request state machine: batches in, batches out. It may not know files, sockets, clocks or threads; see docs/internals/engine.md."""
