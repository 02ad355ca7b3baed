"""The commands about budgets: what they change, show and refuse."""

import contextlib
import getpass
import io
import json
import os
import re
import sqlite3

import pytest
from rich.console import Console

import accounting
from accounting.ledger.records import Request
from sweeps.cli import options
from sweeps.database.tables import existing_ledger, open_ledger
from sweeps.home import Home, who
from sweeps.report.bar import SpentBar, proportions
from sweeps.report.budget_view import BudgetList, BudgetRow, BudgetView, show_left
from tests.sweeps.cli.spec_files import write

TERMS = ("--epsilon", "8", "--delta", "1e-5")
FOREIGN = ("--dataset", "scans", "--fingerprint", "v1")
OPEN_SPEC = {"privacy.policy": "open", "privacy.target_epsilon": 8.0}


@pytest.fixture
def ledger(home):
    """The ledger of the command's home."""
    opened = open_ledger(Home.from_environment())
    yield opened
    opened.close()


@pytest.fixture
def scans(command):
    """An open budget named scans."""
    code, _, err = command("budget", "create", "scans", *FOREIGN, "--policy", "open", *TERMS)
    assert (code, err) == (0, "")
    return "scans"


def mechanism(noise=8.0, sampling_prob=0.18, iterations=150):
    return accounting.DpSgdMechanism(
        noise_multiplier=noise,
        sampling_prob=sampling_prob,
        iterations=iterations,
        neighboring_relation="zero_out",
    )


def state_of(home):
    """Everything that the home holds: each row of the database, each bit of other files."""
    held = {}
    for path in home.rglob("*"):
        if path.name == "ledger.db":
            with contextlib.closing(sqlite3.connect(path)) as connection:
                held[path.name] = list(connection.iterdump())
        elif path.is_file() and not path.name.endswith(("-shm", "-wal")):
            held[path.name] = path.read_bytes()
    return held


def draw(renderable, width=80, *, terminal=False):
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, legacy_windows=False)
    console.print(renderable)
    return file.getvalue()


# --- create --------------------------------------------------------------------------------


def test_a_budget_from_a_specification(command, home, tmp_path):
    path = write(tmp_path, OPEN_SPEC)
    code, out, err = command("budget", "create", "shared", "--from", path, "--json")
    assert (code, err) == (0, "")
    made = json.loads(out)
    assert (made["policy"], made["epsilon"], made["delta"]) == ("open", 8.0, 1e-5)
    assert made["dataset"] == "digits:1.0.0"
    assert made["rdp_order"] > 1
    entry, _ = next(existing_ledger(Home.from_environment()).entries())
    assert entry.facts["by"] == getpass.getuser()
    # It is the data set that sweeps compare with: the specification may name it.
    path = write(tmp_path, {**OPEN_SPEC, "privacy.budget": "shared"})
    code, out, _ = command("check", path)
    assert code == 0
    assert "(budget shared: 0 taken before)" in " ".join(out.split())


def test_options_override_the_specification(command, tmp_path):
    path = write(tmp_path)
    arguments = ("--from", path, "--policy", "declared", "--epsilon", "2", "--delta", "1e-6")
    code, out, _ = command("budget", "create", "mine", *arguments, "--json")
    made = json.loads(out)
    assert code == 0
    assert (made["policy"], made["epsilon"], made["delta"]) == ("declared", 2.0, 1e-6)


def test_a_budget_by_options_alone(command):
    arguments = ("--dataset", "digits:1.0.0", "--policy", "per_trial", *TERMS)
    code, out, _ = command("budget", "create", "mine", *arguments, "--train-split", "train[:50%]")
    assert code == 0
    assert "mine: per_trial, epsilon 8 at delta 1e-05, for digits:1.0.0" in out
    assert "does NOT cover" in " ".join(out.split())


def test_data_of_users_that_tfds_does_not_hold(command):
    more = ("--privacy-unit", "user", "--neighboring-relation", "add_or_remove_one")
    code, out, _ = command(
        "budget", "create", "mine", *FOREIGN, "--policy", "declared", *TERMS, *more, "--json"
    )
    made = json.loads(out)
    assert code == 0
    assert (made["dataset"], made["dataset_fingerprint"]) == ("scans", "v1")
    assert (made["privacy_unit"], made["neighboring_relation"]) == ("user", "add_or_remove_one")


def test_the_order_suits_what_is_typical(command, tmp_path):
    path = write(tmp_path, {**OPEN_SPEC, "privacy.budget": "not-made-yet"})
    command("budget", "create", "usual", "--from", path)
    code, out, _ = command("budget", "create", "a", "--from", path, "--typical", path, "--json")
    assert code == 0
    chosen = json.loads(out)["rdp_order"]
    _, out, _ = command("budget", "create", "b", "--from", path, "--rdp-order", "7.5", "--json")
    assert json.loads(out)["rdp_order"] == 7.5
    counts = {}
    for order in (chosen, 7.5):
        terms = accounting.BudgetTerms(epsilon=8.0, delta=1e-5, policy="open", rdp_order=order)
        trial = mechanism(1.5, 512 / 1437, 20)
        counts[order] = accounting.Account(terms).copies_that_fit(trial)
    assert counts[chosen] >= counts[7.5]


def test_another_budget_on_the_same_data_is_warned_of(command, scans):
    code, _, err = command("budget", "create", "b", *FOREIGN, "--policy", "declared", *TERMS)
    assert code == 0
    assert "warning: the same data is protected by scans (open, epsilon 8)" in err
    assert "add up" in err
    _, _, err = command(
        "budget",
        "create",
        "c",
        "--dataset",
        "x",
        "--fingerprint",
        "v2",
        "--policy",
        "open",
        *TERMS,
    )
    assert err == ""
    _, out, _ = command("budget", "show", "b", "--json")
    assert [other["name"] for other in json.loads(out)["same_data"]] == ["scans"]


def test_the_same_budget_again_changes_nothing(command, home, scans):
    before = state_of(home)
    code, _, err = command("budget", "create", "scans", *FOREIGN, "--policy", "open", *TERMS)
    assert code == 0
    assert "exists already" in err
    assert state_of(home) == before


WRONG = {
    "nothing said": ([], "--dataset, --policy, --epsilon, --delta: missing"),
    "no data": (["--policy", "open", *TERMS], "--dataset: missing"),
    "no delta": ([*FOREIGN, "--policy", "open", "--epsilon", "8"], "--delta: missing"),
    "epsilon of zero": (
        [*FOREIGN, "--policy", "open", "--epsilon", "0", "--delta", "1e-5"],
        "> 0",
    ),
    "epsilon NaN": (
        [*FOREIGN, "--policy", "open", "--epsilon", "nan", "--delta", "1e-5"],
        "finite",
    ),
    "delta of one": ([*FOREIGN, "--policy", "open", "--epsilon", "8", "--delta", "1"], "delta"),
    "no such policy": ([*FOREIGN, "--policy", "free", *TERMS], "free"),
    "an order without open": (
        [*FOREIGN, "--policy", "declared", *TERMS, "--rdp-order", "4"],
        "rdp_order",
    ),
    "an order of one": ([*FOREIGN, "--policy", "open", *TERMS, "--rdp-order", "1"], "rdp_order"),
    "two orders": (
        [*FOREIGN, "--policy", "open", *TERMS, "--rdp-order", "4", "--typical", "SPEC"],
        "--rdp-order",
    ),
    "typical without open": (
        [*FOREIGN, "--policy", "declared", *TERMS, "--typical", "SPEC"],
        "declared",
    ),
    "no such data set": (["--dataset", "no_such", "--policy", "open", *TERMS], "--dataset"),
    "no name of a data set": (["--dataset", "../x", "--policy", "open", *TERMS], "--dataset"),
    "no such split": (
        ["--dataset", "digits", "--eval-split", "valid", "--policy", "open", *TERMS],
        "--eval-split",
    ),
    "a control character": (
        ["--dataset", "x", "--fingerprint", "a\x1b[2J", "--policy", "open", *TERMS],
        "--fingerprint",
    ),
    "a split of what is not looked up": (
        [*FOREIGN, "--train-split", "train", "--policy", "open", *TERMS],
        "--train-split",
    ),
    "no such specification": (["--from", "/nowhere.yaml"], "/nowhere.yaml"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_makes_nothing(command, home, tmp_path, case):
    arguments, said = WRONG[case]
    path = write(tmp_path, OPEN_SPEC)
    arguments = [str(path) if argument == "SPEC" else argument for argument in arguments]
    code, out, err = command("budget", "create", "mine", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err
    assert "\x1b[2J" not in err
    assert not home.exists()


@pytest.mark.parametrize("name", ["", "-x", "a b", "../x", "x" * 161, "ä"])
def test_a_name_that_is_none(command, home, name):
    code, out, _ = command("budget", "create", "--", name)
    assert (code, out) == (2, "")
    assert not home.exists()


def test_other_terms_under_a_name_that_is_taken(command, home, scans):
    before = state_of(home)
    for changed in (
        [*FOREIGN, "--policy", "open", "--epsilon", "9", "--delta", "1e-5"],
        ["--dataset", "scans", "--fingerprint", "v2", "--policy", "open", *TERMS],
    ):
        code, out, err = command("budget", "create", "scans", *changed)
        assert (code, out) == (2, "")
        assert "other terms" in err
    assert state_of(home) == before


# --- looking -------------------------------------------------------------------------------


def test_the_list_leaves_out_budgets_of_single_sweeps(command, ledger, scans):
    ledger.create_budget(
        "sweep-1",
        dataset="scans",
        dataset_fingerprint="v1",
        epsilon=3.0,
        delta=1e-5,
        policy="per_trial",
        one_off=True,
    )
    _, out, _ = command("budget", "list", "--json")
    assert [budget["name"] for budget in json.loads(out)["budgets"]] == ["scans"]
    _, out, _ = command("budget", "list", "--all", "--json")
    rows = json.loads(out)["budgets"]
    assert [budget["name"] for budget in rows] == ["sweep-1", "scans"], "newest first"
    assert rows[0]["level"] is None, "under per_trial nothing adds up"
    code, out, _ = command("budget", "list")
    assert code == 0
    assert "and 1 of single sweeps" in out
    assert "0 of 8" in out


def test_what_is_shown_is_what_is_taken(command, ledger, scans):
    for number in range(4):
        ledger.reserve("scans", mechanism(), request_id=f"t-{number}")
    ledger.charge("t-0", 150)
    ledger.settle("t-0")
    status = ledger.status("scans")
    code, out, _ = command("budget", "show", "scans", "--json")
    shown = json.loads(out)
    assert code == 0
    assert shown["level"]["spent"] == status.level.spent > 0
    assert shown["level"]["free"] == status.level.free
    assert shown["reservations"] == {"open": 3, "closed": 1, "released": 0, "refused": 0}
    (fit,) = shown["room"]["fits"]
    assert fit["asked"] == 4
    assert fit["more"] == ledger.account("scans").copies_that_fit(mechanism())
    _, out, _ = command("budget", "show", "scans")
    said = " ".join(out.split())
    assert re.search(r"\[#+=+\.+\]", out)
    assert "3 open, 1 closed" in said
    assert "Rényi divergence" in said
    assert f"{fit['more']}" in said
    assert shown["guarantee"] in said
    assert "\x1b" not in out


def test_how_much_of_a_specification_still_fits(command, ledger, tmp_path):
    path = write(tmp_path, OPEN_SPEC)
    command("budget", "create", "shared", "--from", path)
    code, out, _ = command("budget", "show", "shared", "--for", path, "--json")
    room = json.loads(out)["room"]
    assert code == 0
    assert room["whole_fits"] is True
    assert room["admitted"] == 2
    assert 0 < room["epsilon_after"] <= 8
    assert [fit["asked"] for fit in room["fits"]] == [1, 1]
    cheap, dear = room["fits"]
    assert cheap["more"] > dear["more"] > 0
    # As many as it said, and not one more.
    account = ledger.account("shared")
    trial = mechanism(dear["noise_multiplier"], dear["sampling_prob"], dear["iterations"])
    verdicts = account.decide([trial] * (dear["more"] + 1))
    assert [verdict.admitted for verdict in verdicts] == [True] * dear["more"] + [False]
    _, out, _ = command("budget", "show", "shared", "--for", path)
    assert "All of it fits: 2 trials" in " ".join(out.split())
    ledger.freeze("shared")
    _, out, _ = command("budget", "show", "shared", "--for", path)
    assert "None of it fits: the budget is frozen." in " ".join(out.split())


def test_a_specification_that_does_not_suit_the_budget(command, scans, tmp_path):
    code, out, err = command("budget", "show", "scans", "--for", write(tmp_path))
    assert (code, out) == (2, "")
    assert "privacy.policy" in err
    assert "another data set" in err


def test_per_trial_adds_nothing_up_and_says_what_it_would_be(command, ledger, tmp_path):
    path = write(tmp_path)
    command("budget", "create", "mine", "--from", path)
    for number in range(3):
        ledger.reserve("mine", mechanism(), request_id=f"t-{number}")
        ledger.charge(f"t-{number}", 150)
    _, out, _ = command("budget", "show", "mine", "--for", path, "--json")
    shown = json.loads(out)
    one = accounting.epsilon(mechanism(), delta=1e-5)
    assert shown["level"]["together"] > one
    cheap, dear = shown["room"]["fits"]
    assert cheap["more"] is None
    assert dear["more"] == 0
    _, out, _ = command("budget", "show", "mine", "--for", path)
    said = " ".join(out.split())
    assert "nothing adds up" in said
    assert "a figure and no guarantee" in said
    assert "any number" in said
    assert "[" not in out, "no bar of what does not add up"


def test_a_closed_list_says_so(command, ledger):
    command("budget", "create", "mine", *FOREIGN, "--policy", "declared", *TERMS)
    _, out, _ = command("budget", "show", "mine")
    assert "not closed" in out
    requests = [Request(request_id=f"t-{n}", mechanism=mechanism()) for n in range(2)]
    ledger.reserve_together("mine", requests)
    ledger.charge("t-0", 1)
    _, out, _ = command("budget", "show", "mine", "--json")
    assert json.loads(out)["closed_list"] is True
    _, out, _ = command("budget", "show", "mine")
    said = " ".join(out.split())
    assert "closed: something of it was trained" in said
    assert "Nothing of what it has paid for: the declared list was closed" in said


def test_teams_have_a_bar_each(command, ledger, scans):
    for team, share in (("vision", "40%"), ("speech", "0.35")):
        code, out, _ = command("budget", "grant", "scans", "--team", team, "--share", share)
        assert code == 0
        assert f"{team} has {share if '%' in share else '35%'} of scans" in out
    ledger.reserve("scans", mechanism(), request_id="t-0", team="vision")
    _, out, _ = command("budget", "show", "scans", "--json")
    shown = json.loads(out)
    assert shown["shares"] == {"vision": 0.4, "speech": 0.35}
    assert shown["teams"]["vision"]["reserved"] > 0 == shown["teams"]["speech"]["reserved"]
    assert "--team" in shown["room"]["reason"]
    _, out, _ = command("budget", "show", "scans", "--team", "speech", "--json")
    fits = json.loads(out)["room"]["fits"]
    assert fits[0]["more"] == ledger.account("scans").copies_that_fit(mechanism(), "speech")
    _, out, _ = command("budget", "show", "scans")
    assert len(re.findall(r"\[[#=.]+\]", out)) == 3
    assert "25% is granted to nobody" in out
    code, _, err = command("budget", "show", "scans", "--team", "sales")
    assert code == 2
    assert "vision" in err


@pytest.mark.parametrize("verb", ["show", "freeze", "thaw", "retire"])
def test_a_budget_that_is_not_there(command, scans, verb):
    code, out, err = command("budget", verb, "no-such")
    assert (code, out) == (2, "")
    assert "'no-such'" in err
    assert "dp-sweeps budget list" in err


@pytest.mark.parametrize("verb", [["list"], ["show", "x"], ["freeze", "x"]])
def test_looking_at_no_ledger_creates_none(command, home, verb):
    code, _, err = command("budget", *verb)
    assert code == 1
    assert "dp-sweeps budget create" in err
    assert not home.exists()


# --- changing ------------------------------------------------------------------------------


def test_freeze_thaw_and_retire_are_journaled_with_who_and_why(command, ledger, scans):
    steps = (
        ("freeze", "frozen", ("--reason", "audit")),
        ("thaw", "active", ()),
        ("retire", "retired", ("--yes", "--reason", "the end")),
    )
    for verb, state, more in steps:
        code, out, _ = command("budget", verb, "scans", *more, "--json")
        assert code == 0
        assert json.loads(out)["state"] == state
    entries = [entry for entry, _ in ledger.entries("scans")][1:]
    assert [entry.kind for entry in entries] == ["frozen", "thawed", "retired"]
    assert {entry.facts["by"] for entry in entries} == {getpass.getuser()}
    assert [entry.facts["reason"] for entry in entries] == ["audit", "", "the end"]
    code, out, err = command("budget", "thaw", "scans")
    assert (code, out) == (1, "")
    assert "for good" in err


def test_retiring_without_a_terminal_takes_yes(command, home, scans, monkeypatch):
    before = state_of(home)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    code, out, err = command("budget", "retire", "scans")
    assert (code, out) == (2, "")
    assert "--yes" in err
    assert state_of(home) == before


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("answer", "state", "code"), [("n\n", "active", 1), ("y\n", "retired", 0)]
)
def test_a_terminal_is_asked(command, ledger, scans, monkeypatch, answer, state, code):
    ledger.reserve("scans", mechanism(), request_id="t-0")
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    ended, out, err = command("budget", "retire", "scans")
    assert ended == code
    assert "1 open reservation" in err
    assert "Go on?" not in out
    assert ledger.budget("scans").state == state


REFUSED = {
    "a share above one": ("grant", "--team", "a", "--share", "1.5"),
    "a share in words": ("grant", "--team", "a", "--share", "half"),
    "a share that is NaN": ("grant", "--team", "a", "--share", "nan"),
    "a negative share": ("grant", "--team", "a", "--share=-10%"),
    "a team that is no name": ("grant", "--team", "a b", "--share", "0.1"),
    "a reason of two lines": ("freeze", "--reason", "a\nb"),
    "a reason without end": ("freeze", "--reason", "x" * 257),
    "no share": ("grant", "--team", "a"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_leaves_the_ledger_bit_for_bit(command, home, ledger, scans, case):
    ledger.close()
    before = state_of(home)
    verb, *more = REFUSED[case]
    code, out, err = command("budget", verb, "scans", *more)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert state_of(home) == before
    assert existing_ledger(Home.from_environment()).verify().ok


def test_shares_are_at_most_the_whole(command, scans):
    command("budget", "grant", "scans", "--team", "a", "--share", "60%")
    code, out, err = command("budget", "grant", "scans", "--team", "b", "--share", "60%")
    assert (code, out) == (2, "")
    assert "at most 0.4" in err


def test_who_asks_has_no_name(monkeypatch):
    def nobody():
        raise KeyError("uid not found")

    monkeypatch.setattr(getpass, "getuser", nobody)
    assert who() == f"uid {os.getuid()}"
    monkeypatch.setattr(getpass, "getuser", lambda: "a\x1b\nb" + "c" * 300)
    assert who() == ("ab" + "c" * 300)[:256]


def test_names_complete_themselves(command, home, monkeypatch):
    assert options.complete_budget("") == []
    assert not home.exists()
    command("budget", "create", "scans", *FOREIGN, "--policy", "open", *TERMS)
    assert options.complete_budget("sc") == ["scans"]
    assert options.complete_budget("x") == []
    monkeypatch.setenv("DP_SWEEPS_DATABASE_URL", "nonsense://")
    assert options.complete_budget("") == []


# --- drawing -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "cells", "counts"),
    [
        ((1.0, 1.0, 2.0), 40, [10, 10, 20]),
        ((0.0, 0.0, 5.0), 10, [0, 0, 10]),
        ((5.0, 0.0, 0.0), 10, [10, 0, 0]),
        ((1e-9, 1e-9, 5.0), 10, [1, 1, 8]),
        ((5.0, 1e-9, 1e-9), 10, [8, 1, 1]),
        ((0.0, 0.0, 0.0), 10, [0, 0, 10]),
        ((float("inf"), 1.0, 0.0), 10, [10, 0, 0]),
        ((1.0, 1.0, 1.0), 10, [4, 3, 3]),
    ],
)
def test_the_bar_is_in_proportion(parts, cells, counts):
    assert proportions(parts, cells) == counts


def test_the_bar_in_a_pipe_and_on_terminals():
    bar = SpentBar(1.0, 1.0, 4.0, width=42)
    assert draw(bar) == f"[{'#' * 10}{'=' * 10}{'.' * 20}]\n"
    drawn = draw(SpentBar(1.0, 1.0, 4.0, width=40), terminal=True)
    assert re.sub(r"\x1b\[[0-9;]*m", "", drawn) == f"{'█' * 10}{'▒' * 10}{'░' * 20}\n"
    assert drawn.count("\x1b[3") == 3, "a colour for each part"
    assert len(draw(bar, width=20).strip()) == 20


@pytest.mark.parametrize("width", [24, 43, 44, 64, 80, 120])
@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_is_wider_than_the_terminal(command, ledger, scans, width, terminal):
    ledger.grant("scans", "vision", 0.4)
    ledger.reserve("scans", mechanism(), request_id="t-0", team="vision")
    command("budget", "create", "n" * 160, *FOREIGN, "--policy", "private_selection", *TERMS)
    statuses = [ledger.status(budget.name) for budget in ledger.budgets()]
    rows = [BudgetRow(budget=status.budget, level=status.level) for status in statuses]
    views = [BudgetView(status=status, others=()) for status in statuses]
    for shown in (BudgetList(rows), *views):
        plain = re.sub(r"\x1b\[[0-9;]*m", "", draw(shown, width, terminal=terminal))
        assert max(len(line) for line in plain.splitlines()) <= width
        assert "…" not in plain, "nothing is cut"
        assert "active" in plain


def test_what_is_left_is_rounded_down():
    assert show_left(1.23456) == "1.234"
    assert show_left(0.0) == "0"
    assert show_left(4.0) == "4"
