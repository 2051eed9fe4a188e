"""Commands for the meta-scheduler: run it, explain its decisions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from deepsquare_chain.cli.frame import CommandContext, command
from deepsquare_chain.cli.output import Column, Kind
from deepsquare_chain.cli.types import whole_number

app = typer.Typer(help="Run the meta-scheduler, or explain its decisions.", no_args_is_help=True)

RulesFile = Annotated[
    Path | None,
    typer.Option("--rules", metavar="FILE", help="Rules of the policy, in YAML; see examples/."),
]
_PLAN: Final = (
    Column("job", "job", Kind.NUMBER),
    Column("provider_id", "provider", Kind.NUMBER),
    Column("text", "why"),
)


@app.callback()
def group() -> None:
    """Run the meta-scheduler."""


@command(app, service=True)
async def run(
    context: CommandContext,
    challenge_after: Annotated[
        int | None,
        typer.Option(
            parser=whole_number(1),
            metavar="SECONDS",
            help="Time without activity after which a provider with jobs is challenged; twice the "
            "claim timeout by default.",
        ),
    ] = None,
    rules: RulesFile = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run without a wallet; only log the decisions.")
    ] = False,
) -> None:
    """Run the meta-scheduler until Ctrl-C: assign jobs, challenge unresponsive providers."""
    from deepsquare_chain.cli.services import schedule

    await schedule(context.settings, challenge_after=challenge_after, rules=rules, dry_run=dry_run)


@command(app)
async def explain(
    context: CommandContext,
    job: Annotated[
        int | None, typer.Argument(parser=whole_number(1), metavar="JOB", help="Only this job.")
    ] = None,
    rules: RulesFile = None,
) -> None:
    """Show what a meta-scheduler would decide now for each waiting job, and why."""
    from deepsquare_chain.cli.why import reasons
    from deepsquare_chain.client.network import open_grid
    from deepsquare_chain.metascheduler.rules_file import read_rules

    policy_rules = None if rules is None else read_rules(rules)
    async with open_grid(context.settings) as contracts:
        if job is not None:
            await contracts.scheduler.get_job(job)
        decisions, share_error = await reasons(contracts, policy_rules)
    context.printer.rows(
        _PLAN,
        (
            (decision.job_id, decision.provider_id, decision.text)
            for decision in decisions
            if job in (None, decision.job_id)
        ),
        empty="No job is waiting." if job is None else f"Job {job} is not waiting.",
    )
    context.printer.note(
        f"Customers' recent use differs from equal shares by {share_error:.0%} of what was paid."
    )
