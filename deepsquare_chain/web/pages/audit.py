"""The audit page: whether the sums match the contracts now, and anomalies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from hexbytes import HexBytes
from starlette.requests import Request
from starlette.responses import Response
from web3.exceptions import Web3Exception

from deepsquare_chain.audit.anomalies import Subject
from deepsquare_chain.audit.conservation import NodeRequest, Side, call
from deepsquare_chain.chain.bindings.abi import AbiError, interface
from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.errors import GridError
from deepsquare_chain.indexer.read_models import Overview
from deepsquare_chain.web import views
from deepsquare_chain.web.pages.common import page_of, render_page, run_query, site_of

_ALL: Final = "all"
_SETUP: Final = 200


async def audit(request: Request) -> Response:
    """The audit page: conservation, index status and anomalies."""
    site = site_of(request)
    chosen = request.query_params.get("of", _ALL)
    kind = None if chosen == _ALL else chosen
    # List anomalies of the set-up separately: they would fill the first page.
    setup = (
        await run_query(site.index.anomalies, limit=_SETUP, setup=True) if kind is None else None
    )
    page = await run_query(
        site.index.anomalies, page_of(request), kind=kind, setup=False if kind is None else None
    )
    overview = await run_query(site.index.overview)
    return await render_page(
        request,
        "audit.html",
        overview=overview,
        equations=await equations(site.contracts, overview),
        open_anomalies=await run_query(site.index.open_anomalies),
        listing=page,
        setup=setup.items if setup is not None else (),
        chosen=chosen,
        kinds=[_ALL, *Subject],
        link_addresses=views.link_addresses,
    )


@dataclass(frozen=True, slots=True)
class Equation:
    """The sum of events (`expected`) and the value in a contract (`actual`); amounts in credit-wei.

    `actual` is None if the node can't read it, for instance because the state of the block is pruned.
    """

    title: str
    expected: Side
    actual: int | None
    repeat: NodeRequest

    @property
    def difference(self) -> int | None:
        """`actual` minus the sum of events; nonzero means an inconsistency."""
        return None if self.actual is None else self.actual - self.expected.amount


async def equations(contracts: Contracts, overview: Overview) -> tuple[Equation, ...]:
    """Compare the supply and the scheduler's balance with the events, at the overview's block."""
    supply = Side("events", (("minted", overview.minted), ("burned", -overview.burned)))
    owed = [("in escrow", overview.escrow), ("withdrawable", overview.parked)]
    if overview.donated:
        owed.append(("sent to it by mistake", overview.donated))
    block, scheduler = max(overview.block, 0), contracts.scheduler.address
    return (
        await _equation(contracts, "Supply of credits", supply, block, "totalSupply"),
        await _equation(
            contracts,
            "Balance of the MetaScheduler",
            Side("events", tuple(owed)),
            block,
            "balanceOf",
            scheduler,
        ),
    )


async def _equation(
    contracts: Contracts, title: str, expected: Side, block: int, name: str, *arguments: Any
) -> Equation:
    repeat = call(contracts.deployment, "Credit", block, name, *arguments)
    function = interface("Credit").function(name)
    body: Any = {
        "to": contracts.credit.address,
        "data": HexBytes(function.encode(*arguments)),
    }
    try:
        (value,) = function.decode(bytes(await contracts.w3.eth.call(body, block)))
    except (GridError, Web3Exception, AbiError):
        value = None
    return Equation(title, expected, value, repeat)
