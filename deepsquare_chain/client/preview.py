"""Previews of requests before they are signed, decoded from the calldata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from deepsquare_chain.chain.bindings.abi import AbiError, interface
from deepsquare_chain.chain.bindings.calls import Call, plural
from deepsquare_chain.chain.bindings.records import read_terms
from deepsquare_chain.credits import credit_count
from deepsquare_chain.errors import UsageError
from deepsquare_chain.job import JobFlags, Terms

#: Descriptions of the flags that a customer can set.
FLAG_TEXTS: Final[Mapping[JobFlags, str]] = {
    JobFlags.UNTIL_SPENT: "runs until its credits are spent",
    JobFlags.NO_SELF_SCHEDULING: "providers can't assign it to themselves",
    JobFlags.INTERIM_PAYMENTS: "its provider may collect interim payments while it runs",
}

Rows = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Preview:
    """A request before its signature, as names and values for display.

    `call` describes the calldata; `request` the signer, the deadline and who pays the gas.
    """

    call: Rows
    request: Rows

    @property
    def rows(self) -> Rows:
        """Return all rows in order."""
        return (*self.call, *self.request)


def describe_call(call: Call) -> Rows:
    """Return function, terms and amounts of a customer's call to the MetaScheduler.

    Raises:
        UsageError: The call is to another contract, or to a function that is not for customers.
    """
    try:
        function, values = interface("MetaScheduler").read_call(call.data)
    except AbiError:
        raise UsageError(f"{call.label!r} is not a call of the MetaScheduler") from None
    header = (("function", function.name), ("contract", f"MetaScheduler at {call.to}"))
    match function.name:
        case "submitJobs" | "submitJobsWithPermit":
            return (*header, *_submission(values[0]))
        case "topUp" | "topUpWithPermit":
            job_id, customer, amount = values[:3]
            return (
                *header,
                ("job", f"{job_id}, of customer {customer}"),
                ("amount", f"{credit_count(amount)} into its escrow"),
            )
        case "cancel":
            return (*header, ("jobs", ", ".join(map(str, values[0]))))
        case "withdraw":
            return (*header, ("to", f"{values[0]} receives all credits that are parked"))
        case _:
            raise UsageError(f"{function.name} is not a function for customers")


def _submission(requests: tuple[Any, ...]) -> Rows:
    rows: list[tuple[str, str]] = []
    total = 0
    for values, definitions in requests:
        terms = read_terms(values)
        total += terms.amount * len(definitions)
        rows += _terms(terms, len(definitions))
        rows += [("definition", definition.hex()) for definition in dict.fromkeys(definitions)]
    return (*rows, ("amount", f"{credit_count(total)} into escrow"))


def _terms(terms: Terms, count: int) -> Rows:
    requested = terms.resources
    options = [words for flag, words in FLAG_TEXTS.items() if flag in terms.flags]
    resources = (
        f"{plural(requested.tasks, 'task')}, {plural(requested.cpus_per_task, 'CPU')} per task, "
        f"{requested.mem_per_cpu} MB per CPU, {plural(requested.gpus, 'GPU')} per job"
    )
    rows = (
        ("jobs", f"{plural(count, 'job')} named {terms.name!r}"),
        ("resources", resources),
        ("time limit", f"{terms.time_limit} s"),
        ("escrow", f"{credit_count(terms.amount)} per job"),
        ("retries", str(terms.retries)),
        ("objective", terms.objective.name.lower()),
        ("options", "; ".join(options)),
        ("requirements", terms.uses),
    )
    return tuple(row for row in rows if row[1])
