"""The contract classes: views return our types, methods that change state return a `Call`."""

from __future__ import annotations

from typing import Any

from web3 import AsyncWeb3

from deepsquare_chain.chain.bindings.calls import Call, ContractBase
from deepsquare_chain.chain.bindings.credit import UNLIMITED, CreditContract, Permit
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.bindings.forwarder import ForwarderContract
from deepsquare_chain.chain.bindings.records import Clock, Parameters, Report
from deepsquare_chain.chain.bindings.registry import RegistryContract
from deepsquare_chain.chain.bindings.roles import APPROVER_ROLE, METASCHEDULER_ROLE, MINTER_ROLE
from deepsquare_chain.chain.bindings.scheduler import MetaSchedulerContract

__all__ = [
    "APPROVER_ROLE",
    "METASCHEDULER_ROLE",
    "MINTER_ROLE",
    "UNLIMITED",
    "Call",
    "Clock",
    "ContractBase",
    "Contracts",
    "CreditContract",
    "ForwarderContract",
    "MetaSchedulerContract",
    "Parameters",
    "Permit",
    "RegistryContract",
    "Report",
]


class Contracts:
    """The contracts of a deployment."""

    def __init__(self, w3: AsyncWeb3[Any], deployment: Deployment) -> None:
        self.w3 = w3
        self.deployment = deployment
        self.credit = CreditContract(w3, deployment.credit)
        self.registry = RegistryContract(w3, deployment.registry)
        self.scheduler = MetaSchedulerContract(w3, deployment.scheduler)
        self.forwarder = ForwarderContract(w3, deployment.forwarder)

    @property
    def addresses(self) -> tuple[str, str, str]:
        """Contracts whose events are read: credit, registry, scheduler."""
        return (self.credit.address, self.registry.address, self.scheduler.address)
