"""Prefetched batches come in order, with their errors, and do not delay the end of a program."""

from __future__ import annotations

import itertools
import random
import threading
import time

import pytest

from llm_trainer.data.sampling.prefetch import Prefetcher


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_items_come_in_order_for_any_number_of_threads(threads: int) -> None:
    def load(number: int) -> int:
        time.sleep(random.random() * 0.002)
        return number * number

    with Prefetcher(load, 5, threads) as items:
        assert list(itertools.islice(items, 50)) == [n * n for n in range(5, 55)]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_an_error_is_raised_when_its_item_is_read(threads: int) -> None:
    def load(number: int) -> int:
        if number == 3:
            raise ValueError("item 3")
        return number

    with Prefetcher(load, 0, threads) as items:
        assert [next(items) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="item 3"):
            next(items)


def test_at_most_the_requested_number_of_items_is_loaded_ahead() -> None:
    made: list[int] = []
    with Prefetcher(lambda number: made.append(number) or number, 0, 2, ahead=3) as items:
        next(items)
        deadline = time.monotonic() + 5
        while len(made) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert sorted(made) == [0, 1, 2, 3]


def test_closing_ends_the_threads_and_the_iteration() -> None:
    before = threading.active_count()
    items = Prefetcher(lambda number: number, 0, 3)
    next(items)
    items.close()
    items.close()
    assert threading.active_count() == before
    assert list(items) == []


def test_closing_releases_a_waiting_reader_and_does_not_wait_for_a_blocked_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llm_trainer.data.sampling.prefetch._JOIN_SECONDS", 0.1)
    stuck = threading.Event()
    items: Prefetcher[bool] = Prefetcher(lambda _: stuck.wait(30), 0, 1)
    found: list[bool] = []
    reader = threading.Thread(target=lambda: found.extend(items), daemon=True)
    reader.start()
    items.close()
    reader.join(10)
    assert not reader.is_alive()
    assert found == []
    stuck.set()
