"""Batches of a data set that does not fit on the device, read ahead of their use.

`stream` turns rows of positions into rows of examples. Grain's prefetching iterator hands parts
of the next rows to threads of this process, in order, while the caller computes. Threads and not
processes: which positions are in a row follows from a secret key, so rows are passed by reference
and never written to a file, a pipe or a socket.

Rows are drawn from the caller's iterable as they are needed, in order, one at a time; no more are
in memory than are read ahead and the one that is being handed out.
"""

import contextlib
import dataclasses
import sys
import threading
from collections.abc import Generator, Iterable
from typing import Protocol

import grain
import numpy as np

from trainer.data.reading import Examples, num_cpus
from trainer.errors import DatasetError


class Readable(Protocol):
    """Examples by position, as `trainer.data.reading.ExampleReader` reads them."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        ...

    def read_into(self, positions: np.ndarray, images: np.ndarray, labels: np.ndarray) -> None:
        """Reads examples into arrays of their length; several threads may call it."""
        ...


def stream(
    examples: Readable,
    rows: Iterable[np.ndarray],
    *,
    prefetch: int = 2,
    num_threads: int | None = None,
) -> Generator[Examples]:
    """Reads rows of examples in order, the next ones while the caller works on one.

    Threads start with the first row that is asked for and end when the last has been handed out,
    with an error, or when the generator is closed: close it (``contextlib.closing``) where it is
    not used up.

    Args:
        examples: What the positions are of.
        rows: Integers ``[capacity]``, or of any other shape that all rows have: positions, and
            -1 for slots without an example. Drawn by a thread of the stream, one at a time.
        prefetch: Rows that are read ahead, >= 1.
        num_threads: Threads that read, >= 1; None is one for each CPU.

    Yields:
        For each row ``images`` float32 ``[capacity, height, width, channels]`` and ``labels``
        int32 ``[capacity]``, with zeros in slots without an example. They are the caller's.

    Raises:
        DatasetError: An example cannot be read. What ``rows`` itself raises comes out as it is.
        ValueError: ``prefetch`` or ``num_threads`` is less than 1.
    """
    threads = num_cpus() if num_threads is None else num_threads
    if prefetch < 1 or threads < 1:
        raise ValueError(f"prefetch={prefetch}, num_threads={threads}: allowed is at least 1")
    return _stream(_Parts(examples, rows, threads), prefetch, threads)


def _stream(parts: "_Parts", prefetch: int, threads: int) -> Generator[Examples]:
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch * threads)
    dataset = grain.MapDataset.source(parts).to_iter_dataset(options)
    # The parts are closed first, so that what waits in Grain's queue has nothing left to do.
    with contextlib.closing(iter(dataset)) as filled, contextlib.closing(parts):
        while True:
            found = [next(filled) for _ in range(threads)]
            error = next((part for part in found if isinstance(part, Exception)), None)
            if error is not None:
                raise error
            row = found[0]
            if not isinstance(row, _Row):
                return
            yield row.examples
            del found, row  # They are the caller's alone now.


@dataclasses.dataclass(frozen=True, eq=False)
class _Row:
    """A row of positions and the arrays that its examples are read into."""

    positions: np.ndarray
    examples: Examples


# Stands in the place of every part after the last; Grain itself would pass over None.
_END = object()


class _Parts:
    """The parts of all rows, as a Grain source: part i of row r has the index r * per_row + i.

    Each part is asked for once, and parts of one row by several threads. An error is handed over
    in the place of a part, for Grain would add to it and show it in its own words.
    """

    def __init__(self, examples: Readable, rows: Iterable[np.ndarray], per_row: int) -> None:
        self._examples, self._rows, self._per_row = examples, iter(rows), per_row
        self._lock = threading.Lock()
        # Rows that were drawn and have parts that nobody asked for, with the number of those.
        self._open: dict[int, tuple[_Row, int]] = {}
        self._drawn = 0
        # What every part after the last is: `_END`, or the error with which the rows ended.
        self._end: object = None

    def __len__(self) -> int:
        return sys.maxsize  # How many rows there are shows when they end.

    def __getitem__(self, index: int) -> object:
        number, part = divmod(index, self._per_row)
        row = self._row(number)
        if not isinstance(row, _Row):
            return row
        try:
            _fill(self._examples, row, part, self._per_row)
        except DatasetError as error:
            return error
        except Exception as error:
            # Neither its message nor its chain: they may quote an example or a position.
            return DatasetError(f"an example cannot be read ({type(error).__name__})")
        return row

    def close(self) -> None:
        """Lets parts that are still asked for be empty, and drops what was drawn."""
        with self._lock:
            self._end = _END
            self._open.clear()

    def _row(self, number: int) -> object:
        """A row on behalf of one of its parts, drawn if need be; else what ended the rows."""
        with self._lock:
            while self._drawn <= number and self._end is None:
                self._draw()
            if number not in self._open:
                return self._end
            row, left = self._open.pop(number)
            if left > 1:
                self._open[number] = (row, left - 1)
            return row

    def _draw(self) -> None:
        try:
            positions = np.asarray(next(self._rows))
        except StopIteration:
            self._end = _END
            return
        except Exception as error:
            self._end = error
            return
        # Zeros stay where a slot is without an example.
        images = np.zeros((*positions.shape, *self._examples.image_shape), np.float32)
        empty = Examples(images=images, labels=np.zeros(positions.shape, np.int32))
        self._open[self._drawn] = (_Row(positions, empty), self._per_row)
        self._drawn += 1


def _fill(examples: Readable, row: _Row, part: int, per_row: int) -> None:
    """Reads one of the parts into which a row's slots are divided."""
    size = -(-row.positions.size // per_row)
    slots = slice(part * size, (part + 1) * size)
    wanted = row.positions.reshape(-1)[slots]
    images = row.examples.images.reshape(-1, *examples.image_shape)[slots]
    labels = row.examples.labels.reshape(-1)[slots]
    taken = np.flatnonzero(wanted >= 0)
    count = len(taken)
    if not count:
        return
    if taken[-1] == count - 1:  # Padding behind the examples: they are read to where they stay.
        examples.read_into(wanted[:count], images[:count], labels[:count])
        return
    found = Examples(
        images=np.empty((count, *examples.image_shape), np.float32),
        labels=np.empty(count, np.int32),
    )
    examples.read_into(wanted[taken], found.images, found.labels)
    images[taken], labels[taken] = found.images, found.labels
