"""The outbox's thread bothers nobody and loses nothing."""

import threading
import time
from collections.abc import Callable

import pytest

from sweeps.errors import RefusedError, TrackingError
from sweeps.tracking.outbox import OutboxThread

LONG = 60.0


class FakeWriter:
    """Has ``pending`` messages, and delivers as ``on_deliver`` says or all of them."""

    def __init__(self, pending: int, on_deliver: Callable[[], object] | None = None) -> None:
        self.pending = pending
        self.calls = 0
        self.called = threading.Event()
        self.on_deliver = on_deliver

    def deliver(self, *, max_secs: float | None = None) -> int:
        self.calls += 1
        try:
            if self.on_deliver is not None:
                self.on_deliver()
            taken, self.pending = self.pending, 0
            return taken
        finally:
            self.called.set()

    def count_undelivered(self) -> int:
        return self.pending


def fails(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def test_it_delivers_while_the_block_runs() -> None:
    writer = FakeWriter(3)
    with OutboxThread(writer, every_secs=LONG) as outbox:
        assert writer.called.wait(LONG)
        assert outbox.remaining is None
    assert (outbox.remaining, outbox.last_error) == (0, None)


def test_what_comes_last_is_delivered_at_the_end_without_waiting() -> None:
    writer = FakeWriter(1)
    begin = time.monotonic()
    with OutboxThread(writer, every_secs=LONG):
        assert writer.called.wait(LONG)
        writer.pending = 5
    assert writer.pending == 0
    assert time.monotonic() - begin < LONG / 2


def test_an_outage_is_waited_out() -> None:
    down = threading.Event()
    down.set()

    def answer() -> None:
        if down.is_set():
            raise TrackingError("MLflow at http://x: refused")

    writer = FakeWriter(2, answer)
    with OutboxThread(writer, every_secs=0.01) as outbox:
        assert writer.called.wait(LONG)
        while outbox.last_error is None:
            time.sleep(0.001)
        down.clear()
    assert (outbox.remaining, outbox.last_error) == (0, None)


@pytest.mark.parametrize("error", [TrackingError("away"), ValueError("a bug"), OSError("disk")])
def test_no_error_reaches_the_block_and_the_end_is_bounded(error: Exception) -> None:
    writer = FakeWriter(7, fails(error))
    begin = time.monotonic()
    with OutboxThread(writer, every_secs=0.01, flush_secs=0.5) as outbox:
        assert writer.called.wait(LONG)
    assert (outbox.remaining, outbox.last_error) == (7, error)
    assert time.monotonic() - begin < LONG / 2


def test_a_refusal_is_not_asked_again_at_the_end() -> None:
    writer = FakeWriter(1, fails(RefusedError("no such run")))
    begin = time.monotonic()
    with OutboxThread(writer, every_secs=LONG, flush_secs=LONG) as outbox:
        assert writer.called.wait(LONG)
    assert outbox.remaining == 1
    assert isinstance(outbox.last_error, RefusedError)
    assert time.monotonic() - begin < LONG / 2


def test_a_delivery_that_hangs_is_left_behind() -> None:
    release = threading.Event()
    writer = FakeWriter(4, lambda: release.wait(LONG))
    with OutboxThread(writer, flush_secs=0.1) as outbox:
        pass
    assert outbox.remaining == 4
    assert isinstance(outbox.last_error, TimeoutError)
    release.set()


class PausesTold(threading.Event):
    """Tells the pauses that a thread would make, makes none, and is set after eight."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.pauses.append(timeout)
        if len(self.pauses) == 8:
            self.set()
        return self.is_set()


def test_the_pauses_grow_while_nobody_answers() -> None:
    writer = FakeWriter(1, fails(TrackingError("away")))
    outbox = OutboxThread(writer, every_secs=0.5, max_backoff_secs=10.0, flush_secs=0.01)
    told = outbox._stop = PausesTold()  # pyright: ignore[reportPrivateUsage]
    with outbox:
        outbox._thread.join(LONG)  # pyright: ignore[reportPrivateUsage]
    before_the_first = 15.0
    assert told.pauses == [before_the_first, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0, 10.0]


def compute(seconds: float) -> None:
    begin = time.thread_time()
    while time.thread_time() - begin < seconds:
        pass


def test_the_more_a_delivery_computes_the_longer_is_the_pause_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sweeps.tracking.outbox._MAX_PAUSE_SECS", 5.0)
    writer = FakeWriter(1, lambda: compute(0.02 if writer.calls < 7 else 0.2))
    outbox = OutboxThread(writer, every_secs=0.5, flush_secs=0.0)
    told = outbox._stop = PausesTold()  # pyright: ignore[reportPrivateUsage]
    with outbox:
        outbox._thread.join(LONG)  # pyright: ignore[reportPrivateUsage]
    _, first, *others, last = told.pauses
    assert first == 0.5  # it imports MLflow
    for pause in others:
        assert pause is not None
        assert 50 * 0.02 <= pause <= 5.0
    assert last == 5.0


def test_an_error_of_the_block_goes_its_way() -> None:
    writer = FakeWriter(1)
    with pytest.raises(KeyError), OutboxThread(writer):
        raise KeyError("the sweep's own")
    assert writer.pending == 0
