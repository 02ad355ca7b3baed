"""A plan for a terminal: every configuration with its decision, and what they cost together."""

from rich.console import Group, RenderableType
from rich.text import Text

from sweeps.admission import Plan
from sweeps.database.tables import finite_or_none
from sweeps.forecast.reckoning import Forecast
from sweeps.report.forecast_view import forecast_lines
from sweeps.report.table import CheckRow, check_table, show_epsilon, show_value
from sweeps.search_space import COSTLY


def plan_view(plan: Plan, forecast: Forecast, *, max_rows: int | None = None) -> RenderableType:
    """What ``dp-sweeps check`` shows.

    Args:
        plan: What was decided.
        forecast: What it will take.
        max_rows: Show so many configurations, and only count the rest; None shows all.
    """
    hidden = _drawn_alike(plan)
    rows = [
        CheckRow(
            config={n: value for n, value in proposal.shown.items() if n not in hidden},
            epsilon=finite_or_none(proposal.decision.epsilon),
            decision="admitted" if proposal.decision.admitted else "rejected",
            reason=proposal.decision.reason,
        )
        for proposal in plan.proposals
        if proposal.repeat == 0  # the others are decided on alike
    ]
    table = check_table(
        rows,
        title=plan.spec.name,
        guarantee=plan.guarantee,
        max_rows=max_rows,
        repeats=plan.spec.search.repeats,
        noun="candidate" if _selects(plan) else "trial",
    )
    lines = [*totals(plan), *forecast_lines(forecast)]
    return Group(table, Text(), *lines) if lines else table


def _selects(plan: Plan) -> bool:
    return plan.spec.privacy.policy == "private_selection"


def _drawn_alike(plan: Plan) -> set[str]:
    """Fields that cost nothing, of which the candidates of a private selection have any value."""
    if not _selects(plan):
        return set()
    return {
        name
        for name, domain in plan.spec.search_space.domains()
        if name not in COSTLY
        and any(part.kind != "constant" for _, part in domain.parts())
        and len({proposal.shown[name] for proposal in plan.proposals}) == 1
    }


def totals(plan: Plan) -> list[Text]:
    """What everything costs together, and what it would cost under other policies."""
    lines: list[Text] = []
    privacy, total = plan.spec.privacy, plan.total_epsilon
    if plan.selection is not None:
        words = (
            f"A secret number of trials is run, {show_value(plan.selection.mean)} on average, all "
            "of them drawn from search_space. These candidates are the dearest that may be drawn."
        )
        lines.append(Text(words))
    if total is not None:
        limit = f"{show_value(plan.limit.epsilon)} at delta {plan.limit.delta:g}"
        words = f"Together: epsilon {show_epsilon(total)} of {limit}"
        within = total <= plan.limit.epsilon
        if not within:
            words = f"Together: epsilon {show_epsilon(total)}, which exceeds {limit}"
        if privacy.budget is not None:
            team = f", team {privacy.team}" if privacy.team else ""
            before = show_epsilon(plan.epsilon_before)
            words += f" (budget {privacy.budget}{team}: {before} taken before)"
        lines.append(Text(words, style="bold" if within else "red"))
    if plan.proposed_later:
        count = plan.proposed_later
        words = (
            f"The search begins with these, and proposes {count} more trial{'s' * (count > 1)} in "
            "the light of what has run; each is admitted or refused before it starts."
        )
        lines.append(Text(words))
    lines += [
        Text(
            f"As {other.policy} this would cost epsilon {show_epsilon(other.epsilon)} "
            f"({other.assumes})."
        )
        for other in plan.alternatives
    ]
    return lines
