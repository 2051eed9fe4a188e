"""Running a provider: register, offer, price, label, run, drain."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from deepsquare_chain.cli.doctor import print_checks
from deepsquare_chain.cli.frame import CommandContext, command
from deepsquare_chain.cli.output import Column, Kind
from deepsquare_chain.cli.types import (
    AccountArgument,
    AgreeOption,
    FromOption,
    MonthOption,
    ToOption,
    WaitTimeoutOption,
    label,
    price,
    size,
    whole,
)

if TYPE_CHECKING:
    from deepsquare_chain.job import Hardware, Prices, Provider

app = typer.Typer(help="Register, offer, price, label, run, drain, earn.", no_args_is_help=True)

_WRITTEN: Final = (Column("path", "written"),)
_PROVIDER: Final = (
    Column("id", "provider", Kind.NUMBER),
    Column("account", "account", Kind.HASH),
    Column("status", "status", Kind.WORD),
    Column("approved_until", "approved until (UTC)", Kind.TIME),
    Column("version", "version in force", Kind.NUMBER),
    Column("pending_version", "version proposed", Kind.NUMBER),
    Column("nodes", "nodes", Kind.NUMBER),
    Column("cpus_per_node", "CPUs per node", Kind.NUMBER),
    Column("mem_per_node", "MB per node", Kind.NUMBER),
    Column("gpus_per_node", "GPUs per node", Kind.NUMBER),
    Column("offer_cpus", "offered CPUs", Kind.NUMBER),
    Column("offer_memory", "offered MB", Kind.NUMBER),
    Column("offer_gpus", "offered GPUs", Kind.NUMBER),
    Column("price_cpu", "price per CPU-hour", Kind.RATE),
    Column("price_gpu", "price per GPU-hour", Kind.RATE),
    Column("price_mem", "price per MB-hour", Kind.RATE),
    Column("labels", "labels"),
    Column("silent", "unresponsive", Kind.FLAG),
)
_EARNINGS: Final = (
    Column("day", "period (UTC)"),
    Column("jobs", "jobs", Kind.NUMBER),
    Column("seconds", "billed (s)", Kind.NUMBER),
    Column("paid", "earned", Kind.CREDITS),
    Column("sum", "total", Kind.CREDITS),
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
    """What a line of earnings sums up."""

    DAY = "day"
    MONTH = "month"
    YEAR = "year"


#: How periods are written, which sorts them.
_SPANS: Final = {
    EarningsPeriod.DAY: "%Y-%m-%d",
    EarningsPeriod.MONTH: "%Y-%m",
    EarningsPeriod.YEAR: "%Y",
}
CpuPrice = Annotated[
    int | None,
    typer.Option("--cpu-price", parser=price, metavar="CREDITS", help="Per CPU and hour."),
]
GpuPrice = Annotated[
    int | None,
    typer.Option("--gpu-price", parser=price, metavar="CREDITS", help="Per GPU and hour."),
]
MemPrice = Annotated[
    int | None,
    typer.Option("--mem-price", parser=price, metavar="CREDITS", help="Per MB and hour."),
]
Labels = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="KEY=VALUE", help="May be repeated; replaces all labels."),
]


@command(app)
async def init(
    context: CommandContext,
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="From which the daemon is started.")
    ] = Path(),
    kind: Annotated[
        str, typer.Option("--for", metavar="EXECUTOR", help="Where jobs run: local or slurm.")
    ] = "local",
) -> None:
    """Write a commented configuration file, a systemd unit, alert rules and a dashboard."""
    from deepsquare_chain.client.provider_files import write_provider_files
    from deepsquare_chain.errors import UsageError
    from deepsquare_chain.executors.registry import executor_names

    if kind not in executor_names():
        raise UsageError(
            f"There is no executor {kind[:60]!r}",
            hint=f"Installed are: {', '.join(executor_names())}.",
        )
    written = write_provider_files(folder, kind)
    context.printer.rows(_WRITTEN, ((str(path),) for path in written))
    context.printer.note(
        f"Next: put the grid's record into {folder / 'deployment.json'}, make the wallet with "
        f"`deepsquare wallet new {folder / 'provider.json'}` and the file {folder / 'password'} with "
        "its password (chmod 600), set `store` to the folder that the grid's customers write "
        "definitions to, read the other settings, then `deepsquare provider register`."
    )


@command(app, sends=True)
async def register(
    context: CommandContext,
    cpu_price: CpuPrice = None,
    mem_price: MemPrice = None,
    nodes: Annotated[
        int | None,
        typer.Option(parser=whole(1), metavar="N", help="Nodes, all alike; 1 by default."),
    ] = None,
    cpus_per_node: Annotated[
        int | None, typer.Option(parser=whole(1), metavar="N", help="CPUs of a node; 1 by default.")
    ] = None,
    mem_per_node: Annotated[
        int | None,
        typer.Option(
            parser=size,
            metavar="SIZE",
            help="Memory of a node: MB, or such as 64G; 1024 by default.",
        ),
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(parser=whole(0), metavar="N", help="GPUs of a node; 0 by default.")
    ] = None,
    from_slurm: Annotated[
        bool,
        typer.Option(
            "--from-slurm",
            help="Read nodes, CPUs, memory and GPUs from Slurm; executor_options name partitions.",
        ),
    ] = False,
    gpu_price: GpuPrice = None,
    labels: Labels = None,
    yes: AgreeOption = False,
) -> None:
    """Register this wallet as a provider, or propose new hardware; then it awaits approval.

    Prices and labels that are not given stay as they are. The first time, --cpu-price and
    --mem-price are needed.
    """
    from deepsquare_chain.client import registration as words
    from deepsquare_chain.errors import NotFoundError
    from deepsquare_chain.job import Hardware

    given = (nodes, cpus_per_node, mem_per_node, gpus_per_node)
    doubts: list[str] = []
    missing: list[str] = []
    if from_slurm:
        hardware = await _slurm_hardware(context, given)
    else:
        hardware = Hardware(
            nodes or 1, cpus_per_node or 1, mem_per_node or 1024, gpus_per_node or 0
        )
        # Scripts may register from another machine, and an approver looks at it before it counts.
        missing += await _missing_hardware(context, hardware)
    async with context.wallet() as wallet:
        registry = wallet.contracts.registry
        try:
            now = await registry.provider_of(wallet.address)
        except NotFoundError:
            now = None
        prices = _prices(now, cpu_price, gpu_price, mem_price)
        pairs = dict(now.labels) if now and labels is None else _label_pairs(labels)
        if now is not None:
            doubts += [
                *words.hardware_changes(now, hardware),
                *words.price_changes(now.prices, prices),
                *words.label_changes(now.labels, pairs),
            ]
            if (now.hardware, now.prices, dict(now.labels)) == (hardware, prices, pairs):
                context.unchanged(
                    "The provider has this hardware, these prices and labels already."
                )
                return
        doubts += words.price_doubts(prices)
        missing += words.free_gpus(hardware, prices)
        context.printer.note(words.price_example(prices))
        if not context.agrees(doubts, yes=yes, warnings=missing):
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
    cpus: Annotated[int, typer.Option(parser=whole(0), metavar="N", help="In all.")],
    memory: Annotated[
        int, typer.Option(parser=size, metavar="SIZE", help="In all: MB, or such as 64G.")
    ],
    gpus: Annotated[int, typer.Option(parser=whole(0), metavar="N", help="In all.")] = 0,
) -> None:
    """Give all of the approved hardware to the grid, or less."""
    from deepsquare_chain.job import Offer

    async with context.wallet() as wallet:
        registry, wanted = wallet.contracts.registry, Offer(cpus, memory, gpus)
        if (await registry.provider_of(wallet.address)).offer == wanted:
            context.unchanged("The offer is that already.")
            return
        context.receipt(await wallet.send(registry.set_offer(wanted)))


@command(app, "price", sends=True)
async def set_price(
    context: CommandContext,
    cpu_price: CpuPrice = None,
    mem_price: MemPrice = None,
    gpu_price: GpuPrice = None,
    yes: AgreeOption = False,
) -> None:
    """Change the prices for jobs assigned from now on; one that is not given stays as it is."""
    from deepsquare_chain.client import registration as words
    from deepsquare_chain.errors import UsageError

    if cpu_price is mem_price is gpu_price is None:
        raise UsageError("No price was given", hint="Give --cpu-price, --gpu-price or --mem-price.")
    async with context.wallet() as wallet:
        registry = wallet.contracts.registry
        now = await registry.provider_of(wallet.address)
        prices = _prices(now, cpu_price, gpu_price, mem_price)
        if prices == now.prices:
            context.unchanged("The prices are these already.")
            return
        context.printer.note(words.price_example(prices))
        doubts = [*words.price_changes(now.prices, prices), *words.price_doubts(prices)]
        if context.agrees(doubts, yes=yes):
            context.receipt(await wallet.send(registry.set_prices(prices)))


@command(app, "labels", sends=True)
async def set_labels(
    context: CommandContext, labels: Labels = None, yes: AgreeOption = False
) -> None:
    """Replace all labels by those that are given; without any, remove all."""
    from deepsquare_chain.client.registration import label_changes

    pairs = _label_pairs(labels)
    async with context.wallet() as wallet:
        registry = wallet.contracts.registry
        now = await registry.provider_of(wallet.address)
        if pairs == dict(now.labels):
            context.unchanged("The labels are these already.")
        elif context.agrees(list(label_changes(now.labels, pairs)), yes=yes):
            context.receipt(await wallet.send(registry.set_labels(pairs)))


@command(app)
async def status(
    context: CommandContext,
    account: AccountArgument = None,
    everybody: Annotated[bool, typer.Option("--all", help="All providers.")] = False,
) -> None:
    """Show a provider as the registry knows it."""
    from deepsquare_chain.client.network import open_grid, own_address

    own = None if everybody else own_address(context.settings, account)
    async with open_grid(context.settings) as contracts:
        registry, scheduler = contracts.registry, contracts.scheduler
        found = await registry.providers() if own is None else [await registry.provider_of(own)]
        rows = [_row(each, silent=await scheduler.is_silent(each.id)) for each in found]
    if own is None:
        context.printer.rows(_PROVIDER, rows, empty="No provider is registered.")
    else:
        context.printer.record(_PROVIDER, rows[0])


@command(app, service=True)
async def run(context: CommandContext) -> None:
    """Run the provider's daemon until Ctrl-C: claim, start, watch and report jobs."""
    from deepsquare_chain.cli.services import provide

    await provide(context.settings)


@command(app, sends=True)
async def drain(
    context: CommandContext,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until no job is left with this provider.")
    ] = False,
    wait_timeout: WaitTimeoutOption = None,
) -> None:
    """Start maintenance: running jobs go on to their end, nothing new is accepted.

    Jobs that have not begun go back to the grid's queue. The daemon must run meanwhile; SIGUSR1
    does the same to it, SIGUSR2 what `resume` does.
    """
    from deepsquare_chain.client.maintenance import wait_until_empty
    from deepsquare_chain.job import ProviderStatus

    async with context.wallet() as wallet:
        registry = wallet.contracts.registry
        provider = await registry.provider_of(wallet.address)
        receipt = None
        if provider.status is not ProviderStatus.DRAINING:
            receipt = await wallet.send(registry.set_draining(True))
        if wait:
            await wait_until_empty(
                wallet.contracts, provider.id, timeout=wait_timeout, report=context.printer.note
            )
    if receipt is None:
        context.unchanged("The maintenance had begun already.")
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
    account: AccountArgument = None,
    everything: Annotated[bool, typer.Option("--all", help="Ended ones too.")] = False,
) -> None:
    """List the jobs that a provider holds."""
    from deepsquare_chain.client.job_list import newest
    from deepsquare_chain.client.network import open_grid, own_address
    from deepsquare_chain.job import JobStatus

    address = own_address(context.settings, account)
    wanted = {each for each in JobStatus if each.is_assigned or (everything and each.is_final)}
    async with open_grid(context.settings) as contracts:
        provider = await contracts.registry.provider_of(address)
        found = await newest(contracts, limit=500, provider_id=provider.id, statuses=wanted)
    context.printer.rows(
        _JOBS,
        (
            (j.id, h.name, j.status.name, j.customer, j.resources.cpus, j.rate, j.since)
            for j, h in found
        ),
        empty="This provider holds no jobs.",
    )


@command(app)
async def earnings(
    context: CommandContext,
    account: AccountArgument = None,
    by: Annotated[
        EarningsPeriod, typer.Option("--by", help="A line for each day, month or year, in UTC.")
    ] = EarningsPeriod.DAY,
    month: MonthOption = None,
    first: FromOption = None,
    last: ToOption = None,
) -> None:
    """Show what a provider earned, and what its runs accrued and have not billed.

    The last row is of jobs that are RUNNING: what they earned since their start or their last
    interim payment, and the largest part of it that one lost run would forfeit now.
    """
    from deepsquare_chain.client.earnings import accrued_now, earnings_by
    from deepsquare_chain.client.network import open_grid, own_address
    from deepsquare_chain.client.periods import Period, blocks_of, parse_period

    period = parse_period(month, first, last)
    address = own_address(context.settings, account)
    async with open_grid(context.settings) as contracts:
        provider = await contracts.registry.provider_of(address)
        since, until = await blocks_of(contracts.w3, period, contracts.deployment.block)
        days = await earnings_by(contracts, address, span=_SPANS[by], first=since, last=until)
        now = await accrued_now(contracts, provider.id)
    rows: list[tuple[object, ...]] = [
        (each.day, each.jobs, each.seconds, each.paid, each.sum, None, None) for each in days
    ]
    if now.runs and period == Period():
        earned = days[-1].sum if days else 0
        rows.append(("running", now.runs, None, None, earned, now.amount, now.at_risk))
    context.printer.rows(_EARNINGS, rows, empty=f"{address} has earned nothing yet.")


@command(app)
async def doctor(context: CommandContext, account: AccountArgument = None) -> int:
    """Look at all that a provider needs to get jobs; exit 1 if something is wrong."""
    from deepsquare_chain.client.doctor import examine
    from deepsquare_chain.client.network import own_address
    from deepsquare_chain.client.provider_doctor import examine_provider
    from deepsquare_chain.daemon.status import service_folder
    from deepsquare_chain.errors import GridError
    from deepsquare_chain.executors.base import ExecutorContext
    from deepsquare_chain.executors.registry import examine_executor
    from deepsquare_chain.job import Offer
    from deepsquare_chain.observability.probe import Check

    settings = context.settings
    try:
        address = own_address(settings, account)
        found = await examine_provider(settings, address)
    except GridError as error:
        if account is not None:
            raise
        # The provider's owner can't be determined: all else can still be examined.
        address = ""
        found = await examine(settings)
        found.append(Check("registration", False, error.message, error.hint, "keystore"))
    place = ExecutorContext(
        state_dir=service_folder(settings.state_dir, "provider", address),
        capacity=Offer(0, 0, 0),
        min_free=settings.disk_floor,
        owner=address,
        options=settings.executor_options,
        allow_unisolated=settings.allow_unisolated,
        allow_root=settings.allow_root,
        private=settings.private_paths,
    )
    found += await examine_executor(settings.executor, place)
    return print_checks(context, found)


def _prices(now: Provider | None, cpu: int | None, gpu: int | None, mem: int | None) -> Prices:
    """The prices that are wanted, completed by those that stand."""
    from deepsquare_chain.errors import UsageError
    from deepsquare_chain.job import Prices

    if now is None and (cpu is None or mem is None):
        raise UsageError(
            "The first registration needs a price per CPU and one per MB",
            hint="Give --cpu-price and --mem-price, in credits per hour.",
        )
    before = Prices(0, 0, 0) if now is None else now.prices
    return Prices(
        before.cpu if cpu is None else cpu,
        before.gpu if gpu is None else gpu,
        before.mem if mem is None else mem,
    )


def _label_pairs(labels: list[str] | None) -> dict[str, str]:
    from deepsquare_chain.client.registration import check_labels

    return check_labels([label(each) for each in labels or []])


async def _missing_hardware(context: CommandContext, wanted: Hardware) -> list[str]:
    """What would be registered and is not there, by what the executor runs jobs on."""
    from deepsquare_chain.client.registration import hardware_doubts, machine

    if context.settings.executor == "local":
        return list(hardware_doubts(wanted, machine(), "this machine"))
    if context.settings.executor == "slurm":
        from deepsquare_chain.executors.base import ExecutorError
        from deepsquare_chain.executors.slurm.client import read_nodes
        from deepsquare_chain.executors.slurm.options import parse_options
        from deepsquare_chain.executors.slurm.parsing import registered_hardware

        options = parse_options(context.settings.executor_options)
        try:
            found = registered_hardware(await read_nodes(options)).hardware
        except ExecutorError as error:
            return [f"The hardware could not be compared with the cluster: {error.message}."]
        return list(hardware_doubts(wanted, found, "the cluster"))
    return []


async def _slurm_hardware(context: CommandContext, given: tuple[int | None, ...]) -> Hardware:
    """The hardware of the Slurm cluster that this machine submits to."""
    from deepsquare_chain.chain.bindings.calls import plural
    from deepsquare_chain.errors import UsageError
    from deepsquare_chain.executors.slurm.client import read_nodes
    from deepsquare_chain.executors.slurm.options import parse_options
    from deepsquare_chain.executors.slurm.parsing import registered_hardware

    if any(number is not None for number in given):
        raise UsageError(
            "--from-slurm reads nodes, CPUs, memory and GPUs from Slurm",
            hint="Leave out --nodes, --cpus-per-node, --mem-per-node and --gpus-per-node.",
        )
    options = parse_options(context.settings.executor_options)
    found = registered_hardware(await read_nodes(options))
    hardware = found.hardware
    context.printer.note(
        f"Slurm has {plural(hardware.nodes, 'node')} with {plural(hardware.cpus_per_node, 'CPU')}, "
        f"{hardware.mem_per_node} MB and {plural(hardware.gpus_per_node, 'GPU')} each."
    )
    if found.left_out:
        names = ", ".join(found.left_out[:10]) + (" ..." if len(found.left_out) > 10 else "")
        context.printer.note(f"Left out, because they are down or smaller: {names}.")
    return hardware


def _row(provider: Provider, *, silent: bool) -> tuple[object, ...]:
    hardware, given, prices = provider.hardware, provider.offer, provider.prices
    return (
        provider.id,
        provider.account,
        provider.status.name,
        provider.approved_until or None,
        provider.version,
        provider.pending_version,
        hardware.nodes,
        hardware.cpus_per_node,
        hardware.mem_per_node,
        hardware.gpus_per_node,
        given.cpus,
        given.memory,
        given.gpus,
        prices.cpu,
        prices.gpu,
        prices.mem,
        " ".join(f"{key}={value}" for key, value in sorted(provider.labels.items())),
        silent,
    )
