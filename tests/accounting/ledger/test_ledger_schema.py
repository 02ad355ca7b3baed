"""The ledger's revisions make the tables that its code expects."""

from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from accounting import BudgetExceeded, DpSgdMechanism, Ledger, Selection
from accounting.database.connection import reading, writing
from accounting.ledger.tables import SCHEMA, metadata


def test_the_schema_is_what_the_revisions_make(database_url: str) -> None:
    ledger = Ledger(database_url)
    with reading(ledger.engine) as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "compare_server_default": True,
                "include_object": lambda _object, name, *_: name != SCHEMA.version_table,
            },
        )
        assert compare_metadata(context, metadata) == []
        version = sa.text(f"SELECT version_num FROM {SCHEMA.version_table}")
        assert connection.scalars(version).all() == [SCHEMA.revisions[-1]]
    ledger.close()


TRIAL = DpSgdMechanism(
    noise_multiplier=20.0, sampling_prob=1.0, iterations=10, neighboring_relation="zero_out"
)
DEAR = DpSgdMechanism.full_batch(noise_multiplier=0.01, neighboring_relation="zero_out")
SELECTION = Selection(candidates=(TRIAL,), distribution="geometric", mean=3)
DEAREST = Selection(candidates=(DEAR,), distribution="geometric", mean=3)


def test_a_ledger_of_the_first_revision_goes_on(database_url: str) -> None:
    ledger = Ledger(database_url)
    policies: list[Any] = ["per_trial", "open", "declared", "private_selection"]
    for policy in policies:
        ledger.create_budget(
            policy, dataset="d", dataset_fingerprint="f", epsilon=4.0, delta=1e-5, policy=policy
        )
        one, dear = (SELECTION, DEAREST) if policy == "private_selection" else (TRIAL, DEAR)
        for name in ("open", "closed", "stopped", "released"):
            ledger.reserve(policy, one, request_id=f"{policy}-{name}")
        with pytest.raises(BudgetExceeded):
            ledger.reserve(policy, dear, request_id=f"{policy}-refused")
        ledger.settle(f"{policy}-released")
        ledger.charge(f"{policy}-closed", 1)
        for name in ("closed", "stopped"):
            ledger.settle(f"{policy}-{name}")
    before = [ledger.reservation(i) for policy in policies for i in ledger.reservation_ids(policy)]
    with writing(ledger.engine) as connection:  # as it was
        connection.execute(sa.text("ALTER TABLE ledger_reservations DROP COLUMN committed"))
        connection.execute(sa.text("UPDATE ledger_schema SET version_num = '0001'"))
    ledger.close()

    ledger = Ledger(database_url)
    assert [ledger.reservation(one.request_id) for one in before] == before
    found = ledger.verify()
    assert found.ok, found.problems
    for policy in policies[:3]:
        assert ledger.extend(f"{policy}-closed", 10).state == "open"
    assert ledger.extend("declared-stopped", 10).state == "open"
    with pytest.raises(BudgetExceeded):
        ledger.extend("declared-released", 10)
    assert ledger.verify().ok
    ledger.close()
