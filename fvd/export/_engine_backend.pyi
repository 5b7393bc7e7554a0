# SPDX-License-Identifier: Apache-2.0
from fvd.engine._engine import Engine
from fvd.export._server import Backend

class EngineBackend(Backend):
    def __init__(self, engine: Engine) -> None: ...
