# SPDX-License-Identifier: Apache-2.0
"""The public Python API, re-exported by ``import fvd``. Composes volumes, NBD exports and control sockets; knows no command line.

The layers below are imported by the functions that need them, when they are called: `import fvd` stays free of work.
"""
