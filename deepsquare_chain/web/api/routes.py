"""What can be asked: one table of paths, each with its parameters, answer and question."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from deepsquare_chain.errors import UsageError
from deepsquare_chain.indexer import read_models as rows
from deepsquare_chain.indexer.anomalies import KINDS as EXCEPTION_KINDS
from deepsquare_chain.indexer.pagination import DEFAULT_LIMIT, MAX_LIMIT
from deepsquare_chain.indexer.queries import Index
from deepsquare_chain.indexer.series import MAX_BUCKETS
from deepsquare_chain.job import JobStatus

Arguments = Mapping[str, Any]
_MAX_TEXT: Final = 500
_MAX_INT: Final = 2**63 - 1
_DIGITS: Final = re.compile(r"[0-9]{1,19}")


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a path or query; `kind` is integer, string, boolean or statuses."""

    name: str
    kind: str
    text: str
    in_path: bool = False
    default: Any = None
    least: int = 0
    most: int = _MAX_INT

    def read(self, given: list[str]) -> Any:
        """The value of what was given.

        Raises:
            UsageError: It can't be meant.
        """
        if not given:
            return self.default
        if self.kind == "statuses":
            return [self._status(each) for each in given]
        if len(given) > 1:
            raise UsageError(f"{self.name} was given more than once")
        return self._one(given[0])

    def _one(self, text: str) -> Any:
        if len(text) > _MAX_TEXT:
            raise UsageError(f"{self.name} is longer than {_MAX_TEXT} characters")
        if self.kind == "boolean":
            if text not in {"true", "false"}:
                raise UsageError(f"{self.name} must be true or false")
            return text == "true"
        if self.kind == "integer":
            if not _DIGITS.fullmatch(text) or not self.least <= int(text) <= self.most:
                raise UsageError(
                    f"{self.name} must be a number from {self.least} to {self.most:,}, "
                    f"not {text[:40]!r}"
                )
            return int(text)
        return text

    def _status(self, text: str) -> JobStatus:
        try:
            found = JobStatus[text]
        except KeyError:
            found = JobStatus.NONE
        if found is JobStatus.NONE:
            names = ", ".join(each.name for each in JobStatus if each)
            raise UsageError(f"{text[:40]!r} is no status: {names}")
        return found


@dataclass(frozen=True, slots=True)
class Question:
    """A path and what answers it.

    `answer` is the type of what `ask` gives. With `timed` the answer also moves with every block
    that is indexed, not only with what happens in it; with `live` even with the chain's head.
    """

    path: str
    name: str
    text: str
    answer: Any
    ask: Callable[[Index, Arguments], Any]
    parameters: tuple[Parameter, ...] = ()
    timed: bool = False
    live: bool = False


_CURSOR: Final = Parameter("cursor", "string", "`next` of the page before.")
_LIMIT: Final = Parameter(
    "limit", "integer", "Rows of a page.", default=DEFAULT_LIMIT, least=1, most=MAX_LIMIT
)
_PAGE: Final = (_CURSOR, _LIMIT)
_SERIES: Final = (
    Parameter("buckets", "integer", "Steps.", default=60, least=1, most=MAX_BUCKETS),
    Parameter("since", "integer", "First time, in seconds; the first event's by default."),
    Parameter("until", "integer", "Last time, in seconds; the index's by default."),
)


def _path(name: str, kind: str, text: str) -> Parameter:
    return Parameter(name, kind, text, in_path=True)


def _filter(name: str, text: str, kind: str = "string") -> Parameter:
    return Parameter(name, kind, text)


def _block(index: Index, given: Arguments) -> rows.BlockDetail:
    which = given["block"]
    return index.block(int(which) if _DIGITS.fullmatch(which) else which)


def _provider(index: Index, given: Arguments) -> rows.ProviderDetail:
    which = given["provider"]
    return index.provider(int(which) if _DIGITS.fullmatch(which) else which)


_JOB: Final = Parameter("job", "integer", "Id of the job.", in_path=True, least=1)
_ACCOUNT: Final = _path("account", "string", "Address.")

QUESTIONS: Final = (
    Question(
        "/status",
        "getStatus",
        "How far the index is, and of which grid.",
        rows.Status,
        lambda index, _: index.status(),
        live=True,
    ),
    Question(
        "/overview",
        "getOverview",
        "The grid at a glance.",
        rows.Overview,
        lambda index, _: index.overview(),
        timed=True,
    ),
    Question(
        "/jobs",
        "listJobs",
        "Jobs, latest first.",
        rows.Page[rows.JobRow],
        lambda index, given: index.jobs(
            **{("statuses" if key == "status" else key): each for key, each in given.items()}
        ),
        (
            *_PAGE,
            Parameter("status", "statuses", "Any of these; may be repeated.", default=()),
            _filter("customer", "Address of who submitted them."),
            _filter("provider", "Account of who has or had them."),
            _filter("name", "Part of the name."),
            _filter("definition", "SHA-256 of the definition, in hexadecimal."),
        ),
    ),
    Question(
        "/jobs/{job}",
        "getJob",
        "Everything about a job.",
        rows.JobDetail,
        lambda index, given: index.job(given["job"]),
        (_JOB,),
    ),
    Question(
        "/jobs/{job}/events",
        "listEventsOfJob",
        "Events of a job, latest first.",
        rows.Page[rows.EventRow],
        lambda index, given: index.events(given["cursor"], given["limit"], job_id=given["job"]),
        (_JOB, *_PAGE),
    ),
    Question(
        "/transitions",
        "listTransitions",
        "Status changes of all jobs, latest first.",
        rows.Page[rows.TransitionRow],
        lambda index, given: index.transitions(**given),
        _PAGE,
    ),
    Question(
        "/events",
        "listEvents",
        "Events as the contracts told them, latest first.",
        rows.Page[rows.EventRow],
        lambda index, given: index.events(**given),
        _PAGE,
    ),
    Question(
        "/exceptions",
        "listExceptions",
        "What is lawful but worth a look, by the rules of `audit verify`, latest first.",
        rows.Page[rows.ExceptionRow],
        lambda index, given: index.exceptions(**given),
        (*_PAGE, _filter("kind", f"One of {', '.join(EXCEPTION_KINDS)}.")),
    ),
    Question(
        "/exceptions/open",
        "listOpenExceptions",
        "What stands open now without anybody having acted: overrun, idle and unanswered.",
        rows.OpenExceptions,
        lambda index, _: index.open_exceptions(),
        timed=True,
    ),
    Question(
        "/settlements",
        "listSettlements",
        "How escrows were divided, interim payments included, latest first.",
        rows.Page[rows.SettlementRow],
        lambda index, given: index.settlements(**given),
        (*_PAGE, _filter("provider", "Account of who was paid.")),
    ),
    Question(
        "/movements",
        "listMovements",
        "Lines of all statements, latest first.",
        rows.Page[rows.MovementRow],
        lambda index, given: index.movements(**given),
        _PAGE,
    ),
    Question(
        "/accounts/{account}",
        "getAccount",
        "What an address is to the grid.",
        rows.AccountRow,
        lambda index, given: index.account(given["account"]),
        (_ACCOUNT,),
    ),
    Question(
        "/accounts/{account}/statement",
        "listStatement",
        "All that an account paid and got, with the balance after each.",
        rows.Page[rows.MovementRow],
        lambda index, given: index.statement(**given),
        (
            _ACCOUNT,
            *_PAGE,
            Parameter("oldest_first", "boolean", "Oldest first.", default=False),
        ),
    ),
    Question(
        "/providers",
        "listProviders",
        "All providers.",
        tuple[rows.ProviderRow, ...],
        lambda index, _: index.providers(),
        timed=True,
    ),
    Question(
        "/providers/{provider}",
        "getProvider",
        "A provider with its history.",
        rows.ProviderDetail,
        _provider,
        (_path("provider", "string", "Its account or id."),),
        timed=True,
    ),
    Question(
        "/providers/{account}/history",
        "listProviderHistory",
        "Changes of a provider, latest first.",
        rows.Page[rows.ProviderChange],
        lambda index, given: index.provider_history(**given),
        (_ACCOUNT, *_PAGE, _filter("kind", "One kind of change, such as prices.")),
    ),
    Question(
        "/transactions",
        "listTransactions",
        "Transactions that made events of this grid, latest first.",
        rows.Page[rows.TransactionRow],
        lambda index, given: index.transactions(**given),
        (
            *_PAGE,
            _filter("sender", "Address of who sent them and paid their gas."),
            _filter("signer", "Address of who signed requests that relayers sent in them."),
            _filter("block", "Number of their block.", "integer"),
        ),
    ),
    Question(
        "/transactions/{hash}",
        "getTransaction",
        "A transaction with what it did.",
        rows.TransactionDetail,
        lambda index, given: index.transaction(given["hash"]),
        (_path("hash", "string", "Its hash."),),
    ),
    Question(
        "/blocks",
        "listBlocks",
        "Blocks with events of this grid, latest first.",
        rows.Page[rows.BlockRow],
        lambda index, given: index.blocks(**given),
        _PAGE,
    ),
    Question(
        "/blocks/{block}",
        "getBlock",
        "A block with its transactions.",
        rows.BlockDetail,
        _block,
        (_path("block", "string", "Its number or hash."),),
    ),
    Question(
        "/search",
        "search",
        "What a text can mean.",
        tuple[rows.Hit, ...],
        lambda index, given: index.search(given["q"]),
        (Parameter("q", "string", "Id, name, address, hash or number.", default=""),),
    ),
    Question(
        "/parameters",
        "getParameters",
        "Fee, timeouts and addresses, with the history of what can change.",
        rows.Parameters,
        lambda index, _: index.parameters(),
    ),
    Question(
        "/roles",
        "getRoles",
        "Who may do what, and how that came.",
        rows.Roles,
        lambda index, _: index.roles(),
    ),
    Question(
        "/series/jobs",
        "getJobsOverTime",
        "Jobs by status over time.",
        tuple[rows.StatusPoint, ...],
        lambda index, given: index.jobs_by_status_over_time(**given),
        _SERIES,
        timed=True,
    ),
    Question(
        "/series/escrow",
        "getEscrowOverTime",
        "Where credits were over time.",
        tuple[rows.EscrowPoint, ...],
        lambda index, given: index.escrow_over_time(**given),
        _SERIES,
        timed=True,
    ),
    Question(
        "/series/utilisation",
        "getUtilisation",
        "Cpu-seconds used and offered over time, by provider.",
        tuple[rows.Utilisation, ...],
        lambda index, given: index.utilisation(**given),
        (*_SERIES, _filter("account", "One provider alone.")),
        timed=True,
    ),
    Question(
        "/changes",
        "listChanges",
        "What changed after a change of this number.",
        rows.Changes,
        lambda index, given: index.changes(given["since"]),
        (Parameter("since", "integer", "Number of the last change known.", default=0),),
    ),
)
