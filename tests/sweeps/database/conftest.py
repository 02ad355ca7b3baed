"""A database that nobody has used yet, of each kind in turn, and stores in it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from sweeps.database.states import TrialState
from sweeps.database.store import Store, open_store
from sweeps.home import DATABASE_VARIABLE, HOME_VARIABLE, Home
from tests.sweeps.database.small_sweep import (
    ROOMY,
    TIGHT,
    TIGHT_BANDED,
    a_full_trial,
    a_sweep,
    a_trial,
)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def environment(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The environment variables of an installation that nobody has used yet."""
    variables = {HOME_VARIABLE: str(tmp_path / "home")}
    if request.param == "sqlite":
        return variables
    return variables | {DATABASE_VARIABLE: request.getfixturevalue("postgres_database")}


@pytest.fixture
def home(environment: dict[str, str]) -> Home:
    return Home.from_environment(environment)


@pytest.fixture
def engine(empty_store: Store) -> sa.Engine:
    return empty_store.ledger.engine


@pytest.fixture
def empty_store(home: Home) -> Iterator[Store]:
    store = open_store(home)
    yield store
    store.ledger.close()


@pytest.fixture
def store(empty_store: Store) -> Store:
    """Two admitted trials and a rejected one, none of which the trainer could run."""
    trials = [a_trial(0), a_trial(1), a_trial(2, TrialState.REJECTED)]
    empty_store.create_sweep(a_sweep(), trials)
    return empty_store


@pytest.fixture
def full(empty_store: Store) -> Store:
    """Three trials that the trainer could run, whose budget has room for no more."""
    trials = [a_full_trial(number) for number in range(3)]
    empty_store.create_sweep(a_sweep(epsilon=TIGHT), trials)
    return empty_store


@pytest.fixture
def roomy(empty_store: Store) -> Store:
    """The same, with room for as many steps again."""
    trials = [a_full_trial(number) for number in range(3)]
    empty_store.create_sweep(a_sweep(epsilon=ROOMY), trials)
    return empty_store


@pytest.fixture
def banded(empty_store: Store) -> Store:
    """One trial with noise that is correlated over eight steps, and room for no more."""
    empty_store.create_sweep(a_sweep(epsilon=TIGHT_BANDED), [a_full_trial(0, bands=8)])
    return empty_store
