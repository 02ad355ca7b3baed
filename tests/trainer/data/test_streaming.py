"""Rows come in order and whole, are read ahead within bounds, and threads end."""

import itertools
import threading
import time

import numpy as np
import pytest

from tests.trainer.data.prepared import IMAGES, LABELS, examples, prepare
from trainer.config import DataConfig
from trainer.data import datasets
from trainer.data.streaming import stream
from trainer.errors import DatasetError

SHAPE = (2, 3, 1)


class Numbered:
    """Example i is an image of i everywhere, with the label i."""

    image_shape = SHAPE

    def __init__(self, delay=lambda positions: 0.0):
        self.delay = delay
        self.threads = set()

    def read_into(self, positions, images, labels):
        self.threads.add(threading.get_ident())
        time.sleep(self.delay(positions))
        images[:] = positions[:, None, None, None]
        labels[:] = positions


def rows_of(*sizes, capacity=7):
    """Rows with so many examples each, numbered from 1 on, and padded."""
    numbers = itertools.count(1)
    for size in sizes:
        row = np.full(capacity, -1, np.int32)
        row[:size] = list(itertools.islice(numbers, size))
        yield row


def check(found, row):
    expected = np.maximum(row, 0)
    assert found.images.shape == (*row.shape, *SHAPE)
    assert (found.images.dtype, found.labels.dtype) == (np.float32, np.int32)
    assert np.array_equal(found.labels, expected)
    assert (found.images == expected[..., None, None, None]).all()


def running():
    return {thread for thread in threading.enumerate() if "grain" in thread.name}


@pytest.fixture(autouse=True)
def no_thread_stays():
    before = running()
    yield
    deadline = time.monotonic() + 10
    while running() - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not running() - before


@pytest.mark.parametrize("num_threads", [1, 3, 16])
@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_order_and_content(prefetch, num_threads):
    sizes = [7, 0, 3, 7, 1, 5] * 5
    # What comes first takes longest, so that threads overtake each other.
    examples = Numbered(lambda positions: 0.002 / (1 + positions[0] % 5))
    found = list(stream(examples, rows_of(*sizes), prefetch=prefetch, num_threads=num_threads))
    assert len(found) == len(sizes)
    for examples_of_row, row in zip(found, rows_of(*sizes), strict=True):
        check(examples_of_row, row)


def test_padding_anywhere_and_rows_of_two_dimensions():
    row = np.array([[4, -1, 7], [-1, -1, -1], [-1, 2, -1], [5, 6, 8]])
    (found,) = stream(Numbered(), [row], num_threads=2)
    check(found, row)


def test_no_rows():
    assert list(stream(Numbered(), [])) == []


def test_several_threads_of_this_process_read():
    examples = Numbered(lambda _: 0.01)
    list(stream(examples, rows_of(*[7] * 8), num_threads=4))
    assert len(examples.threads) > 1
    assert threading.get_ident() not in examples.threads


@pytest.mark.parametrize("prefetch", [1, 3])
def test_rows_are_drawn_as_needed_and_read_ahead(prefetch):
    drawn = itertools.count()
    number = 0

    def endless():
        nonlocal number
        while True:
            number = next(drawn) + 1
            yield np.full(4, number, np.int32)

    examples = stream(Numbered(), endless(), prefetch=prefetch, num_threads=2)
    assert number == 0
    for returned in range(1, 20):
        assert next(examples).labels[0] == returned
        assert number <= returned + prefetch
    deadline = time.monotonic() + 10
    while number < 19 + prefetch and time.monotonic() < deadline:
        time.sleep(0.001)  # read ahead, while this thread does something else
    assert number == 19 + prefetch
    examples.close()


def test_an_error_of_a_thread_comes_out_after_the_rows_before_it():
    def fail(positions):
        if 11 in positions:
            raise DatasetError("damaged")
        return 0.0

    examples = stream(Numbered(fail), rows_of(7, 7, 7), num_threads=2)
    check(next(examples), next(rows_of(7)))
    with pytest.raises(DatasetError, match="damaged"):
        next(examples)
    with pytest.raises(StopIteration):
        next(examples)


def test_what_another_error_says_is_not_shown():
    def fail(positions):
        raise ValueError(f"secret {positions}")

    with pytest.raises(DatasetError, match=r"cannot be read \(ValueError\)$") as caught:
        list(stream(Numbered(fail), rows_of(7)))
    assert caught.value.__cause__ is caught.value.__context__ is None


@pytest.mark.parametrize("num_threads", [1, 4])
def test_an_error_of_the_rows_comes_out_as_it_is(num_threads):
    def rows():
        yield from rows_of(3, 3)
        raise RuntimeError("no more keys")

    examples = stream(Numbered(), rows(), num_threads=num_threads)
    assert [next(examples).labels[0], next(examples).labels[0]] == [1, 4]
    with pytest.raises(RuntimeError, match="no more keys"):
        next(examples)


def test_closing_early_stops_drawing():
    drawn = []

    def endless():
        for number in itertools.count():
            drawn.append(number)
            yield np.full(4, number, np.int32)

    examples = stream(Numbered(lambda _: 0.005), endless(), prefetch=4, num_threads=2)
    next(examples)
    examples.close()
    time.sleep(0.05)
    after = len(drawn)
    time.sleep(0.05)
    assert len(drawn) == after <= 6


def test_examples_of_files(tmp_path):
    prepare(tmp_path, splits={"train": examples()[:24], "test": examples()[24:]})
    config = DataConfig(name="shapes", scaling="divide_by_255")
    opened = datasets.open_examples(config, tmp_path)
    rng = np.random.default_rng(0)
    rows = [np.where(rng.random(9) < 0.7, rng.integers(0, 24, 9), -1) for _ in range(20)]
    streamed = stream(opened.train, rows, num_threads=4)
    for found, row in zip(streamed, rows, strict=True):
        taken = row >= 0
        assert np.array_equal(np.rint(found.images[taken] * 255), IMAGES[row[taken]])
        assert np.array_equal(found.labels[taken], LABELS[row[taken]])
        assert not found.images[~taken].any()
        assert not found.labels[~taken].any()


def test_a_position_outside_is_an_error_that_does_not_show_it(tmp_path):
    prepare(tmp_path)
    opened = datasets.open_examples(DataConfig(name="shapes"), tmp_path)
    with pytest.raises(DatasetError, match=r"^an example cannot be read \(IndexError\)$"):
        list(stream(opened.train, [np.array([1, 24])]))


@pytest.mark.parametrize("bad", [{"prefetch": 0}, {"num_threads": 0}])
def test_numbers_below_one_are_refused_at_once(bad):
    with pytest.raises(ValueError, match="at least 1"):
        stream(Numbered(), [], **bad)
