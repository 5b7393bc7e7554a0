# SPDX-License-Identifier: Apache-2.0
"""Where storage comes from: providers of volumes, their open ends, and the allocator that makes them grow before it is needed."""
