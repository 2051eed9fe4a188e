"""The faucet over HTTP, with a sender that only records transactions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import httpx2
import pytest
from eth_utils.address import to_checksum_address

from deepsquare_chain.chain.bindings.calls import Call
from deepsquare_chain.devnet.grid import CREDIT_WEI, GAS_WEI, Faucet, faucet_app
from deepsquare_chain.errors import InsufficientFundsError
from deepsquare_chain.observability.serving import LoopbackServer

SOMEBODY = "0x" + "ab" * 20


@dataclass
class Sent:
    hash: str


@dataclass
class Recorder:
    """A fake of both the sender and the Credit contract."""

    calls: list[Call] = field(default_factory=list)
    #: First words of the labels of calls that fail.
    broken: tuple[str, ...] = ()
    keys: dict[str, Sent] = field(default_factory=dict)

    async def send(self, call: Call, *, key: str) -> Sent:
        await asyncio.sleep(0)
        if call.label.split()[0] in self.broken:
            raise InsufficientFundsError("The faucet is empty.", hint="Restart the devnet.")
        if key not in self.keys:
            self.calls.append(call)
            self.keys[key] = Sent(f"0x{len(self.calls):064x}")
        return self.keys[key]

    def mint(self, to: str, amount: int) -> Call:
        return Call("0xcredit", to.encode(), f"mint {amount}")


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
async def http(recorder: Recorder) -> AsyncIterator[httpx2.AsyncClient]:
    server = LoopbackServer(faucet_app(Faucet(recorder, recorder)))
    await server.start()
    async with httpx2.AsyncClient(base_url=server.url) as client:
        yield client
    await server.stop()


async def test_pays_gas_and_credits(http: httpx2.AsyncClient, recorder: Recorder) -> None:
    answer = await http.post("/", json={"address": SOMEBODY})
    assert answer.status_code == 200
    receiver = to_checksum_address(SOMEBODY)
    assert answer.json() == {
        "address": receiver,
        "gas_wei": str(GAS_WEI),
        "credit_wei": str(CREDIT_WEI),
        "transactions": [f"0x{1:064x}", f"0x{2:064x}"],
    }
    gas, mint = recorder.calls
    assert (gas.to, gas.value, gas.data) == (receiver, GAS_WEI, b"")
    assert (mint.data, mint.label) == (receiver.encode(), f"mint {CREDIT_WEI}")


async def test_pays_an_address_once_in_a_while(
    http: httpx2.AsyncClient, recorder: Recorder
) -> None:
    answers = await asyncio.gather(*(http.post("/", json={"address": SOMEBODY}) for _ in range(3)))
    assert sorted(answer.status_code for answer in answers) == [200, 429, 429]
    assert len(recorder.calls) == 2
    assert (await http.post("/", json={"address": "0x" + "cd" * 20})).status_code == 200
    refusal = next(answer for answer in answers if answer.status_code == 429).json()
    assert "recently paid" in refusal["error"]
    assert "10 seconds" in refusal["hint"]


@pytest.mark.parametrize("broken", ["gas", "mint", ("gas", "mint")], ids=["gas", "credits", "both"])
async def test_a_failed_payment_is_completed_and_no_part_is_paid_twice(
    http: httpx2.AsyncClient, recorder: Recorder, broken: str | tuple[str, ...]
) -> None:
    recorder.broken = (broken,) if isinstance(broken, str) else broken
    answer = await http.post("/", json={"address": SOMEBODY})
    assert answer.status_code == 503
    assert answer.json() == {"error": "The faucet is empty.", "hint": "Restart the devnet."}
    recorder.broken = ()
    assert (await http.post("/", json={"address": SOMEBODY})).status_code == 200
    assert sorted(call.label.split()[0] for call in recorder.calls) == ["gas", "mint"]


async def test_invalid_requests_are_refused(http: httpx2.AsyncClient, recorder: Recorder) -> None:
    for body in (5, {}, {"address": 5}, {"address": "0x12"}, {"address": SOMEBODY[:-1] + "Z"}):
        assert (await http.post("/", json=body)).status_code == 400, body
    json_type = {"content-type": "application/json"}
    for content in (b"", b"{", b"[" * 900, b" " * 2_000 + b"{}"):
        answer = await http.post("/", content=content, headers=json_type)
        assert answer.status_code == 400
    form = {"content-type": "text/plain"}
    plain = await http.post("/", content=b'{"address":"' + SOMEBODY.encode() + b'"}', headers=form)
    assert plain.status_code == 400
    response = await http.post("/", json={"address": SOMEBODY}, headers={"host": "evil.example"})
    assert response.status_code == 400
    assert recorder.calls == []
