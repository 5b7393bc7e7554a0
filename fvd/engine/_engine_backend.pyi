# SPDX-License-Identifier: Apache-2.0
from fvd.engine._backend import Backend
from fvd.engine._engine import Engine

class EngineBackend(Backend):
    def __init__(self, engine: Engine) -> None: ...
