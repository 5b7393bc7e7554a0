# SPDX-License-Identifier: Apache-2.0
"""Copying of a world's base: the real Copying with its steering on the device's clock, and the end of the base, which is then taken away.

Judged: what events and status tell, that nothing reads the base when it is given up, that copying comes to its end when nothing hinders it.
Knows neither requests nor the oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fvd.base.copying import BaseEvent, Copying, FoundProfile
from fvd.base.options import PrefetchOptions
from fvd.engine._engine import Want
from fvd.format.geometry import Geometry
from fvd.sim._device import BASE, SimulatedDevice
from fvd.sim._oracle import Violation
from fvd.sim._rng import Rng

TICK_NS = 250_000_000  # a driver's, while there is something to steer
TICKS_MAX = 4 * 1800  # from faults' end to the end of copying: a pause is at most 45 s, and what is left a few MiB
STATES = ("off", "delayed", "running", "yielding", "paused", "full", "base-lost", "done")


class Copies:
    """Through all lives of a world. `gone`: the base was given up, and whoever owns it has deleted it."""

    def __init__(self, device: SimulatedDevice, geometry: Geometry, base_bytes: int, rng: Rng, say: Callable[[str], None]) -> None:
        self._device, self._geometry, self._base_bytes, self._rng, self._say = device, geometry, base_bytes, rng, say
        self.gone = False
        self.copying: Copying | None = None
        self._found: list[str] = []

    # --- a life -------------------------------------------------------------------------------------------------------

    def begin_life(self, engine: Any) -> None:
        """A disk whose base is open."""
        self._engine = engine
        self._running = self._lost = self._released = self._done = False
        self._copied_bytes = 0
        engine.prefetch_idle_ns = self._rng.choice((0, 1_000_000, 20_000_000))
        self.copying = Copying(
            engine,
            volume_name="the simulated disk",
            virtual_size_bytes=self._geometry.virtual_size_bytes,
            base_size_bytes=self._base_bytes,
            base_locator="nbd://base",
            block_size_bytes=self._geometry.block_size_bytes,
            release=self._release,
            on_event=self._hear,
            clock_ns=lambda: self._device.now_ns,
            random=_Uniform(self._rng),
        )
        if self._rng.random() < 0.7:
            self.start(self._rng)

    def end_life(self) -> None:
        self.copying = None

    def attend(self) -> None:
        if self.copying is not None:
            self.copying.on_want(self._engine.want & (Want.STEER | Want.BASE))
        self.raise_found()

    def start(self, rng: Rng, *, hasty: bool = False) -> None:
        """Somebody wants the base prefetched. `hasty`: as fast as may be."""
        if self.copying is None:
            return
        options = PrefetchOptions(0.0, 0)
        if not hasty:
            options = PrefetchOptions(rng.choice((0.0, 0.01, 10.0)), rng.choice((0, 0, 1_000_000, 10_000_000)))
        extents: list[tuple[int, int]] = []
        for _ in range(rng.choice((0, 0, 1, 5))):
            offset = rng.randint(0, self._base_bytes - 1)
            extents.append((offset, rng.randint(1, self._base_bytes - offset)))
        self.copying.start(options, FoundProfile("/a profile" if extents else None, tuple(extents)))

    def disturb(self, rng: Rng) -> None:
        """An administrator."""
        copying = self.copying
        if copying is None:
            return
        pick = rng.random()
        if pick < 0.4:
            self.start(rng)
        elif pick < 0.6:
            copying.stop()
        elif pick < 0.8:
            copying.set_copy_on_read(not self._engine.copy_on_read)
        self.check()

    # --- what is told -------------------------------------------------------------------------------------------------

    def _release(self) -> None:
        if any(operation.target == BASE for operation in self._device.pending):
            self._found.append("the base is given up while it is being read")
        self._say("the base is given up, and gone")
        self.gone = self._released = True
        self._device.base_closed = True

    def _hear(self, event: BaseEvent) -> None:
        self._say(f"event {event.kind}: {event.copied_bytes} of {event.total_bytes}")
        wrong = self._judge(event)
        if wrong:
            self._found.append(f"the event {event.kind} {wrong}: {event}")

    def _judge(self, event: BaseEvent) -> str:
        if event.total_bytes != min(self._base_bytes, self._geometry.virtual_size_bytes):
            return "tells another size of the base"
        if not self._copied_bytes <= event.copied_bytes <= event.total_bytes:
            return "tells of less than there was, or more than there is"
        self._copied_bytes = event.copied_bytes
        if event.eta_seconds is not None and event.eta_seconds < 0:
            return "ends before now"
        if event.kind == "prefetch_started":
            self._running, self._done = True, False
        elif event.kind in ("prefetch_progress", "prefetch_stopped", "prefetch_done"):
            if not self._running:
                return "comes though nothing is prefetched"
            self._running = event.kind == "prefetch_progress"
            self._done = event.kind == "prefetch_done"
            if self._done and event.copied_bytes < event.total_bytes:
                return "comes before everything has been copied"
        elif event.kind == "base_released":
            if not self._released or self._running or not self._engine.base_released:
                return "comes before the base has been given up"
        elif (event.kind == "base_lost") == self._lost or self._engine.base_failing != (event.kind == "base_lost"):
            return "says what is not so"
        else:
            self._lost = event.kind == "base_lost"
        return ""

    def raise_found(self) -> None:
        if self._found:
            raise Violation("; ".join(self._found))

    def check(self) -> None:
        """What status says."""
        self.raise_found()
        if self.copying is None:
            return
        status = self.copying.status()
        total = min(self._base_bytes, self._geometry.virtual_size_bytes)
        wrong = (
            status["state"] not in STATES
            or (not status["reason"] and status["state"] not in ("off", "running"))
            or status["copied_bytes"] + status["remaining_bytes"] != total
            or status["released"] != self._released
            or any(value < 0 for value in status.values() if isinstance(value, int | float))
        )
        if wrong:
            raise Violation(f"the state of copying makes no sense: {status}")

    # --- to the end ---------------------------------------------------------------------------------------------------

    def finish(self, tick: Callable[[], None], *, grows: bool) -> None:
        """Nothing hinders copying any more: it goes on to its end, and the base is given up. `tick()` lets a quarter of a second pass, with
        all that comes of it; `grows`: storage that is asked for comes. Raises Violation."""
        copying = self.copying
        if copying is None:
            return
        if not self._running:
            self.start(self._rng, hasty=True)
        began_bytes = self._engine.base_remaining_bytes
        for _ in range(TICKS_MAX):
            if self._released:
                break
            tick()
            self.check()
            if not grows and copying.status()["state"] == "full":
                return
            if self._engine.failed_errno:  # a page was lost before, and a flush has heard of it: nothing is copied any more
                return
        else:
            raise Violation(f"copying does not come to its end: {began_bytes} bytes were left, and now {copying.status()}")


class _Uniform:
    def __init__(self, rng: Rng) -> None:
        self._rng = rng

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self._rng.random()
