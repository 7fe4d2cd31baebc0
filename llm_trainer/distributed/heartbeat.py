"""Heartbeats between the ranks of a run: a rank that dies or hangs ends the run, with an error that names it.

A rank that is killed, stopped or unreachable would leave the others waiting for half an hour in their next
all-reduce. Therefore each rank counts up in the launcher's key-value store, a thread on every rank watches
the other counters, and the run aborts when a counter stops. The alternative, a short timeout on collectives,
cannot distinguish a dead rank from a slow save, and does not know which rank it is.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # public, and not in the stubs

_BEAT_SECONDS = 0.5
_ABORT_CODE = 1
_RESUME = "Resume from the newest checkpoint with --resume auto"


class Heartbeat:
    """Sends this rank's heartbeat and watches the others' in a thread; aborts the process when one stops.

    Args:
        store: The launcher's key-value store, over a connection that nothing else waits on.
        rank: This process.
        world_size: The number of processes in the run.
        timeout_seconds: How long a rank may be silent before the run aborts.
    """

    def __init__(self, store: Store, rank: int, world_size: int, timeout_seconds: float) -> None:
        self._store, self._rank, self._timeout = store, rank, timeout_seconds
        self._others = [other for other in range(world_size) if other != rank]
        self._last_beats: dict[int, tuple[str, float]] = {}
        self._stopped = threading.Event()
        self._rounds = 0
        self._store.set(_key("beat", rank), "0")
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch_store, name="heartbeat-store", daemon=True).start()

    def stop(self, *, finished: bool = False) -> None:
        """Stop the heartbeat.

        Args:
            finished: Also report to the other ranks that this one ended normally.
        """
        self._stopped.set()
        if self._thread is not threading.current_thread():
            # A thread that is inside the store when the interpreter ends would abort the process.
            self._thread.join(self._timeout)
        if finished:
            self._set("beat", "left")

    def report_failure(self, error: Exception) -> None:
        """Report to the other ranks why this rank ends."""
        self._set("failed", json.dumps({"kind": type(error).__name__, "message": str(error)}))

    def failure_of(self, rank: int, seconds: float) -> str | None:
        """Return the error message of a rank as soon as it reports one, or None after so many seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if (failure := self._get("failed", rank)) is not None:
                return str(json.loads(failure)["message"])
            time.sleep(_BEAT_SECONDS / 5)
        return None

    def describe_lost_rank(self) -> str:
        """Return a message that names the rank that ended; waits until one has been silent long enough."""
        end = time.monotonic() + self._timeout
        while time.monotonic() < end:
            for rank in self._others:
                if (failure := self._get("failed", rank)) is not None:
                    return f"rank {rank} failed: {json.loads(failure)['message']}"
            silent = self._silent_for(self._timeout / 2)
            if silent:
                return f"{_rank_names(silent)} died or cannot be reached; the run is aborted. {_RESUME}"
            time.sleep(_BEAT_SECONDS / 5)
        return f"the connection to another rank broke. {_RESUME}"

    def _run(self) -> None:
        count = 0
        while not self._stopped.wait(_BEAT_SECONDS):
            count += 1
            try:
                self._set("beat", str(count))
                self._read_beats()
            except (RuntimeError, ConnectionError):
                self._abort(f"the launcher of rank {self._rank} cannot be reached any more. {_RESUME}")
            self._rounds = count
            silent = self._silent_for(self._timeout)
            if silent:
                self._abort(
                    f"no heartbeat from {_rank_names(silent)} for {self._timeout:g} s; "
                    f"the run is aborted. {_RESUME}"
                )

    def _watch_store(self) -> None:
        """Abort when the store does not answer.

        A store behind a broken network neither answers nor fails: no call to it returns, and `_run` hangs.
        The wait is counted in rounds, not measured in seconds, so that a process that was itself stopped for
        a while and then continues does not blame the store.
        """
        known, waits = -1, 0
        while not self._stopped.wait(_BEAT_SECONDS):
            waits = waits + 1 if known == self._rounds else 0
            known = self._rounds
            if waits * _BEAT_SECONDS >= self._timeout:
                self._abort(
                    f"the launcher of rank {self._rank} cannot be reached: "
                    f"no answer for {self._timeout:g} s. {_RESUME}"
                )

    def _read_beats(self) -> None:
        for rank in self._others:
            beat = self._get("beat", rank) or ""
            if beat != self._last_beats.get(rank, ("never", 0.0))[0]:
                self._last_beats[rank] = (beat, time.monotonic())

    def _silent_for(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [
            rank
            for rank, (beat, when) in list(self._last_beats.items())
            if beat not in ("left", "") and now - when > seconds
        ]

    def _abort(self, message: str) -> None:
        if not self._stopped.is_set():
            print(f"error: rank {self._rank}: {message}", file=sys.stderr, flush=True)
            os._exit(_ABORT_CODE)  # the main thread is inside a collective that will not return

    def _set(self, kind: str, value: str) -> None:
        self._store.set(_key(kind, self._rank), value)

    def _get(self, kind: str, rank: int) -> str | None:
        key = _key(kind, rank)
        return self._store.get(key).decode() if self._store.check([key]) else None


def _key(kind: str, rank: int) -> str:
    return f"llm-trainer/{kind}/{rank}"


def _rank_names(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
