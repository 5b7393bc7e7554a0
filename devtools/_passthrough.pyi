# SPDX-License-Identifier: Apache-2.0
from fvd.engine._backend import Backend

class PassThrough(Backend):
    def __init__(self, answer_only: bool = ...) -> None: ...
