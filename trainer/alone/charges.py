"""A run's own ledger: what each branch of a trial has been charged, in one small file.

The file is written anew under another name, synced and renamed into place before `charge` returns,
so a crash at any moment leaves the charge before or the charge after, never less than was seen.
What a run has spent is the sum over its branches: each draws its own noise, so steps that a later
branch takes again are paid for again. What is known of each branch stands beside its charge, so
that one can be gone on with also where no checkpoint of it is left.

The file ends in a digest of the rest. That finds damage and edits by hand, not somebody who means
to forge it: whoever must not be trusted with the file needs a ledger elsewhere.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from trainer.config import TrialConfig
from trainer.durability import write_durably
from trainer.errors import ChargesError
from trainer.mechanism.branch import Branch
from trainer.training.plan import mechanism_of

_FORMAT = 2
# Format 1 knew of a branch only where it began.
_READABLE_FORMATS = (1, _FORMAT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Charged:
    """What one branch has been charged.

    Attributes:
        branch: The branch.
        step: The furthest step charged.
        counts: Counts of the evaluation examples charged.
    """

    branch: Branch
    step: int
    counts: int = 0

    def __post_init__(self) -> None:
        for value in (self.step, self.counts):
            if type(value) is not int or value < 0:
                raise ValueError(value)
        if self.step < self.branch.start_step:
            raise ValueError(self.step)

    @property
    def iterations(self) -> int:
        return self.step - self.branch.start_step

    def to_json(self) -> dict[str, Any]:
        facts = self.branch.to_json()
        del facts["branch_id"]  # under which it is kept
        return {**facts, "step": self.step, "counts": self.counts}

    @classmethod
    def from_json(cls, branch_id: str, entry: Mapping[str, Any]) -> "_Charged":
        facts = dict(entry)
        step, counts = facts.pop("step"), facts.pop("counts", 0)
        return cls(
            branch=Branch.from_json({"branch_id": branch_id, **facts}), step=step, counts=counts
        )


def charged_terms(config: TrialConfig) -> dict[str, Any]:
    """What a charged step and a charged count mean: all that their cost depends on."""
    mechanism = mechanism_of(config).to_json()
    del mechanism["iterations"]  # is what is charged
    return {"mechanism": mechanism, "evaluation": dataclasses.asdict(config.evaluation)}


class FileCharges:
    """The charges of one run; `charge` and `charge_counts` are what `trainer.loop` asks for.

    One process at a time may use a file (`trainer.alone.run_directory` sees to it).

    Args:
        path: The file.
        terms: From `charged_terms`.
        create: Whether the run begins: then the file must be absent, else present.

    Raises:
        ChargesError: The file is absent or damaged, or was charged on other terms.
    """

    def __init__(self, path: Path, terms: Mapping[str, Any], *, create: bool) -> None:
        self._path, self._terms = path, dict(terms)
        self._branches: dict[str, _Charged] = {}
        if create:
            if path.exists():
                self._refuse("is there already; allowed is a new directory")
            self._write(self._branches)
            return
        kept, self._branches = self._read()
        if kept != self._terms:
            self._refuse(
                f"was charged for {_differences(kept, self._terms)}, "
                "so what was spent could not be added up; allowed is to go on with what "
                "it says, or a new directory"
            )

    @property
    def iterations(self) -> int:
        """Iterations charged to the whole trial.

        Those of all branches but the newest in whole groups of the mechanism's bands: where noise
        is correlated, a group costs what its first step does, and no branch shares one.
        """
        bands = self._terms["mechanism"].get("bands", 1)
        taken = [each.iterations for each in self._branches.values()]
        return sum(-(-steps // bands) * bands for steps in taken[:-1]) + sum(taken[-1:])

    @property
    def counts(self) -> int:
        """Counts charged to the whole trial."""
        return sum(each.counts for each in self._branches.values())

    @property
    def branches(self) -> list[Branch]:
        """All branches, in the order in which they began."""
        return [each.branch for each in self._branches.values()]

    def charge(self, branch: Branch, step: int) -> int:
        """A `trainer.loop.ChargeFn`."""
        self._raise(branch, step, 0)
        return self.iterations

    def charge_counts(self, branch: Branch, step: int, counts: int) -> int:
        """A `trainer.loop.CountChargeFn`."""
        self._raise(branch, step, counts)
        return self.counts

    def check_covers(self, branch_id: str | None, step: int) -> None:
        """Checks that a checkpoint's steps have been charged.

        Raises:
            ChargesError: They have not, so this is an older copy or another run's file.
        """
        known = self._branches.get(branch_id or "")
        if known is None or known.step < step:
            self._refuse(
                f"knows nothing of step {step}, where the newest checkpoint stands; it is "
                "an older copy or another run's, and is not used"
            )

    def _raise(self, branch: Branch, step: int, counts: int) -> None:
        before = self._branches.get(branch.branch_id)
        if before is None:
            before = _Charged(branch=branch, step=branch.start_step)
        if before.branch.start_step != branch.start_step:
            self._refuse(
                f"has branch {branch.branch_id} begin at step {before.branch.start_step}, not "
                f"{branch.start_step}"
            )
        if before.branch != branch:
            self._refuse(f"has branch {branch.branch_id} compute other steps than it does now")
        after = dataclasses.replace(
            before, step=max(before.step, step), counts=max(before.counts, counts)
        )
        if self._branches.get(branch.branch_id) != after:
            branches = {**self._branches, branch.branch_id: after}
            self._write(branches)
            self._branches = branches

    def _write(self, branches: Mapping[str, _Charged]) -> None:
        body = {
            "format": _FORMAT,
            **self._terms,
            "branches": {name: each.to_json() for name, each in branches.items()},
        }
        text = json.dumps({**body, "sha256": _digest(body)}, indent=1)
        try:
            write_durably(self._path, text)
        except OSError as error:
            self._refuse(f"cannot be written: {error}")

    def _read(self) -> tuple[dict[str, Any], dict[str, _Charged]]:
        try:
            body = json.loads(self._path.read_text(encoding="utf-8"))
            digest = body.pop("sha256")
            known, branches = body.pop("format"), body.pop("branches")
            whole = digest == _digest({"format": known, **body, "branches": branches})
            charged = {name: _Charged.from_json(name, each) for name, each in branches.items()}
        except FileNotFoundError:
            self._refuse(
                "is missing, so nobody can tell what was spent; allowed is a new directory"
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            whole, known, body, charged = False, None, {}, {}
        if not whole:
            self._refuse(
                "is damaged or was edited, so nobody can tell what was spent; allowed is "
                "the file as it was written, or a new directory"
            )
        if known not in _READABLE_FORMATS:
            readable = " and ".join(map(str, _READABLE_FORMATS))
            self._refuse(f"has format {known!r}; this version reads {readable}")
        return body, charged

    def _refuse(self, message: str) -> NoReturn:
        raise ChargesError(f"{self._path}: {message}") from None


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _differences(kept: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What a file was charged for, where that is not what is asked now."""
    found: list[str] = []
    for section, now in ours.items():
        then = kept.get(section, {})
        found += [
            f"{section}.{field}={then.get(field)!r}, now {now.get(field)!r}"
            for field in sorted({*then, *now})
            if then.get(field) != now.get(field)
        ]
    return "; ".join(found) or "something else"
