# SPDX-License-Identifier: Apache-2.0
"""NBD. The protocol without I/O (handshake, _nbd), the serving loop (_server), and the server as Python sees it (server)."""
