"""Loads batches in threads before the step that needs them, in an order that does not depend on the threads.

It uses threads, not processes: loading a batch is numpy copying from memory maps, which holds the
interpreter's lock for microseconds, and a thread costs neither start-up time nor pickling. Each thread takes
the next number, loads that batch and stores it under its number; the reader waits for the number it needs
next.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")
_JOIN_SECONDS = 2.0


class Prefetcher(Generic[Item]):
    """Iterates over `load(first)`, `load(first + 1)`, … without end.

    An exception in `load` is raised in the reader when it reaches that item. `close()`, or leaving the `with`
    block, stops the threads; it waits at most two seconds for a load in progress, and never for the reader.
    """

    def __init__(
        self, load: Callable[[int], Item], first: int, threads: int, ahead: int | None = None
    ) -> None:
        """Start the threads.

        Args:
            load: Loads the item with a number; called from several threads.
            first: Number of the first item.
            threads: Number of threads; 0 loads each item when it is read.
            ahead: Most items that are loaded and not yet read; twice the threads by default.
        """
        self._load = load
        self._next_read = self._next_load = first
        self._ahead = ahead or 2 * threads
        self._ready: dict[int, Item | BaseException] = {}
        self._changed = threading.Condition()
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"prefetch-{n}", daemon=True) for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self._is_closed:
            raise StopIteration
        if not self._threads:
            item = self._load(self._next_read)
            self._next_read += 1
            return item
        with self._changed:
            self._changed.wait_for(lambda: self._next_read in self._ready or self._is_closed)
            if self._is_closed:
                raise StopIteration
            found = self._ready.pop(self._next_read)
            self._next_read += 1
            self._changed.notify_all()
        if isinstance(found, BaseException):
            self.close()
            raise found
        return found

    def close(self) -> None:
        """Stop the threads. It may be called several times and from any thread."""
        with self._changed:
            self._is_closed = True
            self._ready.clear()
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_JOIN_SECONDS)

    def __enter__(self) -> Prefetcher[Item]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._is_closed or self._next_load < self._next_read + self._ahead
                )
                if self._is_closed:
                    return
                number = self._next_load
                self._next_load += 1
            try:
                loaded: Item | BaseException = self._load(number)
            except BaseException as error:  # raised in the reader, whatever it is
                loaded = error
            with self._changed:
                self._ready[number] = loaded
                self._changed.notify_all()
            if isinstance(loaded, BaseException):
                return
