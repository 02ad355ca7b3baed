"""Whatever stands on a command line: a clear answer, no traceback, and no half-written ledger."""

import io
import sqlite3
from contextlib import closing, redirect_stderr, redirect_stdout

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sweeps import cli
from sweeps.cli.app import ExitCode

# What a person, or a script of theirs, may type where a number or a name is wanted.
NUMBERS = st.one_of(
    st.sampled_from(
        ["nan", "inf", "-inf", "1e400", "5e-324", "-0.0", "0", "1e-11", "1", "0.5", "8", "1e-5"]
    ),
    st.sampled_from(["", " ", "1_0", "0x10", "true", "None", "1,5", "½", "9" * 400, "50%"]),
    st.floats().map(str),
)
NAMES = st.one_of(
    st.sampled_from(["scans", "other", "", "../x", "a b", "a;drop table x", "é", "-", "x" * 500]),
    st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=8),
)


def plain(text: str) -> str:
    """A value that typer does not take for an option."""
    return text if not text.startswith("-") else f"x{text}"


COMMANDS = st.one_of(
    st.tuples(
        NAMES, NUMBERS, NUMBERS, st.sampled_from(["per_trial", "declared", "open", "x"])
    ).map(
        lambda t: [
            *("budget", "create", plain(t[0]), "--dataset", "scans", "--fingerprint", "v1"),
            *(f"--epsilon={t[1]}", f"--delta={t[2]}", f"--policy={t[3]}"),
        ]
    ),
    st.tuples(NUMBERS).map(
        lambda t: [
            *("budget", "create", "ordered", "--dataset", "scans", "--fingerprint", "v1"),
            *("--epsilon=8", "--delta=1e-5", "--policy=open", f"--rdp-order={t[0]}"),
        ]
    ),
    st.tuples(NAMES, NAMES, NUMBERS).map(
        lambda t: ["budget", "grant", plain(t[0]), f"--team={t[1]}", f"--share={t[2]}"]
    ),
    st.tuples(st.sampled_from(["show", "freeze", "thaw"]), NAMES).map(
        lambda t: ["budget", t[0], plain(t[1])]
    ),
    NAMES.map(lambda name: ["budget", "retire", plain(name)]),
    NUMBERS.map(lambda number: ["ledger", "show", f"--last={number}"]),
    NAMES.map(lambda name: ["ledger", "verify", f"--head={name}"]),
    NAMES.map(lambda name: ["ledger", "export", f"--budget={name}"]),
    NAMES.map(lambda name: ["check", plain(name)]),
)


def run(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["dp-sweeps", *arguments])
    errors = io.StringIO()
    with (
        redirect_stdout(io.StringIO()),
        redirect_stderr(errors),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main()
    return int(ended.value.code or 0), errors.getvalue()


def rows(home) -> dict[str, list]:
    with closing(sqlite3.connect(home / "ledger.db")) as database:
        names = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        return {
            name: sorted(database.execute(f'SELECT * FROM "{name}"').fetchall(), key=repr)
            for (name,) in names
        }


@pytest.mark.slow
def test_any_command_line_is_answered_and_a_refused_one_changes_nothing(home, monkeypatch):
    code, _ = run(
        monkeypatch,
        [
            *("budget", "create", "scans", "--dataset", "scans", "--fingerprint", "v1"),
            *("--epsilon", "8", "--delta", "1e-5", "--policy", "open"),
        ],
    )
    assert code == ExitCode.OK
    answers: set[int] = set()

    @settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(COMMANDS)
    def answered(arguments: list[str]) -> None:
        before = rows(home)
        code, errors = run(monkeypatch, arguments)
        answers.add(code)
        assert code in (ExitCode.OK, ExitCode.FAILED, ExitCode.BAD_INPUT)
        assert "Traceback" not in errors
        if code != ExitCode.OK:
            assert errors.strip()
            assert rows(home) == before

    answered()
    assert {ExitCode.OK, ExitCode.BAD_INPUT} <= answers
    assert run(monkeypatch, ["ledger", "verify"])[0] == ExitCode.OK
