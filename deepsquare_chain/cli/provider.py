"""Commands for providers: register, offer, price, label, run, drain, earnings."""

from __future__ import annotations

from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from deepsquare_chain.cli.config import print_checks
from deepsquare_chain.cli.frame import CommandContext, command
from deepsquare_chain.cli.output import Column, Kind, row_of
from deepsquare_chain.cli.types import (
    AccountArgument,
    AgreeOption,
    FromOption,
    MonthOption,
    ProviderArgument,
    ToOption,
    WaitTimeoutOption,
    label,
    number_option,
    price,
    size,
)
from deepsquare_chain.errors import GridError, NotFoundError, UsageError

if TYPE_CHECKING:
    from deepsquare_chain.executors.slurm.parsing import FoundHardware
    from deepsquare_chain.job import Hardware, Prices, Provider

app = typer.Typer()

_WRITTEN: Final = (Column("path", "written"),)
_PROVIDER: Final = (
    Column("id", "provider", Kind.NUMBER),
    Column("account", "account", Kind.HASH),
    Column("status", "status", Kind.WORD),
    Column("approved_until", "approved until (UTC)", Kind.TIME, detail=True),
    Column("version", "current version", Kind.NUMBER, detail=True),
    Column("pending_version", "proposed version", Kind.NUMBER, detail=True),
    Column("nodes", "nodes", Kind.NUMBER, detail=True),
    Column("cpus_per_node", "CPUs per node", Kind.NUMBER, detail=True),
    Column("mem_per_node", "MB per node", Kind.NUMBER, detail=True),
    Column("gpus_per_node", "GPUs per node", Kind.NUMBER, detail=True),
    Column("offer_cpus", "offered CPUs", Kind.NUMBER),
    Column("offer_memory", "offered MB", Kind.NUMBER),
    Column("offer_gpus", "offered GPUs", Kind.NUMBER),
    Column("price_cpu", "price per CPU-hour", Kind.RATE),
    Column("price_gpu", "price per GPU-hour", Kind.RATE, detail=True),
    Column("price_mem", "price per MB-hour", Kind.RATE, detail=True),
    Column("labels", "labels", detail=True),
    Column("silent", "unresponsive", Kind.FLAG, detail=True),
)
_EARNINGS: Final = (
    Column("period", "period (UTC)"),
    Column("jobs", "jobs", Kind.NUMBER),
    Column("billed_seconds", "billed (s)", Kind.NUMBER),
    Column("paid", "earned", Kind.CREDITS),
    Column("total", "total", Kind.CREDITS),
    Column("accrued", "accrued, not billed", Kind.CREDITS),
    Column("at_risk", "at risk in one run", Kind.CREDITS),
)
_JOBS: Final = (
    Column("id", "job", Kind.NUMBER),
    Column("name", "name"),
    Column("status", "status", Kind.WORD),
    Column("customer", "customer", Kind.HASH),
    Column("cpus", "CPUs", Kind.NUMBER),
    Column("rate", "rate", Kind.RATE),
    Column("since", "last change (UTC)", Kind.TIME, detail=True),
)


class EarningsPeriod(StrEnum):
    """The period that a row of earnings covers."""

    DAY = "day"
    MONTH = "month"
    YEAR = "year"


#: `strftime` formats of periods, whose text order is chronological.
_SPANS: Final = {
    EarningsPeriod.DAY: "%Y-%m-%d",
    EarningsPeriod.MONTH: "%Y-%m",
    EarningsPeriod.YEAR: "%Y",
}


def _price_option(unit: str) -> Any:
    return typer.Option(parser=price, metavar="CREDITS", help=f"Per {unit} and hour.")


CpuPrice = Annotated[int | None, _price_option("CPU")]
GpuPrice = Annotated[int | None, _price_option("GPU")]
MemPrice = Annotated[int | None, _price_option("MB")]
Labels = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="KEY=VALUE", help="May be repeated; replaces all labels."),
]


@command(app)
async def init(
    context: CommandContext,
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder in which the daemon is started.")
    ] = Path(),
    kind: Annotated[
        str, typer.Option("--for", metavar="EXECUTOR", help="Executor: local or slurm.")
    ] = "local",
) -> None:
    """Write a commented configuration file, a systemd unit, alert rules and a dashboard."""
    from deepsquare_chain.client.registration import write_provider_files
    from deepsquare_chain.executors.base import executor_names

    if kind not in executor_names():
        raise UsageError(
            f"There is no executor {kind[:60]!r}",
            hint=f"Installed executors: {', '.join(executor_names())}.",
        )
    paths = write_provider_files(folder, kind)
    context.printer.rows(_WRITTEN, ((str(path),) for path in paths))
    context.printer.note(
        f"Next: put the grid's record into {folder / 'deployment.json'}, make the wallet with "
        f"`deepsquare wallet new {folder / 'provider.json'}` and the file {folder / 'password'} with "
        "its password (chmod 600), set `gateway` to that of the grid, or `store` to the folder in "
        "which its customers store definitions, read the other settings, then "
        "`deepsquare provider register`."
    )


@command(app, sends=True)
async def register(
    context: CommandContext,
    cpu_price: CpuPrice = None,
    mem_price: MemPrice = None,
    nodes: Annotated[int | None, number_option("Number of equal nodes.", 1)] = None,
    cpus_per_node: Annotated[int | None, number_option("CPUs of a node.", 1)] = None,
    mem_per_node: Annotated[
        int | None,
        typer.Option(
            parser=size, metavar="SIZE", help="Memory of a node: MB, or a size such as 64G."
        ),
    ] = None,
    gpus_per_node: Annotated[int | None, number_option("GPUs of a node.", 0)] = None,
    from_slurm: Annotated[
        bool,
        typer.Option(
            "--from-slurm",
            help="Read nodes, CPUs, memory and GPUs from Slurm; executor_options select partitions.",
        ),
    ] = False,
    gpu_price: GpuPrice = None,
    labels: Labels = None,
    yes: AgreeOption = False,
) -> None:
    """Register this wallet as a provider, or propose new hardware; an approver must approve it.

    Hardware, prices and labels that are not given remain unchanged. The first registration requires
    --cpu-price and --mem-price; it reads hardware that is not given from this machine, or from Slurm
    with the executor slurm.
    """
    from deepsquare_chain.client import registration

    given = (nodes, cpus_per_node, mem_per_node, gpus_per_node)
    risks: list[str] = []
    warnings: list[str] = []
    if from_slurm and any(number is not None for number in given):
        raise UsageError(
            "--from-slurm reads nodes, CPUs, memory and GPUs from Slurm",
            hint="Leave out --nodes, --cpus-per-node, --mem-per-node and --gpus-per-node.",
        )
    async with context.wallet() as wallet:
        registry = wallet.contracts.registry
        try:
            registered = await registry.provider_of(wallet.address)
        except NotFoundError:
            registered = None
        latest = None if registered is None else await registry.registered_hardware(wallet.address)
        prices = _prices(registered, cpu_price, gpu_price, mem_price)
        pairs = dict(registered.labels) if registered and labels is None else _label_pairs(labels)
        if from_slurm:
            hardware = await _slurm_hardware(context)
        else:
            hardware = await _hardware(context, latest, given)
            # Only a warning: scripts may register from another machine, and an approver reviews it.
            warnings += await _missing_hardware(context, hardware)
        if registered is not None:
            if (latest, registered.prices, dict(registered.labels)) == (hardware, prices, pairs):
                context.unchanged(
                    "The provider already has this hardware, these prices and labels."
                )
                return
            risks += [
                *registration.hardware_changes(registered, hardware),
                *registration.price_changes(registered.prices, prices, large=True),
                *registration.label_changes(registered.labels, pairs),
            ]
            warnings += registration.price_changes(registered.prices, prices, large=False)
            warnings.append(
                f"Provider {registered.id} is registered: the new registration replaces version "
                f"{registered.pending_version} and needs an approval."
            )
        risks += registration.price_warnings(prices)
        warnings += registration.free_gpus(hardware, prices)
        context.printer.note(registration.price_example(prices))
        if not context.confirm_all(risks, yes=yes, warnings=warnings):
            return
        receipt = await wallet.send(registry.register(hardware, prices, pairs))
        if context.unsigned:
            return
        provider = await registry.provider_of(wallet.address)
    context.receipt(receipt)
    context.printer.note(
        f"Version {provider.pending_version} of its hardware awaits "
        f"`deepsquare admin approve {provider.account} --version {provider.pending_version}`."
    )


@command(app, sends=True)
async def offer(
    context: CommandContext,
    cpus: Annotated[int, number_option("In all.", 0)],
    memory: Annotated[
        int, typer.Option(parser=size, metavar="SIZE", help="Total: MB, or a size such as 64G.")
    ],
    gpus: Annotated[int, number_option("In all.", 0)] = 0,
) -> None:
    """Offer all or part of the approved hardware to the grid."""
    from deepsquare_chain.job import Offer

    async with context.wallet() as wallet:
        registry, new_offer = wallet.contracts.registry, Offer(cpus, memory, gpus)
        if (await registry.provider_of(wallet.address)).offer == new_offer:
            context.unchanged("The offer is unchanged.")
            return
        context.receipt(await wallet.send(registry.set_offer(new_offer)))


@command(app, "price", sends=True)
async def set_price(
    context: CommandContext,
    cpu_price: CpuPrice = None,
    mem_price: MemPrice = None,
    gpu_price: GpuPrice = None,
    yes: AgreeOption = False,
) -> None:
    """Set the prices of jobs assigned from now on; prices that are not given remain unchanged."""
    from deepsquare_chain.client import registration

    if cpu_price is mem_price is gpu_price is None:
        raise UsageError("No price was given", hint="Give --cpu-price, --gpu-price or --mem-price.")
    async with context.wallet() as wallet:
        registry = wallet.contracts.registry
        provider = await registry.provider_of(wallet.address)
        prices = _prices(provider, cpu_price, gpu_price, mem_price)
        if prices == provider.prices:
            context.unchanged("The prices are unchanged.")
            return
        context.printer.note(registration.price_example(prices))
        risks = [
            *registration.price_changes(provider.prices, prices, large=True),
            *registration.price_warnings(prices),
        ]
        changes = list(registration.price_changes(provider.prices, prices, large=False))
        if context.confirm_all(risks, yes=yes, warnings=changes):
            context.receipt(await wallet.send(registry.set_prices(prices)))


@command(app, "labels", sends=True)
async def set_labels(
    context: CommandContext, labels: Labels = None, yes: AgreeOption = False
) -> None:
    """Replace all labels with the given ones; without any, remove all."""
    from deepsquare_chain.client.registration import label_changes

    pairs = _label_pairs(labels)
    async with context.wallet() as wallet:
        registry = wallet.contracts.registry
        provider = await registry.provider_of(wallet.address)
        if pairs == dict(provider.labels):
            context.unchanged("The labels are unchanged.")
        elif context.confirm_all(list(label_changes(provider.labels, pairs)), yes=yes):
            context.receipt(await wallet.send(registry.set_labels(pairs)))


@command(app)
async def status(
    context: CommandContext,
    provider: ProviderArgument = None,
    everybody: Annotated[bool, typer.Option("--all", help="All providers.")] = False,
) -> None:
    """Show the registry's data of a provider."""
    from deepsquare_chain.client.network import selected_provider

    async with context.grid() as contracts:
        registry, scheduler = contracts.registry, contracts.scheduler
        selected = (
            await registry.providers()
            if everybody
            else [await selected_provider(contracts, context.settings, provider)]
        )
        rows = [_row(item, silent=await scheduler.is_silent(item.id)) for item in selected]
    if everybody:
        context.printer.rows(_PROVIDER, rows, empty="No provider is registered.")
    else:
        context.printer.record(_PROVIDER, rows[0])


@command(app, service=True)
async def run(context: CommandContext) -> None:
    """Run the provider's daemon until Ctrl-C: claim, start, monitor and report jobs."""
    from deepsquare_chain.cli.services import provide

    await provide(context.settings)


@command(app, sends=True)
async def drain(
    context: CommandContext,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until no job is assigned to this provider.")
    ] = False,
    wait_timeout: WaitTimeoutOption = None,
) -> None:
    """Start maintenance: running jobs continue to their end, new jobs are not accepted.

    Jobs that have not started return to the grid's queue. The daemon must keep running.
    The signal SIGUSR1 to the daemon has the same effect, and SIGUSR2 that of `resume`.
    """
    from deepsquare_chain.client.jobs import wait_until_empty
    from deepsquare_chain.job import ProviderStatus

    async with context.wallet() as wallet:
        registry = wallet.contracts.registry
        provider = await registry.provider_of(wallet.address)
        receipt = None
        if provider.status is not ProviderStatus.DRAINING:
            receipt = await wallet.send(registry.set_draining(True))
        if wait and not context.unsigned:
            await wait_until_empty(
                wallet.contracts, provider.id, timeout=wait_timeout, report=context.printer.note
            )
    if receipt is None:
        context.unchanged("The maintenance has already started.")
    else:
        context.receipt(receipt)


@command(app, sends=True)
async def resume(context: CommandContext) -> None:
    """End maintenance."""
    from deepsquare_chain.job import ProviderStatus

    async with context.wallet() as wallet:
        provider = await wallet.contracts.registry.provider_of(wallet.address)
        if provider.status is ProviderStatus.ACTIVE:
            context.unchanged("The provider is not in maintenance.")
            return
        context.receipt(await wallet.send(wallet.contracts.registry.set_draining(False)))


@command(app)
async def jobs(
    context: CommandContext,
    provider: ProviderArgument = None,
    everything: Annotated[bool, typer.Option("--all", help="Include ended jobs.")] = False,
) -> None:
    """List the jobs that are assigned to a provider."""
    from deepsquare_chain.client.jobs import newest
    from deepsquare_chain.client.network import selected_provider
    from deepsquare_chain.job import JobStatus

    statuses = {
        status for status in JobStatus if status.is_assigned or (everything and status.is_final)
    }
    async with context.grid() as contracts:
        selected = await selected_provider(contracts, context.settings, provider)
        listed_jobs = await newest(contracts, limit=500, provider_id=selected.id, statuses=statuses)
    context.printer.rows(
        _JOBS,
        (
            (j.id, h.name, j.status.name, j.customer, j.resources.cpus, j.rate, j.since)
            for j, h in listed_jobs
        ),
        empty="This provider has no jobs.",
    )


@command(app)
async def earnings(
    context: CommandContext,
    provider: ProviderArgument = None,
    by: Annotated[
        EarningsPeriod, typer.Option(help="Period of each line, in UTC.")
    ] = EarningsPeriod.DAY,
    month: MonthOption = None,
    first: FromOption = None,
    last: ToOption = None,
) -> None:
    """Show a provider's earnings, and the amount that running jobs accrued but have not billed.

    The last row covers RUNNING jobs: the amount since their start or last interim payment, and
    the largest part of it that the loss of one run would forfeit now.
    """
    from deepsquare_chain.client.jobs import accrued_now, earnings_by
    from deepsquare_chain.client.network import selected_provider
    from deepsquare_chain.client.periods import Period, blocks_of, parse_period

    period = parse_period(month, first, last)
    async with context.grid() as contracts:
        selected = await selected_provider(contracts, context.settings, provider)
        address = selected.account
        since, until = await blocks_of(contracts.w3, period, contracts.deployment.block)
        days = await earnings_by(contracts, address, span=_SPANS[by], first=since, last=until)
        accrued = await accrued_now(contracts, selected.id)
    rows: list[tuple[object, ...]] = [
        (day.day, day.jobs, day.seconds, day.paid, day.sum, None, None) for day in days
    ]
    if accrued.runs and period == Period():
        earned = days[-1].sum if days else 0
        rows.append(("running", accrued.runs, None, None, earned, accrued.amount, accrued.at_risk))
    context.printer.rows(_EARNINGS, rows, empty=f"{address} has no earnings yet.")


@command(app)
async def doctor(context: CommandContext, account: AccountArgument = None) -> int:
    """Check everything that a provider needs to get jobs; exit 1 if something is wrong."""
    from deepsquare_chain.client.doctor import examine, examine_provider, failed_check
    from deepsquare_chain.client.network import own_address
    from deepsquare_chain.daemon.loop import service_folder
    from deepsquare_chain.executors.base import ExecutorContext, examine_executor
    from deepsquare_chain.job import Offer

    settings = context.settings
    try:
        address = own_address(settings, account)
        checks = await examine_provider(settings, address)
    except GridError as error:
        if account is not None:
            raise
        # The provider's account is unknown: run the checks that do not need it.
        address = ""
        checks = [*await examine(settings), failed_check("registration", error, "keystore")]
    executor_context = ExecutorContext(
        state_dir=service_folder(settings.state_dir, "provider", address),
        capacity=Offer(0, 0, 0),
        min_free=settings.disk_floor,
        owner=address,
        options=settings.executor_options,
        allow_unisolated=settings.allow_unisolated,
        allow_root=settings.allow_root,
        private=settings.private_paths,
    )
    checks += await examine_executor(settings.executor, executor_context)
    return print_checks(context, checks)


def _prices(now: Provider | None, cpu: int | None, gpu: int | None, mem: int | None) -> Prices:
    """Return the given prices; the current ones replace those that were not given."""
    from deepsquare_chain.job import Prices

    if now is None and (cpu is None or mem is None):
        raise UsageError(
            "The first registration needs a price per CPU and one per MB",
            hint="Give --cpu-price and --mem-price, in credits per hour.",
        )
    current = Prices(0, 0, 0) if now is None else now.prices
    given = {"cpu": cpu, "gpu": gpu, "mem": mem}
    return replace(current, **{name: price for name, price in given.items() if price is not None})


def _label_pairs(labels: list[str] | None) -> dict[str, str]:
    from deepsquare_chain.client.registration import check_labels

    return check_labels([label(text) for text in labels or []])


async def _missing_hardware(context: CommandContext, wanted: Hardware) -> list[str]:
    """Return warnings about hardware that this machine or the Slurm cluster does not have."""
    from deepsquare_chain.client.registration import hardware_warnings, machine

    if context.settings.executor == "local":
        return list(hardware_warnings(wanted, machine(), "this machine"))
    if context.settings.executor == "slurm":
        from deepsquare_chain.executors.base import ExecutorError

        try:
            available = (await _registered_slurm_hardware(context)).hardware
        except ExecutorError as error:
            return [f"The hardware could not be compared with the cluster: {error.message}."]
        return list(hardware_warnings(wanted, available, "the cluster"))
    return []


async def _registered_slurm_hardware(context: CommandContext) -> FoundHardware:
    from deepsquare_chain.executors.slurm.client import read_nodes
    from deepsquare_chain.executors.slurm.options import parse_options
    from deepsquare_chain.executors.slurm.parsing import registered_hardware

    options = parse_options(context.settings.executor_options)
    return registered_hardware(await read_nodes(options))


async def _hardware(
    context: CommandContext, registered: Hardware | None, given: tuple[int | None, ...]
) -> Hardware:
    """Return the given hardware; what is not given is as registered, or read from where jobs run.

    Raises:
        UsageError: The executor's hardware can't be read, and not all of it is given.
    """
    from deepsquare_chain.chain.bindings.calls import plural
    from deepsquare_chain.client.registration import machine
    from deepsquare_chain.job import Hardware

    if registered is not None:
        base = registered
    elif context.settings.executor == "slurm" and None in given:
        base = await _slurm_hardware(context)
    else:
        base = machine()
        if None in given:
            if context.settings.executor != "local":
                raise UsageError(
                    f"The hardware of the executor {context.settings.executor} can't be read",
                    hint="Give --nodes, --cpus-per-node, --mem-per-node and --gpus-per-node.",
                )
            context.printer.note(
                f"This machine has {plural(base.cpus_per_node, 'CPU')}, {base.mem_per_node} MB and "
                f"{plural(base.gpus_per_node, 'GPU')}."
            )
    numbers = (base.nodes, base.cpus_per_node, base.mem_per_node, base.gpus_per_node)
    return Hardware(
        *(own if number is None else number for number, own in zip(given, numbers, strict=True))
    )


async def _slurm_hardware(context: CommandContext) -> Hardware:
    """Return the hardware of the Slurm cluster that this machine submits to."""
    from deepsquare_chain.chain.bindings.calls import plural

    registered = await _registered_slurm_hardware(context)
    hardware = registered.hardware
    context.printer.note(
        f"Slurm has {plural(hardware.nodes, 'node')} with {plural(hardware.cpus_per_node, 'CPU')}, "
        f"{hardware.mem_per_node} MB and {plural(hardware.gpus_per_node, 'GPU')} each."
    )
    if registered.left_out:
        names = ", ".join(registered.left_out[:10])
        names += " ..." if len(registered.left_out) > 10 else ""
        context.printer.note(f"Skipped, because they are down or smaller: {names}.")
    return hardware


def _row(provider: Provider, *, silent: bool) -> tuple[object, ...]:
    offer, prices = provider.offer, provider.prices
    return row_of(
        _PROVIDER,
        provider,
        **asdict(provider.hardware),
        status=provider.status.name,
        approved_until=provider.approved_until or None,
        offer_cpus=offer.cpus,
        offer_memory=offer.memory,
        offer_gpus=offer.gpus,
        price_cpu=prices.cpu,
        price_gpu=prices.gpu,
        price_mem=prices.mem,
        labels=" ".join(f"{key}={value}" for key, value in sorted(provider.labels.items())),
        silent=silent,
    )
