"""Whose an example is: a person's examples in a split, for privacy of whole people.

A feature of the data set names the person, as a text or a whole number. Those names are private
and stay in here: what comes out are positions, and no error quotes a name or counts examples.
How many people there are is public under ``zero_out``, where one person's data are blanked, and
protected under ``add_or_remove_one``, as the number of examples is where examples are the unit.
How many examples somebody has is protected under both.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from trainer.data.reading import Records, parse
from trainer.errors import DatasetError

# Records are read in batches of this many, so that few of them are in memory at a time.
_BATCH = 4096


def positions(train: Records, held_out: Records, key: str) -> np.ndarray:
    """Where each person's examples are in the training split.

    Args:
        train: The training split.
        held_out: The evaluation split, whose examples are treated as public.
        key: Feature that names the person (`trainer.data.dataset_form.check_user_feature`).

    Returns:
        int32 ``[people, most]`` with what one person's examples are at most; a row is ascending
        positions in ``train``, padded with -1. People are in the order of their first examples.

    Raises:
        DatasetError: Somebody has examples in both splits, an example is nobody's, or a file is
            missing or damaged.
    """
    names = _names(train, key)
    if not set(names).isdisjoint(_names(held_out, key)):
        raise DatasetError(
            f"data set {train.name!r}: eval_split has examples of people whose examples are in "
            f"train_split (user_feature={key!r}), but held-out examples are treated as public. "
            "Use splits that share nobody",
            field="eval_split",
        )
    numbers: dict[Hashable, int] = {}
    owners = np.asarray([numbers.setdefault(name, len(numbers)) for name in names], np.int32)
    return by_owner(owners)


def by_owner(owners: np.ndarray) -> np.ndarray:
    """The positions at which each owner stands.

    Args:
        owners: Integers from 0 to the number of owners - 1, each at least once, ``[examples]``.

    Returns:
        int32 ``[owners, most]``, each row ascending and padded with -1.
    """
    counts = np.bincount(owners)
    grouped = np.argsort(owners, kind="stable")
    starts = np.cumsum(counts) - counts
    column = np.arange(len(owners)) - np.repeat(starts, counts)
    rows = np.full((len(counts), counts.max()), -1, np.int32)
    rows[owners[grouped], column] = grouped
    return rows


def _names(records: Records, key: str) -> Sequence[Hashable]:
    def name(record: bytes) -> Hashable:
        feature = parse(record)[key]
        (value,) = feature.bytes_list.value or feature.int64_list.value
        return value

    names: list[Hashable] = []
    for start in range(0, len(records), _BATCH):
        names += records.read(range(start, min(start + _BATCH, len(records))), name)
    if any(name in (b"", "") for name in names):
        raise DatasetError(
            f"data set {records.name!r}: an example is nobody's (user_feature={key!r} is empty). "
            "Prepare it with a name for everybody",
            field="user_feature",
        )
    return names
