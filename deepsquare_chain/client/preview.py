"""What a customer is about to sign, read from the very bytes of the call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from deepsquare_chain.chain.bindings.abi import AbiError, interface
from deepsquare_chain.chain.bindings.calls import Call, plural
from deepsquare_chain.chain.bindings.records import read_terms
from deepsquare_chain.credits import format_credits
from deepsquare_chain.errors import UsageError
from deepsquare_chain.job import JobFlags, Terms

_FLAGS: Final = {
    JobFlags.UNTIL_SPENT: "runs until its credits are spent",
    JobFlags.NO_SELF_SCHEDULING: "providers can't assign it to themselves",
    JobFlags.INTERIM_PAYMENTS: "its provider may collect payments while it runs",
}

Rows = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Preview:
    """A request before its signature: names and values for people.

    `call` holds what the calldata says, `request` what surrounds it: who signs, until when, who
    pays the gas.
    """

    call: Rows
    request: Rows

    @property
    def rows(self) -> Rows:
        """All of it, in order."""
        return (*self.call, *self.request)


def describe_call(call: Call) -> Rows:
    """The function, terms and amounts of a customer's call to the MetaScheduler.

    Raises:
        UsageError: It is no such call.
    """
    try:
        function, values = interface("MetaScheduler").read_call(call.data)
    except AbiError:
        raise UsageError(f"{call.label!r} is no call of the MetaScheduler") from None
    head = (("function", function.name), ("contract", f"MetaScheduler at {call.to}"))
    match function.name:
        case "submitJobs" | "submitJobsWithPermit":
            return (*head, *_submission(values[0]))
        case "topUp" | "topUpWithPermit":
            job_id, customer, amount = values[:3]
            return (
                *head,
                ("job", f"{job_id}, of customer {customer}"),
                ("amount", f"{format_credits(amount)} credits into its escrow"),
            )
        case "cancel":
            return (*head, ("jobs", ", ".join(map(str, values[0]))))
        case "withdraw":
            return (*head, ("to", f"{values[0]} gets all credits that are parked"))
        case _:
            raise UsageError(f"{function.name} is no function for customers")


def _submission(requests: tuple[Any, ...]) -> Rows:
    rows: list[tuple[str, str]] = []
    total = 0
    for values, definitions in requests:
        terms = read_terms(values)
        total += terms.amount * len(definitions)
        rows += _terms(terms, len(definitions))
        rows += [("definition", definition.hex()) for definition in dict.fromkeys(definitions)]
    return (*rows, ("amount", f"{format_credits(total)} credits into escrow"))


def _terms(terms: Terms, count: int) -> Rows:
    size = terms.resources
    options = [words for flag, words in _FLAGS.items() if flag in terms.flags]
    resources = (
        f"{plural(size.tasks, 'task')}, {size.cpus_per_task} CPUs per task, "
        f"{size.mem_per_cpu} MB per CPU, {size.gpus} GPUs per job"
    )
    rows = (
        ("jobs", f"{plural(count, 'job')} named {terms.name!r}"),
        ("resources", resources),
        ("time limit", f"{terms.time_limit} s"),
        ("escrow", f"{format_credits(terms.amount)} credits per job"),
        ("retries", str(terms.retries)),
        ("objective", terms.objective.name.lower()),
        ("options", "; ".join(options)),
        ("requirements", terms.uses),
    )
    return tuple(row for row in rows if row[1])
