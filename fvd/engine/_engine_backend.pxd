# SPDX-License-Identifier: Apache-2.0
"""An engine behind the backend's interface, for compiled callers."""

from fvd.engine._backend cimport Backend
from fvd.engine._engine cimport Engine


cdef class EngineBackend(Backend):
    cdef Engine engine
