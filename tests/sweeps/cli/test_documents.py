"""Every key that ``--json`` prints stands in ``docs/json.md``."""

import json
import re
from pathlib import Path

import accounting
from sweeps.database.tables import open_ledger
from sweeps.home import Home
from tests.sweeps.cli.spec_files import write
from tests.sweeps.cli.test_budget import mechanism

DOCS = Path(__file__).resolve().parents[3] / "docs"

# Below these are names that a person gave, or a file's.
_NAMES = ("config", "report", "shares", "teams")


def keys_of(value):
    """Every key of a document, but names of hyperparameters, files and teams."""
    if isinstance(value, list):
        return {key for item in value for key in keys_of(item)}
    if not isinstance(value, dict):
        return set()
    named = {k: list(v.values()) for k, v in value.items() if k in ("shares", "teams")}
    inner = {k: v for k, v in value.items() if k not in _NAMES}
    nested = [*inner.values(), *named.values()]
    return set(value) | {key for item in nested for key in keys_of(item)}


def documented():
    text = (DOCS / "json.md").read_text()
    return set(re.findall(r"`([a-z_]+)`", text)) | set(re.findall(r'"([a-z_]+)"', text))


def test_the_documentation_names_every_key_of_sweeps(command, tmp_path):
    path = write(tmp_path, {"privacy.target_epsilon": 0.01})
    for verb in (["check", path], ["run", path], ["show"], ["list"]):
        _, out, _ = command(*verb, "--json")
        assert keys_of(json.loads(out)) <= documented()
    declared = {"privacy.policy": "declared", "search_space.noise_multiplier": 4.0}
    _, out, _ = command("check", write(tmp_path, declared), "--json")
    assert json.loads(out)["alternatives"]
    assert keys_of(json.loads(out)) <= documented()


def test_the_documentation_names_every_key_of_budgets_and_the_journal(command, tmp_path):
    path = write(tmp_path, {"privacy.policy": "open", "privacy.target_epsilon": 8.0})
    terms = ("--epsilon", "8", "--delta", "1e-5", "--dataset", "x", "--fingerprint", "y")
    printed = [command("budget", "create", "a", "--from", path, "--json")]
    printed.append(command("budget", "create", "b", "--policy", "per_trial", *terms, "--json"))
    command("budget", "create", "c", "--policy", "private_selection", *terms)
    ledger = open_ledger(Home.from_environment())
    ledger.reserve("a", mechanism(), request_id="a-0")
    candidates = (mechanism(), mechanism(9.0))
    selection = accounting.Selection(candidates=candidates, distribution="geometric", mean=5.0)
    ledger.reserve("c", selection, request_id="c-0")
    ledger.close()
    verbs = [
        ["show", "a", "--for", path],
        ["show", "b"],
        ["show", "c"],
        ["grant", "a", "--team", "t", "--share", "1%"],
        ["show", "a"],
        ["freeze", "a"],
        ["thaw", "a"],
        ["retire", "a", "--yes"],
        ["list", "--all"],
    ]
    printed += [command("budget", *verb, "--json") for verb in verbs]
    printed += [command("ledger", verb, "--json") for verb in ("show", "verify")]
    _, lines, _ = command("ledger", "export")
    printed += [(0, line, "") for line in lines.splitlines()]
    for code, out, _ in printed:
        assert code == 0
        assert keys_of(json.loads(out)) <= documented()


def test_the_documentation_names_every_key_of_data_sets(command):
    protected = ("--unit", "example", "--size", "protected")
    for verb in (
        ["prepare", "digits"],
        ["declare", "digits", *protected],
        ["show", "digits"],
        ["list"],
    ):
        code, out, _ = command("data", *verb, "--json")
        assert code == 0
        assert keys_of(json.loads(out)) <= documented()
