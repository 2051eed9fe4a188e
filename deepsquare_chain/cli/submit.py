"""Commands that take a job file: write a first one, check, convert, quote, submit; and its schema."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from deepsquare_chain.cli.frame import CommandContext, command, open_sending
from deepsquare_chain.cli.output import Column, Format, Kind, row_of
from deepsquare_chain.cli.types import GaslessOption, WaitTimeoutOption, YesOption, positive_credits
from deepsquare_chain.credits import credit_count, format_credits
from deepsquare_chain.errors import GridError, UsageError

if TYPE_CHECKING:
    from deepsquare_chain.chain.bindings.contracts import Contracts
    from deepsquare_chain.client.gasless import GaslessWallet
    from deepsquare_chain.client.network import WalletConnection
    from deepsquare_chain.client.submission import Bill
    from deepsquare_chain.job import Conditions, Terms
    from deepsquare_chain.metascheduler.forecast import Prospect
    from deepsquare_chain.store.definitions import DefinitionStore
    from deepsquare_chain.workflow import Definition, JobFile

app = typer.Typer()

_JOB_FILE: Final = (
    Column("name", "name"),
    Column("definition", "definition (SHA-256)", Kind.HASH),
    Column("steps", "steps", Kind.NUMBER),
    Column("tasks", "tasks", Kind.NUMBER),
    Column("cpus", "CPUs", Kind.NUMBER),
    Column("memory", "memory (MB)", Kind.NUMBER),
    Column("gpus", "GPUs", Kind.NUMBER),
    Column("time_limit", "time limit", Kind.SECONDS),
    Column("credits", "credits", Kind.CREDITS),
    Column("uses", "requirements"),
)

JobFilePath = Annotated[Path, typer.Argument(metavar="FILE", help="Job file (YAML or JSON).")]
LenientOption = Annotated[
    bool,
    typer.Option(
        "--lenient", help="Ignore unknown keys with a warning, instead of rejecting them."
    ),
]
_WRITTEN: Final = (Column("path", "written"),)


@command(app)
async def validate(
    context: CommandContext, file: JobFilePath, lenient: LenientOption = False
) -> None:
    """Check a job file without sending anything."""
    from deepsquare_chain.workflow import load_job_file

    job_file = load_job_file(file, lenient=lenient)
    for warning in job_file.warnings:
        context.printer.note(f"Warning: {warning}")
    definition = job_file.definition
    row = row_of(
        _JOB_FILE,
        definition.resources,
        name=job_file.name,
        definition=definition.digest.hex(),
        steps=len(definition.steps),
        time_limit=job_file.time_limit,
        credits=job_file.credits,
        uses=job_file.uses,
    )
    context.printer.record(_JOB_FILE, row)


@command(app)
async def convert(
    context: CommandContext,
    file: JobFilePath,
    to: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Output file; standard output by default.")
    ] = None,
) -> None:
    """Rewrite older keys of a job file; the result is checked and printed."""
    from deepsquare_chain.workflow.jobfile import convert as rewrite
    from deepsquare_chain.workflow.jobfile import (
        dump,
        parse_job_file,
        read_file,
        read_job_tree,
        unwrap,
    )

    data = read_file(file)
    tree, _ = unwrap(*read_job_tree(data, str(file)))
    changes = rewrite(tree)
    text = dump(tree, data.decode("utf-8-sig"))
    # Parsed again, so that line numbers in errors refer to the converted text.
    job_file = parse_job_file(text.encode(), f"{file} (converted)")
    for line in (*changes, *job_file.warnings):
        context.printer.note(line)
    if not changes:
        context.printer.note(f"{file} has no outdated keys.")
    if to is None:
        context.printer.raw(text.encode())
        return
    _write_new(to, text)


def _write_new(path: Path, text: str) -> None:
    """Write a file that does not exist.

    Raises:
        UsageError: It exists, or can't be written.
    """

    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise UsageError(
            f"{path} already exists and is not changed", hint="Give another name."
        ) from None
    except OSError as error:
        raise UsageError(f"{path} can't be written: {error.strerror}") from None


@command(app)
async def schema(context: CommandContext) -> None:
    """Print the JSON schema of job files, for editors."""
    context.printer.raw(_schema_text().encode())


def _schema_text() -> str:
    import json

    from deepsquare_chain.workflow.schema import job_file_schema

    return json.dumps(job_file_schema(), indent=2) + "\n"


@command(app)
async def init(
    context: CommandContext,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Path of the new file.")] = Path(
        "job.yaml"
    ),
) -> None:
    """Write an example job file in which every key is explained."""
    from deepsquare_chain.workflow.jobfile import JOB_FILE

    schema = _write_schema()
    modeline = f"# yaml-language-server: $schema={schema}\n" if schema else ""
    _write_new(file, modeline + JOB_FILE)
    context.printer.record(_WRITTEN, (str(file),))
    context.printer.note(f"Next: deepsquare quote {file}")


def _write_schema() -> Path | None:
    """Write the JSON schema into the user's cache; the job file's first line refers editors to it."""
    import os

    try:
        base = os.environ.get("XDG_CACHE_HOME")
        folder = (Path(base) if base else Path.home() / ".cache") / "deepsquare"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "job.schema.json"
        path.write_text(_schema_text(), encoding="utf-8")
    except (OSError, RuntimeError):
        return None  # the schema is optional
    return path


_QUOTES: Final = (
    Column("provider_id", "provider", Kind.NUMBER),
    Column("account", "account", Kind.HASH, detail=True),
    Column("rate", "rate", Kind.RATE),
    Column("cost", "max cost", Kind.CREDITS),
    Column("longest", "max runtime", Kind.SECONDS),
    Column("start", "start"),
    Column("starts_in", "starts in", Kind.SECONDS, detail=True),
    Column("expected_in", "expected in", Kind.SECONDS, detail=True),
    Column("eligible", "eligible", Kind.FLAG),
    Column("joules", "energy by label (J)", Kind.NUMBER, detail=True),
    Column("grams", "CO2 by label (g)", Kind.NUMBER, detail=True),
    Column("reason", "reason"),
)
_BILL: Final = (
    Column("jobs", "jobs", Kind.NUMBER),
    Column("total", "into escrow", Kind.CREDITS),
    Column("balance", "credits", Kind.CREDITS),
    Column("approval", "needs an approval", Kind.FLAG),
    Column("gas", "max gas (coin)", Kind.COIN),
)
_SUBMITTED: Final = (
    Column("id", "job", Kind.NUMBER),
    Column("name", "name"),
    Column("index", "index", Kind.NUMBER),
    Column("escrow", "escrow", Kind.CREDITS),
    Column("submission", "submission", Kind.WORD),
    Column("definition", "definition", Kind.HASH, detail=True),
    Column("transaction", "transaction", Kind.HASH),
)

#: Timeout in seconds for reading the queue in a quote; on a long chain all events must be read first.
_LOOK_SECONDS: Final = 20.0

CreditsOption = Annotated[
    int | None,
    typer.Option(
        "--credits",
        parser=positive_credits,
        metavar="CREDITS",
        help="Escrow; overrides the job file.",
    ),
]
LimitOption = Annotated[
    str | None,
    typer.Option(
        "--time-limit",
        metavar="TIME",
        help="Time limit such as 90s, 10m, 2d; overrides the job file.",
    ),
]


def _read(
    context: CommandContext, file: Path, credits: int | None, limit: str | None, lenient: bool
) -> tuple[JobFile, Terms]:
    from deepsquare_chain.client.job_file import load_job
    from deepsquare_chain.workflow import parse_duration

    job_file = load_job(file, lenient=lenient)
    for warning in job_file.warnings:
        context.printer.note(f"Warning: {warning}")
    try:
        seconds = None if limit is None else parse_duration(limit)
    except ValueError as error:
        raise UsageError(f"--time-limit: {error}", hint="Write 90s, 10m or 1h30m.") from None
    return job_file, job_file.terms(credits=credits, time_limit=seconds)


async def _prospect(contracts: Contracts, terms: Terms) -> Prospect | None:
    """Return a job's expected place in the queue; None on a timeout or an error of the endpoint."""
    import asyncio

    from deepsquare_chain.metascheduler.dry_run import DryRunScheduler

    try:
        async with asyncio.timeout(_LOOK_SECONDS):
            with DryRunScheduler(contracts) as dry_run:
                return await dry_run.prospect(terms)
    except (GridError, TimeoutError):
        return None


async def _job_conditions(contracts: Contracts, job_file: JobFile, key: str | None) -> Conditions:
    from deepsquare_chain.client.submission import submission_time

    now = await submission_time(contracts)
    return job_file.conditions(now, repeatable=key is not None)


@command(app)
async def quote(
    context: CommandContext,
    file: JobFilePath,
    credits: CreditsOption = None,
    time_limit: LimitOption = None,
    lenient: LenientOption = False,
) -> None:
    """Show what a job would cost at each provider, how long it could run, and when it may start."""
    from deepsquare_chain.client.offers import offers

    _, terms = _read(context, file, credits, time_limit, lenient)
    async with context.grid() as contracts:
        quoted_offers = await offers(contracts, terms)
        eligible = any(offer.eligible for offer in quoted_offers)
        prospect = await _prospect(contracts, terms) if eligible else None
    expected = {} if prospect is None else prospect.starts_in
    if prospect is not None:
        context.printer.note(prospect.text)
    elif eligible:
        context.printer.note("Its place in the queue could not be determined; try again later.")
    context.printer.rows(
        _QUOTES,
        (
            row_of(
                _QUOTES,
                offer,
                expected_in=expected.get(offer.provider_id),
                grams=None if offer.grams is None else round(offer.grams, 1),
                reason=offer.refusal,
            )
            for offer in quoted_offers
        ),
        empty="No provider is registered.",
    )


@command(app, sends=True)
async def submit(
    context: CommandContext,
    file: JobFilePath,
    credits: CreditsOption = None,
    time_limit: LimitOption = None,
    array: Annotated[
        str | None,
        typer.Option(
            metavar="INDICES",
            help="A job for each index: 20, 1-20, 1-20%4 (at most 4 at once), 0-9:3, 1,3,7.",
        ),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="Environment variable of the job; may be repeated."
        ),
    ] = None,
    depends: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND:JOB",
            help="Run after other jobs: afterok, afterany or afternotok, then IDs, ranges, names.",
        ),
    ] = None,
    encrypt: Annotated[
        bool,
        typer.Option(
            "--encrypt",
            help="Encrypt log and results to your own key, which is created if missing.",
        ),
    ] = False,
    recipient: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="Encrypt log and results to this public age key (age1...); may be repeated.",
        ),
    ] = None,
    secret: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=FILE]",
            help="Secret variable, encrypted to the providers: NAME of the environment, or NAME=FILE; may be repeated.",
        ),
    ] = None,
    lenient: LenientOption = False,
    permit: Annotated[
        bool, typer.Option("--permit", help="Sign a permit instead of sending an approval.")
    ] = False,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="Idempotency key: a repeated submission with this key is paid only once.",
        ),
    ] = None,
    gasless: GaslessOption = False,
    yes: YesOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything without paying.")
    ] = False,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait", help="Show its output and wait for the end; exit with its exit code."
        ),
    ] = False,
    wait_timeout: WaitTimeoutOption = None,
) -> int | None:
    """Pay for a job and submit it to the grid's queue."""
    from deepsquare_chain.cli.job import wait_for_all
    from deepsquare_chain.client.gateways import request_notifications
    from deepsquare_chain.client.submission import (
        bill,
        earlier_submission,
        parse_array,
        parse_depends,
        refuse_relayed_key,
        request_of,
        submission_id,
        submit,
    )
    from deepsquare_chain.job import spell_ids
    from deepsquare_chain.store.gateway_client import GatewayDefinitionStore
    from deepsquare_chain.workflow import digest

    if context.unsigned is not None:
        _refuse_with_unsigned(permit=permit, wait=wait, key=key is not None)
    indices = None if array is None else parse_array(array)
    job_file, terms = _read(context, file, credits, time_limit, lenient)
    definition = _encrypted(
        *(context, job_file.definition.with_env(_variables(env)) if env else job_file.definition),
        *(encrypt, recipient or ()),
    )
    async with (
        open_sending(context, gasless=gasless, yes=yes) as wallet,
        _definition_store(context, wallet) as store,
    ):
        gateways = store.gateways if isinstance(store, GatewayDefinitionStore) else ()
        if not gasless:
            refuse_relayed_key(wallet.store, key)
        submission = submission_id(wallet.address, key) if indices else ""
        after = await parse_depends(
            wallet.contracts, [*job_file.depends_on, *(depends or ())], lambda: wallet.address
        )
        definition, terms = await _with_secrets(wallet, definition, terms, secret or (), key)
        request = request_of(
            definition,
            terms,
            array=indices,
            submission=submission,
            after=after,
            job_conditions=await _job_conditions(wallet.contracts, job_file, key),
        )
        requests = [request]
        submitted_jobs = await earlier_submission(
            wallet.contracts, wallet.sender, requests, key, context.settings.timeout
        )
        if submitted_jobs is not None:
            context.printer.note(f"The key {key!r} was used before: nothing more is paid.")
        else:
            cost = await bill(
                wallet.contracts,
                wallet.address,
                requests,
                gasless=gasless or bool(context.unsigned),
            )
            cost.check()
            await _warn(context, wallet.contracts, terms, store)
            _announce(context, cost, permit=permit or gasless, gasless=gasless)
            if dry_run:
                context.printer.note("Dry run: nothing was sent.")
                if context.printer.style is not Format.TABLE:
                    context.printer.record(_BILL, row_of(_BILL, cost, gas=cost.gas_wei))
                return None
            # Stored before the payment, so that a job that starts immediately is not missed.
            if not context.unsigned:
                await request_notifications(
                    context.settings,
                    wallet.store,
                    gateways,
                    [digest(content).hex() for content in request.definitions],
                    job_file.notify,
                )
            submitted_jobs = await submit(
                wallet.contracts,
                wallet.sender,
                store,
                requests,
                permit=wallet.account if permit else None,
                timeout=context.settings.timeout,
                key=key,
            )
        if context.unsigned:
            return None
        tx_hash = submitted_jobs.receipts[-1].hash
        array_indices = indices.indices if indices else (None,)
        job_ids = submitted_jobs.job_ids
        submitted = [
            (job_id, terms.name, index, terms.amount, submission, digest(data).hex(), tx_hash)
            for job_id, index, data in zip(job_ids, array_indices, request.definitions, strict=True)
        ]
        if not wait:
            context.printer.rows(_SUBMITTED, submitted)
            _advise(context, submission, after)
            return None
        context.printer.note(
            f"Submitted and paid for: job{'s' * (len(submitted) > 1)} "
            f"{spell_ids(job_ids).replace(':', ', ')}{submission and f' ({submission})'}."
        )
        try:
            return await wait_for_all(
                *(context, wallet.contracts, job_ids, wait_timeout),
                gateways=gateways,
                wallet=wallet,
            )
        except BaseException:
            # The jobs are paid for: print their IDs even if the wait fails or is interrupted.
            context.printer.rows(_SUBMITTED, submitted)
            raise


def _refuse_with_unsigned(**given: bool) -> None:
    """Refuse options that need the account's key, or a submission by this command.

    Raises:
        UsageError: One of them was given.
    """

    reasons = {
        "permit": "a permit needs the key of the account",
        "wait": "this command submits nothing; use `deepsquare job watch` after the submission",
        "key": "only submissions of this command are recorded under their key",
    }
    for name, is_given in given.items():
        if is_given:
            raise UsageError(
                f"--{name} does not work with --unsigned: {reasons[name]}",
                hint=f"Leave out --{name}.",
            )


@asynccontextmanager
async def _definition_store(
    context: CommandContext, wallet: WalletConnection | GaslessWallet
) -> AsyncIterator[DefinitionStore]:
    """Open the store of definitions; with --unsigned, the settings' wallet signs in to gateways."""
    from deepsquare_chain.client.gateways import definitions_of
    from deepsquare_chain.client.network import open_account
    from deepsquare_chain.store.definitions import FolderDefinitionStore
    from deepsquare_chain.store.gateway_client import gateway_urls

    settings, deployment, account = context.settings, wallet.contracts.deployment, wallet.account
    if context.unsigned is not None and gateway_urls(settings, deployment):
        if settings.keystore is None and settings.signer is None:
            context.printer.note(
                "Warning: no gateway gets the definition, because no wallet is set that can sign in. "
                "Set the keystore of any wallet with credits."
            )
            yield FolderDefinitionStore(settings.store)
            return
        account = await open_account(settings)
        context.printer.note(f"{account.address} signs in to the gateway to upload the definition.")
    async with definitions_of(settings, deployment, account) as store:
        yield store


async def _warn(
    context: CommandContext, contracts: Contracts, terms: Terms, store: DefinitionStore
) -> None:
    """Print warnings if no provider can run the job or read its definition."""
    from deepsquare_chain.client.offers import cheapest, quotes
    from deepsquare_chain.store.definitions import FolderDefinitionStore

    if cheapest(await quotes(contracts, terms)) is None:
        context.printer.note(
            "Warning: no provider is eligible now; see `deepsquare quote`. The job "
            "would wait, and can be cancelled for a full refund."
        )
    if isinstance(store, FolderDefinitionStore) and not store.readers():
        context.printer.note(
            f"Warning: no provider is known to read definitions from {store.path} (setting "
            "store). If none does, the job waits and can be cancelled for a full refund."
        )


def _announce(context: CommandContext, due: Bill, *, permit: bool, gasless: bool) -> None:
    jobs = "" if due.jobs == 1 else f" for {due.jobs} jobs"
    total = format_credits(due.total)
    approval = "the allowance covers it"
    if due.approval:
        approval = f"{'signs a permit' if permit else 'sends an approval'} for exactly {total}"
    gas = "a relay pays the gas"
    if not gasless:
        gas = f"max gas {format_credits(due.gas_wei)} coin"
    context.printer.note(
        f"Escrowing {total} of {credit_count(due.balance)}{jobs}; {approval}; {gas}."
    )


def _variables(words: list[str]) -> dict[str, str]:

    variables = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not (name and separator):
            raise UsageError(
                f"--env {word[:60]!r} is not a variable", hint="Write NAME=VALUE, such as SEED=7."
            )
        variables[name] = value
    return variables


async def _with_secrets(
    wallet: WalletConnection | GaslessWallet,
    definition: Definition,
    terms: Terms,
    words: Sequence[str],
    key: str | None,
) -> tuple[Definition, Terms]:
    """Return the definition and terms with the secrets from the command line added."""
    from deepsquare_chain.client.job_file import read_secrets, with_secrets

    if not words:
        return definition, terms
    if key is not None:
        raise UsageError(
            "--secret and --key can't be combined: encrypted data differs each time",
            hint="Give only one of them.",
        )
    return await with_secrets(
        *(wallet.contracts, definition, terms, read_secrets(words)),
        customer=wallet.address,
        own=definition.recipients,
    )


def _encrypted(
    context: CommandContext, definition: Definition, own: bool, recipients: Sequence[str]
) -> Definition:
    """Return the definition with recipients of its output; creates the own key if it is missing."""
    from deepsquare_chain.store.encryption import ensure_result_key

    if not own:
        return definition.encrypted_to(recipients) if recipients else definition
    key, is_new = ensure_result_key(context.settings.result_key_file)
    if is_new:
        context.printer.note(
            f"Created a key for results in {key.path}: keep a copy; results can't be decrypted without it."
        )
    context.printer.note(f"Log and results are encrypted to {key.recipient}.")
    return definition.encrypted_to([key.recipient, *recipients])


def _advise(context: CommandContext, submission: str, after: Sequence[object]) -> None:
    """Print the next commands for arrays and for jobs with dependencies."""
    if submission:
        context.printer.note(
            f"All of them are {submission}: `deepsquare job watch {submission}`, and `logs`, "
            "`results` and `cancel` take it as well."
        )
    if after:
        context.printer.note(
            "It is assigned when its dependencies are met; `deepsquare job why` shows its state."
        )
