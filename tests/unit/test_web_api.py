"""The JSON API: its document is correct, its pages are complete, its errors disclose nothing."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import quote

import httpx2
import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from openapi_spec_validator import OpenAPIV31SpecValidator
from starlette.applications import Starlette

from deepsquare_chain.credits import parse_credits
from deepsquare_chain.errors import StoreError
from deepsquare_chain.indexer.queries import Index
from deepsquare_chain.observability.serving import MAX_CLIENTS, RateLimit
from deepsquare_chain.web.api import PREFIX, api_routes, document
from tests.support.index import Indexed
from tests.support.recorded import RecordedGrid, recorded_grid_with_all


@pytest.fixture(scope="module")
def grid() -> RecordedGrid:
    return recorded_grid_with_all()


@pytest.fixture(scope="module")
def whole(grid: RecordedGrid) -> Iterator[Indexed]:
    indexed = Indexed.of_grid(grid)
    indexed.read_all()
    yield indexed
    indexed.close()


@pytest.fixture
def own_index(grid: RecordedGrid) -> Iterator[Indexed]:
    """An index that the test may change; the last blocks are not indexed yet."""
    indexed = Indexed.of_grid(grid)
    blocks = sorted({event.block_number for event in grid.events})
    indexed.read(0, blocks[-8])
    yield indexed
    indexed.close()


def client(index: Any, **options: Any) -> httpx2.AsyncClient:
    """A client of an index's API; without a rate limit by default."""
    app = Starlette(routes=api_routes(index, **{"rate": 0, **options}))
    transport = httpx2.ASGITransport(app=app)
    return httpx2.AsyncClient(transport=transport, base_url=f"http://explorer{PREFIX}")


@pytest.fixture
async def ask(whole: Indexed) -> AsyncIterator[httpx2.AsyncClient]:
    async with client(whole.index) as result:
        yield result


# -- the document


def test_the_document_is_valid_openapi() -> None:
    OpenAPIV31SpecValidator(document()).validate()


async def test_the_document_is_served(ask: httpx2.AsyncClient) -> None:
    answer = await ask.get("/openapi.json")
    assert answer.json() == json.loads(json.dumps(document()))
    assert (await ask.get(f"http://explorer{PREFIX}")).json() == answer.json()
    second = await ask.get("/openapi.json", headers={"If-None-Match": answer.headers["etag"]})
    assert (second.status_code, second.content) == (304, b"")


def examples(index: Index) -> dict[str, list[str]]:
    """Return a path with existing objects for every endpoint."""
    jobs = [row.id for row in index.jobs(limit=200).items]
    accounts = {row.customer for row in index.jobs(limit=200).items}
    providers = [row.account for row in index.providers()]
    hashes = [row.at.tx_hash for row in index.transactions(limit=200).items]
    blocks = [str(row.number) for row in index.blocks(limit=20).items]
    result = {
        "/jobs": ["/jobs", "/jobs?status=FINISHED&status=FAILED", "/jobs?name=job&limit=3"],
        "/jobs/{job}": [f"/jobs/{job}" for job in jobs],
        "/jobs/{job}/events": [f"/jobs/{job}/events" for job in jobs],
        "/accounts/{account}": [f"/accounts/{value}" for value in (*accounts, *providers)],
        "/accounts/{account}/statement": [f"/accounts/{account}/statement" for account in accounts],
        "/providers/{provider}": [f"/providers/{value}" for value in (1, 2, *providers)],
        "/providers/{account}/history": [
            f"/providers/{provider}/history" for provider in providers
        ],
        "/transactions": ["/transactions", f"/transactions?block={blocks[0]}"],
        "/transactions/{hash}": [f"/transactions/{item}" for item in hashes],
        "/blocks/{block}": [f"/blocks/{block}" for block in blocks],
        "/exceptions": ["/exceptions", "/exceptions?kind=jobs", "/exceptions?kind=panic"],
        "/search": ["/search?q=1", f"/search?q={providers[0]}", f"/search?q={hashes[0]}"],
    }
    return {path: result.get(path, [path]) for path in document()["paths"]}


async def test_every_response_matches_the_openapi_document(
    whole: Indexed, ask: httpx2.AsyncClient
) -> None:
    described = document()
    for path, queries in examples(whole.index).items():
        operation = described["paths"][path]["get"]
        schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
        checker = jsonschema.Draft202012Validator({**schema, "components": described["components"]})
        answers = [await ask.get(request) for request in queries]
        for answer in answers:
            assert answer.status_code == 200, answer.text
            checker.validate(answer.json())
        assert any(answer.json() for answer in answers), f"{path} was empty everywhere"


async def test_amounts_are_texts_with_their_decimals(
    whole: Indexed, ask: httpx2.AsyncClient
) -> None:
    rows = whole.index.jobs(limit=200).items
    job = next(row for row in rows if row.paid and row.retry_of is None)
    content = (await ask.get(f"/jobs/{job.id}")).json()
    assert content["row"]["paid"] == str(job.paid)
    assert parse_credits(content["row"]["paid_credits"]) == job.paid
    assert content["row"]["status"] == job.status.name
    submitted = next(event for event in content["events"] if event["name"] == "JobSubmitted")
    assert submitted["values"]["terms"]["amount"].isdigit()


# -- pages


LISTS = sorted(
    path
    for path, operations in document()["paths"].items()
    if any(parameter["name"] == "cursor" for parameter in operations["get"].get("parameters", ()))
)


@pytest.mark.parametrize("path", LISTS)
async def test_pages_show_every_row_once(
    whole: Indexed, ask: httpx2.AsyncClient, path: str
) -> None:
    queries = max(examples(whole.index)[path], key=len).partition("?")[0]
    all_items = (await ask.get(queries, params={"limit": 200})).json()["items"]
    results: list[Any] = []
    cursor: str | None = None
    while True:
        params = {"limit": 3, **({"cursor": cursor} if cursor else {})}
        page = (await ask.get(queries, params=params)).json()
        results += page["items"]
        if (cursor := page["next"]) is None:
            break
    assert results[: len(all_items)] == all_items
    assert len({json.dumps(item, sort_keys=True) for item in results}) == len(results)


async def test_new_rows_and_vanished_ones_leave_cursors_valid(own_index: Indexed) -> None:
    async with client(own_index.index) as ask:
        first = (await ask.get("/transitions", params={"limit": 4})).json()
        remaining = (await ask.get("/transitions", params={"cursor": first["next"]})).json()[
            "items"
        ]
        own_index.read(own_index.index.status().block + 1, own_index.last)
        repeated = (await ask.get("/transitions", params={"cursor": first["next"]})).json()["items"]
        assert repeated == remaining
        # The row of the cursor was removed by a reorg.
        own_index.roll_back(first["items"][-1]["at"]["block"] - 1)
        repeated = (await ask.get("/transitions", params={"cursor": first["next"]})).json()["items"]
        places = [(row["at"]["block"], row["at"]["log_index"]) for row in remaining]
        last_block = own_index.index.status().block
        assert [(row["at"]["block"], row["at"]["log_index"]) for row in repeated] == [
            place for place in places if place[0] <= last_block
        ]


async def test_a_cursor_of_another_list_is_refused(ask: httpx2.AsyncClient) -> None:
    cursor = (await ask.get("/jobs", params={"limit": 1})).json()["next"]
    answer = await ask.get("/transitions", params={"cursor": cursor})
    assert answer.status_code == 400
    assert "not a cursor of this list" in answer.json()["detail"]


# -- unchanged responses


@pytest.mark.parametrize("path", ["/jobs", "/jobs/1", "/overview", "/status", "/roles"])
async def test_an_unchanged_answer_is_not_sent_again(own_index: Indexed, path: str) -> None:
    async with client(own_index.index) as ask:
        tag = (await ask.get(path)).headers["etag"]
        known = {"If-None-Match": f'"other", {tag}'}
        repeated = await ask.get(path, headers=known)
        assert (repeated.status_code, repeated.content, repeated.headers["etag"]) == (304, b"", tag)
        own_index.read(own_index.index.status().block + 1, own_index.last)
        fresh = await ask.get(path, headers=known)
        assert fresh.status_code == 200
        assert fresh.headers["etag"] != tag
        own_index.roll_back(own_index.last - 1)
        after_reorg = await ask.get(path, headers={"If-None-Match": fresh.headers["etag"]})
        assert after_reorg.status_code == 200


# -- errors


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/jobs/0", 400, "job must be a number from 1"),
        ("/jobs/one", 400, "job must be a number"),
        ("/jobs/99999", 404, "Job 99999 does not exist"),
        (f"/jobs/{2**63}", 400, "job must be a number"),
        ("/jobs?limit=0", 400, "limit must be a number from 1 to 200"),
        ("/jobs?limit=1&limit=2", 400, "limit was given more than once"),
        ("/jobs?status=DONE", 400, "'DONE' is not a status: PENDING"),
        ("/jobs?status=NONE", 400, "'NONE' is not a status"),
        ("/jobs?state=PENDING", 400, "There is no parameter 'state'"),
        ("/jobs?customer=0x12", 400, "'0x12' is not a valid address"),
        ("/jobs?cursor=%00", 400, "not a cursor of this list"),
        ("/accounts/nobody", 400, "is not a valid address"),
        ("/providers/999", 404, "There is no provider 999"),
        ("/transactions/0x00", 404, "has no event of this grid"),
        ("/blocks/latest", 404, "has no event of this grid"),
        ("/blocks/99999999999999999999", 404, "has no event"),
        ("/series/jobs?buckets=501", 400, "buckets must be a number from 1 to 500"),
        ("/series/jobs?since=9&until=3", 400, "can't end before it begins"),
        ("/accounts/nobody/statement?oldest_first=yes", 400, "must be true or false"),
        (f"/search?q={'x' * 501}", 400, "longer than 500"),
        ("/exceptions?kind=odd", 400, "'odd' is not a kind of anomaly"),
        ("/nothing", 404, "This path is not in the API"),
        ("/jobs/1/nothing", 404, "This path is not in the API"),
    ],
)
async def test_errors_are_problems(
    ask: httpx2.AsyncClient, path: str, status: int, message: str
) -> None:
    answer = await ask.get(path)
    body = answer.json()
    assert (answer.status_code, body["status"]) == (status, status)
    assert answer.headers["content-type"] == "application/problem+json"
    assert message in body["detail"]
    problem = document()["components"]["schemas"]["Problem"]
    jsonschema.Draft202012Validator(problem).validate(body)


async def test_only_reading(ask: httpx2.AsyncClient) -> None:
    answer = await ask.post("/jobs", json={})
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
    assert answer.json()["title"] == "Method Not Allowed"
    head = await ask.head("/jobs")
    assert (head.status_code, head.content) == (200, b"")


class FailingIndex:
    """An index that fails."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        raise self._error


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("secret of /home/somebody"), 500),
        (StoreError("The database secret failed"), 503),
    ],
)
async def test_a_failure_reveals_nothing(error: Exception, status: int) -> None:
    async with client(FailingIndex(error)) as ask:
        answer = await ask.get("/jobs")
    assert answer.status_code == status
    assert "secret" not in answer.text
    assert (answer.headers.get("retry-after") is not None) == (status == 503)


@settings(max_examples=60)
@given(
    path=st.sampled_from(list(document()["paths"])),
    inside=st.text(max_size=70),
    query=st.dictionaries(
        st.sampled_from(
            ["cursor", "limit", "status", "customer", "name", "q", "since", "until", "buckets"]
        ),
        st.one_of(st.text(max_size=40), st.integers().map(str)),
        max_size=3,
    ),
)
@example(path="/blocks/{block}", inside="\x00\x1f\x7f/%?#\ud7ff", query={})
async def test_no_request_breaks_it(
    whole: Indexed, path: str, inside: str, query: dict[str, str]
) -> None:
    # Every character reaches the server, also those that must be encoded in a URL.
    segment = quote(inside, safe="")
    parts = [segment if part.startswith("{") else part for part in path.split("/")]
    async with client(whole.index) as ask:
        answer = await ask.get("/".join(parts), params=query)
    assert answer.status_code in {200, 400, 404}, answer.text


# -- limits


async def test_too_many_requests_get_a_retry_after(whole: Indexed) -> None:
    async with client(whole.index, rate=0.01, burst=3) as ask:
        answers = [await ask.get("/status") for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    # A hundred seconds, minus the time of the requests on a busy machine.
    assert 90 <= int(answers[-1].headers["retry-after"]) <= 100
    assert answers[-1].headers["content-type"] == "application/problem+json"


def test_a_bucket_fills_again() -> None:
    now = [0.0]
    limit = RateLimit(2.0, 4, clock=lambda: now[0])
    assert [limit.wait("a") for _ in range(4)] == [0.0] * 4
    assert limit.wait("a") == 0.5
    assert limit.wait("b") == 0.0  # each client has its own
    now[0] = 0.5
    assert [limit.wait("a"), limit.wait("a")] == [0.0, 0.5]
    now[0] = 1_000.0
    assert [limit.wait("a") for _ in range(5)] == [*[0.0] * 4, 0.5]


def test_a_client_has_one_bucket_for_its_network() -> None:
    limit = RateLimit(1.0, 1, clock=lambda: 0.0)
    assert limit.wait("2001:db8::1") == 0.0
    assert limit.wait("2001:db8::2") > 0
    assert limit.wait("2001:db8:0:1::2") == 0.0
    assert limit.wait("192.0.2.1") == 0.0
    assert limit.wait("192.0.2.2") == 0.0


def test_the_memory_of_clients_is_bounded() -> None:
    limit = RateLimit(1.0, 1, clock=lambda: 0.0)
    for number in range(MAX_CLIENTS + 50):
        limit.wait(f"client {number}")
    assert len(limit) == MAX_CLIENTS


def test_the_client_that_was_away_longest_is_forgotten() -> None:
    limit = RateLimit(1.0, 1, clients=2, clock=lambda: 0.0)
    assert [limit.wait("a"), limit.wait("b"), limit.wait("a")] == [0.0, 0.0, 1.0]
    assert limit.wait("c") == 0.0  # in place of b
    assert [len(limit), limit.wait("a"), limit.wait("b")] == [2, 1.0, 0.0]
