"""Pure parts of the explorer: formats, charts, decoding, findings and access checks."""

from __future__ import annotations

from functools import partial
from typing import Any, cast
from xml.etree import ElementTree

import httpx2
import pytest
from eth_utils import to_checksum_address
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import escape
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from deepsquare_chain.audit.bill import recompute_bill
from deepsquare_chain.audit.entries import JobEntry
from deepsquare_chain.chain.bindings.abi import interface
from deepsquare_chain.chain.bindings.calls import Call
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.bindings.forwarder import ForwardedCall
from deepsquare_chain.client.offers import OVER_BUDGET, PricedOffer
from deepsquare_chain.credits import CREDIT, format_credits
from deepsquare_chain.errors import JobFileError, UsageError
from deepsquare_chain.indexer.block_data import outcomes
from deepsquare_chain.indexer.read_models import (
    JobDetail,
    JobRow,
    MovementRow,
    Place,
    ProviderChange,
    ProviderFigures,
    ProviderRow,
    StatusPoint,
    TransitionRow,
    UsePoint,
    Utilisation,
)
from deepsquare_chain.job import (
    Hardware,
    JobFlags,
    JobStatus,
    Load,
    Objective,
    Offer,
    Prices,
    ProviderStatus,
    Resources,
    Terms,
)
from deepsquare_chain.web import charts, formats, lookup
from deepsquare_chain.web.lookup import (
    decode_call,
    find_view,
    read_argument,
    signed_requests,
)
from deepsquare_chain.web.pages import accounts as accounts_page
from deepsquare_chain.web.pages import grid as grid_page
from deepsquare_chain.web.pages import jobs as jobs_page
from deepsquare_chain.web.pages.accounts import CombinedMovements, combine_movements
from deepsquare_chain.web.pages.jobs import eligibility_of
from deepsquare_chain.web.pages.wallet import (
    call_json,
    form_as_file,
    offers_in_words,
    problems,
    read_job,
    signature_of,
)
from deepsquare_chain.web.security import is_same_origin
from deepsquare_chain.web.server import Address
from deepsquare_chain.web.site import Link, Site, environment

ALICE = "0x" + "A1" * 20
HOST = "0x" + "B2" * 20
ANYWHERE = "0.0.0.0"  # noqa: S104 - what is judged
S = JobStatus


# -- formats


@pytest.mark.parametrize(
    ("wei", "whole", "part"),
    [
        (0, "0", ".00"),
        (CREDIT, "1", ".00"),
        (15 * CREDIT // 10, "1", ".50"),
        (-CREDIT // 3, "\u22120", ".333333"),
        (1, "0", ".000000000000000001"),
        (12_345_678 * CREDIT + 4_256 * 10**12, "12\u2009345\u2009678", ".004256"),
    ],
)
def test_amounts_are_grouped_and_cut_but_never_rounded(wei: int, whole: str, part: str) -> None:
    assert formats.amount(wei) == (whole, part)


@given(st.integers(min_value=-(2**200), max_value=2**200))
def test_a_shown_amount_begins_like_the_exact_one(wei: int) -> None:
    whole, part = formats.amount(wei)
    plain = (whole + part).replace("\u2009", "").replace("\u2212", "-")
    exact = format_credits(wei)
    exact = exact if "." in exact else exact + "."
    assert plain.rstrip("0").startswith(exact[: len(plain.rstrip("0"))].rstrip("0"))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59, "59 s"), (60, "1 min"), (3_725, "1 h 2 min"), (90_000, "1 d 1 h")],
)
def test_durations_have_two_units(seconds: int, text: str) -> None:
    assert formats.duration(seconds).replace("\u00a0", " ") == text


def test_ages_may_be_in_the_past_or_the_future() -> None:
    assert formats.ago(100, 101) == "now"
    assert formats.ago(0, 7_300) == "2\u00a0h ago"
    assert formats.ago(400, 100) == "in 5\u00a0min"


def test_times_beyond_the_calendar_stay_numbers() -> None:
    assert formats.clock(2**60) == str(2**60)
    assert formats.iso(2**60) == ""
    assert formats.clock(1_700_000_000) == "2023-11-14 22:13:20"


def test_untrusted_texts_cannot_change_the_direction_of_a_line() -> None:
    assert formats.visible("a\u202eb\x07\u200bc\ufeff") == "a\\u202eb\\u0007\\u200bc\\ufeff"
    assert formats.code("a\n\tb\x1b") == "a\n\tb\\u001b"
    assert formats.visible("Zürich 日本 🙂") == "Zürich 日本 🙂"


def test_hashes_are_shortened_and_names_are_not() -> None:
    assert formats.short("0x" + "ab" * 32) == "0xababab\u2026abab"
    assert formats.short("hello") == "hello"


@given(st.text())
def test_visible_text_is_escaped_by_templates(text: str) -> None:
    rendered = environment().from_string("{{ text|visible }}").render(text=text)
    assert rendered == str(escape(formats.visible(text)))
    assert "<" not in rendered


# -- charts


@given(st.floats(min_value=1e-8, max_value=1e12))
def test_an_axis_ends_above_and_not_far(maximum: float) -> None:
    assert maximum <= charts.axis_end(maximum) * (1 + 1e-12)
    assert charts.axis_end(maximum) <= 2.5 * maximum
    assert charts.axis_end(0) == charts.axis_end(5e-324) == 1


def path_of(chart: charts.Chart, css: str) -> list[tuple[float, float]]:
    shape = next(shape for shape in chart.shapes if shape.css == css)
    points = shape.points.strip("MZ").split("L")
    return [(float(x), float(y)) for x, y in (point.split() for point in points)]


def test_layers_are_stacked_in_steps() -> None:
    chart = charts.time_chart(
        "two",
        [0, 10, 20],
        [charts.Series("a", "a", [1, 2, 2]), charts.Series("b", "b", [0, 2, 8])],
        stacked=True,
    )
    top = path_of(chart, "b")[:5]
    # A value holds until the next: 1 until 10, 4 until 20, then 10.
    assert top == [(0, 90), (500, 90), (500, 60), (1_000, 60), (1_000, 0)]
    assert chart.ticks == ("10", "5", "0")
    assert chart.rows == (("00:00:00", "1", "0"), ("00:00:10", "2", "2"), ("00:00:20", "2", "8"))
    assert chart.tooltips[1].text == "00:00:10: a 2, b 2"


@given(
    st.lists(st.integers(0, 10**6), max_size=40),
    st.lists(st.floats(0, 1e9, allow_nan=False), max_size=40),
)
def test_drawings_stay_in_their_box(times: list[int], values: list[float]) -> None:
    times = sorted(times)[: len(values)]
    series = [charts.Series("x", "line", values[: len(times)])]
    for chart in (
        charts.time_chart("s", times, series),
        charts.time_chart("s", times, series, stacked=True),
    ):
        for shape in chart.shapes:
            for x, y in path_of(chart, shape.css):
                assert 0 <= x <= charts.WIDTH
                assert -0.01 <= y <= charts.HEIGHT + 0.01


def test_a_waterfall_ends_where_it_should() -> None:
    flows = [("in", "in", 100), ("paid", "paid", -30), ("back", "back", -60)]
    steps = charts.waterfall(flows, total=("left", "held", 10))
    drawn = [(step.x, step.width) for step in steps]
    assert drawn == [(0, 1_000), (700, 300), (100, 600), (0, 100)]
    flows = [("in", "in", 10**18), ("fee", "fee", -1)]
    sliver = charts.waterfall(flows, total=("left", "held", 10**18 - 1))[1]
    assert sliver.width == 3.0


def test_a_strip_shows_all_parts() -> None:
    segments = charts.timeline([("a", 0, "x"), ("b", 1_000, "y"), ("c", 1, "z")])
    assert all(span.width >= 14 for span in segments)
    assert abs(segments[-1].x + segments[-1].width - charts.WIDTH) < 1
    assert charts.timeline([]) == ()


def test_drawings_are_wellformed_and_have_texts() -> None:
    evil = '<script>"&'
    chart = charts.time_chart(evil, [0, 5], [charts.Series(evil, "line", [1, 2])])
    template = environment().from_string(
        '{% import "charts.html" as c %}<div>{{ c.time_chart(x) }}{{ c.bars(b) }}</div>'
    )
    rendered = template.render(x=chart, b=[charts.Bar(evil, 0.5, "50 %")])
    tree = ElementTree.fromstring(rendered)  # noqa: S314 - it is ours
    svg = tree.find(".//svg[@role='img']")
    assert svg is not None
    assert svg.get("aria-label") == evil
    assert len(tree.findall(".//tbody/tr")) == 2
    assert "style=" not in rendered


# -- views


def place(block: int = 1, time: int = 100) -> Place:
    return Place(block, time, "0x" + "00" * 32, 0, True)


def detail(**changes: Any) -> JobDetail:
    row = {
        "id": 1,
        "name": "x",
        "customer": ALICE,
        "provider": HOST,
        "status": S.FINISHED,
        "resources": Resources(1, 1, 100, 0),
        "time_limit": 60,
        "flags": JobFlags.NONE,
        "objective": Objective.COST,
        "rate": 1_000,
        "funded": 100_000,
        "escrow": 0,
        "paid": 38_000,
        "fee": 2_000,
        "refunded": 60_000,
        "billed_seconds": 40,
        "submitted_at": 100,
        "started_at": 110,
        "ended_at": 150,
        "retry_of": None,
        "successor": None,
        "changed": place(),
    }
    defaults = {
        "definition": "00" * 32,
        "uses": "",
        "fee_bps": 500,
        "retries_left": 0,
        "carried_in": 0,
        "carried_out": 0,
        "collected_paid": 0,
        "collected_fee": 0,
        "collected_seconds": 0,
        "allotment": 60,
        "exit_code": 0,
        "result": "",
        "reason": "",
        "transitions": (),
        "payments": (),
        "movements": (),
        "events": (),
        "more_events": False,
        "line": (),
        "challenge": None,
    }
    row |= {key: value for key, value in changes.items() if key in row}
    defaults |= {key: value for key, value in changes.items() if key in defaults}
    return JobDetail(row=JobRow(**row), **defaults)


def entry(**changes: Any) -> JobEntry:
    resources = Resources(1, 1, 100, 0)
    terms = Terms(100_000, 60, resources, 0, JobFlags.NONE, Objective.COST, "x", "")
    state = {
        "status": S.FINISHED,
        "provider": HOST,
        "rate": 1_000,
        "fee_bps": 500,
        "time_limit": 60,
        "funded": 100_000,
        "paid": 38_000,
        "fee": 2_000,
        "refunded": 60_000,
        "billed_seconds": 40,
        "submitted_at": 100,
        "started_at": 110,
        "ended_at": 150,
        "exit_code": 0,
    }
    return JobEntry(1, ALICE, bytes(32), terms, **{**state, **changes})


def test_a_right_bill_agrees() -> None:
    bill = recompute_bill(entry())
    assert bill.cost == 40_000
    assert [line.expected for line in bill.lines] == [38_000, 2_000, 60_000, 0]
    assert bill.ok


@pytest.mark.parametrize(
    "change",
    [
        {"paid": 38_001},
        {"fee": 1_999},
        {"refunded": 59_999},
        {"billed_seconds": 39},
        {"ended_at": 149},  # fewer seconds passed than were billed
        {"time_limit": 39},
        {"rate": 999},
    ],
)
def test_a_wrong_bill_differs(change: dict[str, int]) -> None:
    assert not recompute_bill(entry(**change)).ok


def test_a_bill_exists_at_the_end_and_includes_the_predecessor() -> None:
    assert not recompute_bill(entry(status=S.RUNNING)).settled
    zero_amounts = {"paid": 0, "fee": 0, "refunded": 0, "billed_seconds": 0}
    bill = recompute_bill(entry(status=S.PANICKED, carried_out=100_000, **zero_amounts))
    assert bill.settled
    assert bill.ok


def test_a_running_job_is_billed_up_to_its_allotment() -> None:
    running = entry(status=S.RUNNING, since=110)
    assert recompute_bill(running, now=120).cost == 10_000
    assert recompute_bill(running, now=10_000).cost == 60_000
    assert recompute_bill(entry(status=S.PENDING, started_at=0), now=120).cost == 0


def test_interim_payments_are_not_accrued_again() -> None:
    sums = {"collected_seconds": 15, "collected_paid": 14_250, "collected_fee": 750}
    job = detail(status=S.RUNNING, allotment=45, collected_seconds=15)
    assert (job.billed_until, job.deadline) == (125, 170)
    running = entry(status=S.RUNNING, since=125, time_limit=45, **sums)
    assert recompute_bill(running, now=130).cost == 5_000
    assert recompute_bill(running, now=10_000).cost == 45_000
    bill = recompute_bill(entry(time_limit=45, **sums))
    assert (bill.seconds, bill.collected_seconds, bill.ok) == (25, 15, True)


def test_flags_are_described_in_words() -> None:
    assert jobs_page.flags_in_words(JobFlags.NONE) == ()
    assert jobs_page.flags_in_words(JobFlags.SUCCESSOR | JobFlags.INTERIM_PAYMENTS) == (
        "its provider may collect interim payments while it runs",
    )
    all_flags = JobFlags.UNTIL_SPENT | JobFlags.NO_SELF_SCHEDULING | JobFlags.INTERIM_PAYMENTS
    assert len(jobs_page.flags_in_words(all_flags)) == 3


def test_flows_end_at_the_balance() -> None:
    names = [step.name for step in jobs_page.flows(detail())]
    assert names == ["funded", "paid", "fee", "refunded", "in escrow"]
    flows = jobs_page.flows(detail(status=S.RUNNING, escrow=100_000, paid=0, fee=0, refunded=0))
    assert (flows[-1].name, flows[-1].amount, flows[-1].width) == ("in escrow", 100_000, 1_000)


def test_stages_last_until_the_next() -> None:
    rows = [
        TransitionRow(place(1, 100), 1, S.NONE, S.PENDING, ALICE, None),
        TransitionRow(place(2, 130), 1, S.PENDING, S.META_SCHEDULED, ALICE, HOST),
    ]
    first, second = jobs_page.stages(rows, 150)
    assert (first.seconds, first.ongoing, second.seconds, second.ongoing) == (30, False, 20, True)


def test_values_are_known_by_their_names() -> None:
    fields = lookup.fields(
        {
            "job_id": 3,
            "terms": {"amount": 5, "name": "x"},
            "provider": "0x" + "00" * 20,
            "by": ALICE,
            "open": True,
            "answer_by": 9,
            "role": "0x" + bytes(32).hex(),
            "hash": "0x" + "12" * 32,
            "empty": "",
        }
    )
    assert {field.path: field.kind for field in fields} == {
        "job_id": "job",
        "terms.amount": "amount",
        "terms.name": "text",
        "provider": "nobody",
        "by": "account",
        "open": "flag",
        "answer_by": "time",
        "role": "text",
        "hash": "hash",
        "empty": "text",
    }
    assert next(field.value for field in fields if field.path == "role") == "DEFAULT_ADMIN_ROLE"


def test_endless_values_are_cut() -> None:
    assert len(lookup.fields({"ids": list(range(10_000))}, maximum=50)) == 50


def test_charts_of_an_empty_grid_are_drawn() -> None:
    assert grid_page.status_chart(()).shapes == ()
    assert grid_page.escrow_chart(()).rows == ()
    assert grid_page.utilisation_chart((), {}).shapes == ()
    assert accounts_page.price_chart((), 5) is None
    points = [StatusPoint(5, dict.fromkeys(S, 0))]
    assert grid_page.ends_chart(points).summary.endswith("0 jobs so far.")


def test_the_busiest_provider_comes_first() -> None:
    def use(account: str, share: int) -> Utilisation:
        return Utilisation(account, (UsePoint(1, share, 100), UsePoint(2, 0, 100)))

    bars = grid_page.utilisation_bars([use("a", 10), use("b", 50)], {"b": "provider 2"})
    assert [(bar.name, bar.text) for bar in bars] == [("provider 2", "25%"), ("a", "5%")]


# -- calls


def test_calls_are_decoded() -> None:
    function = interface("Credit").function("transfer")
    result = decode_call("Credit", "0x" + function.encode(ALICE, 7).hex())
    assert result is not None
    assert result.function == "transfer"
    assert list(result.values.values())[1] == 7
    assert decode_call("Credit", "0x12345678") is None
    assert decode_call("Credit", "0x" + function.selector.hex() + "00") is None
    assert decode_call("Credit", "0xzz") is None


@pytest.mark.parametrize(
    ("contract", "name", "texts", "values"),
    [
        ("Credit", "allowance", [ALICE.lower(), HOST.lower()], None),
        ("MetaScheduler", "getJobs", ["[1, 2]"], [[1, 2]]),
        ("MetaScheduler", "deadline", ["0x10"], [16]),
    ],
)
def test_typed_arguments_are_read(
    contract: str, name: str, texts: list[str], values: list[Any] | None
) -> None:
    function = find_view(contract, name)
    assert function is not None
    read = [read_argument(p, t) for p, t in zip(function.inputs, texts, strict=True)]
    assert values is None or read == values
    assert function.encode(*read)


def test_signed_requests_are_decoded() -> None:
    cancel = interface("MetaScheduler").function("cancel").encode([7])
    request = (ALICE, HOST, 0, 90_000, 1_800_000_000, cancel, bytes(65))
    forwarder = interface("ERC2771Forwarder")
    calldata = "0x" + forwarder.function("execute").encode(request).hex()
    two = forwarder.function("executeBatch").encode([request, (HOST, ALICE, *request[2:])], HOST)
    names = {to_checksum_address(HOST): "MetaScheduler"}
    [result] = signed_requests(calldata, names)
    assert (result.signer, result.contract) == (to_checksum_address(ALICE), "MetaScheduler")
    assert result.call is not None
    assert (result.call.function, result.call.values["jobIds"]) == ("cancel", [7])
    first, second = signed_requests("0x" + two.hex(), names)
    assert first == result
    assert (second.contract, second.call) == ("", None)
    # Invalid values in a transaction do not break a page.
    for data in (calldata[:-70], "0x", "0xzz", "0x" + cancel.hex()):
        assert signed_requests(data, names) == ()


def test_outcomes_of_signed_requests() -> None:
    calls = [ForwardedCall(signer, HOST, 0, 1, 1, b"") for signer in (ALICE, HOST, ALICE)]
    actual = [ok for _, ok in outcomes(calls, [(ALICE, True), (ALICE, False)])]
    assert actual == [True, False, False]
    assert [ok for _, ok in outcomes(calls, [(HOST, True), (ALICE, True)])] == [False, True, True]
    assert [ok for _, ok in outcomes(calls, [])] == [False, False, False]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("uint256", "many"),
        ("address", "0x12"),
        ("bool", "maybe"),
        ("bytes32", "0xzz"),
        ("uint256[]", "1,2"),
        ("uint256[]", "[" * 5_000),
        ("uint8", "1" * 5_000),
    ],
)
def test_invalid_arguments_are_refused(kind: str, text: str) -> None:
    with pytest.raises(UsageError) as error_info:
        read_argument({"name": "which", "type": kind}, text)
    assert "which" in error_info.value.message


def test_functions_that_change_something_are_not_read() -> None:
    assert find_view("Credit", "mint") is None
    assert find_view("Credit", "nothing") is None


# -- the form

FORM = {
    "name": "n",
    "credits": "2",
    "time_limit": "10m",
    "tasks": "2",
    "cpus_per_task": "3",
    "mem_per_cpu": "64",
    "gpus": "1",
    "retries": "1",
    "objective": "time",
    "uses": "gpu.model=h100, site=jura",
    "script": "a\r\nb\r\n",
}


def test_a_form_is_a_job_file() -> None:
    terms = read_job(FORM).terms()
    assert terms.resources == Resources(2, 3, 64, 1)
    assert (terms.amount, terms.time_limit, terms.retries) == (2 * CREDIT, 600, 1)
    assert terms.objective is Objective.TIME
    assert terms.uses == "gpu.model=h100,site=jura"
    # The contract can't check labels, so that only the meta-scheduler may assign it.
    assert terms.flags == JobFlags.NO_SELF_SCHEDULING
    assert read_job(FORM).definition.commands()[0][1] == "a\nb\n"


def test_options_of_the_form_are_flags() -> None:
    ticked = {**FORM, "uses": "", "until_spent": "on", "interim_payments": "on"}
    assert read_job(ticked).terms().flags == JobFlags.UNTIL_SPENT | JobFlags.INTERIM_PAYMENTS
    for off in ("", [], {}):
        assert read_job({**FORM, "uses": "", "until_spent": off}).terms().flags == JobFlags.NONE


def test_a_whole_file_replaces_the_form() -> None:
    text = 'name: f\ncredits: "1"\ntimeLimit: 5m\nresources: {memPerCpu: 9}\nsteps: [{run: {command: x}}]'
    assert read_job({**FORM, "file": text}).name == "f"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mem_per_cpu": "none"}, "Memory per CPU"),
        ({"cpus_per_task": "0"}, "CPUs per task"),
        ({"script": ""}, "Script"),
        ({"time_limit": "x"}, "Time limit"),
        ({"objective": "fame"}, "Objective"),
        ({"name": "n" * 100}, "Name"),
    ],
)
def test_mistakes_are_reported_in_terms_of_the_form(change: dict[str, str], message: str) -> None:
    with pytest.raises(JobFileError) as error_info:
        read_job({**FORM, **change})
    assert message in error_info.value.message
    assert "form" not in error_info.value.message


def test_mistakes_of_a_file_have_their_lines() -> None:
    text = form_as_file({**FORM, "uses": ""}) + "retires: 1\ncolour: red\n"
    with pytest.raises(JobFileError) as error_info:
        read_job({**FORM, "mode": "file", "file": text})
    result = problems(error_info.value)
    last = len(text.splitlines())
    assert {line for line, _ in result} == {last - 1, last}
    assert any(message.startswith("retires is an unknown key") for _, message in result)


@pytest.mark.parametrize("mode", ["form", "file"])
def test_only_the_chosen_mode_of_the_page_counts(mode: str) -> None:
    other = form_as_file({**FORM, "name": "from the file"})
    name = read_job({**FORM, "mode": mode, "file": other}).name
    assert name == (FORM["name"] if mode == "form" else "from the file")
    with pytest.raises(JobFileError, match="empty"):
        read_job({**FORM, "mode": "file", "file": ""})


@given(st.text(), st.text())
def test_a_form_written_as_a_file_means_the_same(name: str, script: str) -> None:
    fields = {**FORM, "name": name, "script": script}
    try:
        job = read_job(fields)
    except JobFileError:
        return
    parsed = read_job({"mode": "file", "file": form_as_file(fields)})
    assert (parsed.terms(), parsed.definition) == (job.terms(), job.definition)


@given(st.dictionaries(st.sampled_from(sorted(FORM)), st.text() | st.integers() | st.none()))
def test_any_form_is_read_or_refused(given_values: dict[str, Any]) -> None:
    try:
        read_job(given_values)
    except JobFileError as error:
        assert error.message  # noqa: PT017 - either is fine, anything else is not


# -- quotes without a wallet


def offer(number: int, cost: int, starts_in: int | None = 0, refusal: str = "") -> PricedOffer:
    return PricedOffer(number, HOST, 1, cost * CREDIT, 60, starts_in, refusal)


@pytest.mark.parametrize(
    ("offers", "message"),
    [
        (
            [offer(1, 2, 90), offer(2, 3, 30), offer(3, 9, None, OVER_BUDGET)],
            "costs 2 credits at the cheapest. It could start within 30 s.",
        ),
        (
            [offer(1, 8, None, OVER_BUDGET), offer(2, 5, None, OVER_BUDGET)],
            "would take 5. It would",
        ),
        ([offer(1, 1, None, "banned")], "No provider is eligible now"),
        ([], "No provider is eligible now"),
    ],
)
def test_offers_are_summed_up_in_words(offers: list[PricedOffer], message: str) -> None:
    assert message in offers_in_words(offers)


def test_a_signature_has_one_form() -> None:
    body = "11" * 64
    assert signature_of(f"0x{body}1b") == bytes.fromhex(body + "1b")
    assert signature_of(f"0x{body}01") == bytes.fromhex(body + "1c")
    for wrong in (None, "", "0x", f"0x{body}", f"{body}1b", f"0x{body}1b00"):
        with pytest.raises(UsageError, match="invalid format"):
            signature_of(wrong)


# -- lists, statements and histories


@pytest.mark.parametrize(
    ("current", "last", "numbers"),
    [
        (1, 1, [1]),
        (2, 3, [1, 2, 3]),
        (1, 9, [1, 2, 3, None, 9]),
        (5, 9, [1, None, 3, 4, 5, 6, 7, None, 9]),
        (9, 9, [1, None, 7, 8, 9]),
    ],
)
def test_a_pager_shows_the_ends_and_the_nearest_pages(
    current: int, last: int, numbers: list[int | None]
) -> None:
    assert formats.page_numbers(current, last) == numbers


def movement(at: int, kind: str, amount: int, balance: int) -> MovementRow:
    debit, credit = max(0, -amount), max(0, amount)
    return MovementRow(place(at, at), ALICE, kind, at, HOST, debit, credit, balance)


def test_similar_lines_of_a_statement_are_combined_with_their_sum() -> None:
    refunds = [movement(10 - at, "refund", 5, 100 - 5 * at) for at in range(6)]
    rows = [movement(12, "escrow", -7, 93), *refunds, movement(3, "escrow", -2, 70)]
    first, folded, last = combine_movements(rows)
    assert (first, last) == (rows[0], rows[-1])
    assert isinstance(folded, CombinedMovements)
    assert (folded.count, folded.credit, folded.debit, folded.balance) == (6, 30, 0, 100)
    assert (folded.at.time, folded.first.time) == (10, 5)
    assert combine_movements(rows[:4]) == rows[:4]


def test_a_providers_history_is_in_words_and_challenges_are_apart() -> None:
    wide = {"nodes": 2, "cpus_per_node": 4, "mem_per_node": 2_048, "gpus_per_node": 0}
    prices = {"cpu": 10**15, "gpu": 0, "mem": 10**12}
    provider_changes = [
        ProviderChange(place(), kind, values)
        for kind, values in (
            ("hardware", {"version": 1, "hardware": wide}),
            ("challenged", {"job_id": 3, "by": ALICE}),
            ("prices", {"prices": prices}),
            ("offer", {"offer": {"cpus": 8, "memory": 4_096, "gpus": 1}}),
        )
    ]
    lines, challenges = accounts_page.provider_history(provider_changes)
    assert [challenge.title for challenge in challenges] == ["Challenged"]
    values_by_path = {value.path: value.value for line in lines for value in line.values}
    assert values_by_path["hardware"] == "2 nodes of 4\u00a0CPU, 2\u00a0GB"
    assert values_by_path["offer"] == "8\u00a0CPU, 4\u00a0GB, 1\u00a0GPU"
    assert values_by_path["per GB-hour"] == 1_024 * 10**12
    assert not [path for path in values_by_path if "_" in path or "." in path]


def test_an_invoice_exists_once_the_job_has_ended() -> None:
    grid = Deployment(1337, *[ALICE] * 5, block=1)
    invoice = jobs_page.job_invoice(entry(), (), grid, 7)
    assert invoice.bill.ok
    assert invoice.row()[9:12] == (40_000, 38_000, 2_000)
    with pytest.raises(UsageError, match="has not ended"):
        jobs_page.job_invoice(entry(status=S.RUNNING), (), grid, 7)


def test_a_provider_that_is_its_own_customer_is_listed_as_the_customer() -> None:
    grid = Deployment(1337, *[ALICE] * 5, block=1)
    escrow = MovementRow(place(), ALICE, "escrow", 1, HOST, 100_000, 0, 0)
    invoice = jobs_page.job_invoice(entry(provider=ALICE), (escrow,), grid, 7)
    assert [(line.description, line.amount) for line in invoice.lines] == [
        ("escrow (customer)", -100_000)
    ]


# -- reasons for a wait


def provider(**labels: str) -> ProviderRow:
    return ProviderRow(
        account=HOST,
        id=1,
        status=ProviderStatus.ACTIVE,
        active=True,
        hardware=Hardware(1, 4, 1_000, 0),
        offer=Offer(4, 1_000, 0),
        load=Load(3, 500, 0),
        prices=Prices(1, 1, 1),
        labels=labels,
        version=1,
        pending_version=1,
        approved_until=0,
        answer_by=0,
        figures=ProviderFigures(*[0] * 15),
    )


def test_load_is_shown_against_the_offer() -> None:
    actual = [(bar.name, bar.share, bar.text) for bar in accounts_page.load_bars(provider())]
    assert actual == [("CPUs", 0.75, "3 of 4"), ("Memory", 0.5, "500\u00a0MB of 1000\u00a0MB")]


def test_labels_are_checked_after_the_conditions_of_the_contract() -> None:
    assert eligibility_of(provider(), "", eligible=True, reason="").eligible
    too_dear = eligibility_of(provider(), "", eligible=False, reason="OverBudget")
    assert "too expensive" in too_dear.explanation
    missing = eligibility_of(provider(), "gpu=h100", eligible=True, reason="")
    assert (missing.eligible, missing.explanation) == (False, "gpu=h100: has no such label")
    other = eligibility_of(provider(gpu="a100"), "gpu=h100", eligible=True, reason="")
    assert other.explanation == "gpu=h100: its label says a100"
    assert eligibility_of(provider(), "what is this", eligible=True, reason="").eligible


# -- guards


def request_with(**headers: str) -> Request:
    raw = [(key.replace("_", "-").encode(), text.encode()) for key, text in headers.items()]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": raw})


@pytest.mark.parametrize(
    ("headers", "is_accepted"),
    [
        ({"content_type": "application/json"}, True),
        ({"content_type": "application/json; charset=utf-8", "host": "h:1"}, True),
        ({"content_type": "application/json", "origin": "http://h:1", "host": "h:1"}, True),
        ({"content_type": "application/json", "origin": "http://h:2", "host": "h:1"}, False),
        ({"content_type": "application/json", "origin": "null", "host": "h:1"}, False),
        ({"content_type": "application/json", "sec_fetch_site": "cross-site"}, False),
        ({"content_type": "application/json", "sec_fetch_site": "same-site"}, False),
        ({"content_type": "text/plain"}, False),
        ({}, False),
    ],
)
def test_posts_come_from_own_pages(headers: dict[str, str], is_accepted: bool) -> None:
    assert is_same_origin(request_with(**headers)) is is_accepted


def test_links_are_templates() -> None:
    (link,) = Link.parse("Otter.tx=https://o.example/tx/{} Otter.block=https://o.example/b/{}")
    assert link.urls == {"tx": "https://o.example/tx/{}", "block": "https://o.example/b/{}"}
    for wrong in ("Otter.tx=javascript:{}", "Otter.job=https://x/{}", "tx=https://x/{}", "A.tx="):
        with pytest.raises(UsageError):
            Link.parse(wrong)
    assert Link.parse("") == ()


def test_numbers_that_a_browser_would_round_are_texts() -> None:
    assert call_json(Call(ALICE, b"\x01", "label", value=2**80), 1337) == {
        "to": ALICE,
        "data": "0x01",
        "value": str(2**80),
        "chainId": "0x539",
        "label": "label",
    }


# -- prices and hints


@pytest.mark.parametrize(
    ("wei", "text"),
    [
        (0, "0"),
        (7, "0.000000007"),
        (26_590, "0.00002659"),
        (10**9, "1"),
        (1_234_567_891, "1.234"),
        (12_000_000_001, "12"),
        (5 * 10**12, "5\u2009000"),
    ],
)
def test_gas_prices_have_no_exponent(wei: int, text: str) -> None:
    assert formats.gwei(wei) == text


@pytest.mark.parametrize(
    ("text", "markup"),
    [
        ("Look with `deepsquare job get`.", "Look with <code>deepsquare job get</code>."),
        ("`<b>`<i>", "<code>&lt;b&gt;</code>&lt;i&gt;"),
        ("one ` alone <b>", "one ` alone &lt;b&gt;"),
        ("", ""),
    ],
)
def test_commands_in_hints_are_code(text: str, markup: str) -> None:
    assert str(formats.with_code(text)) == markup


# -- host names of requests


@pytest.mark.parametrize(
    ("address", "hosts", "answered"),
    [
        (Address(), ["127.0.0.1:8547", "localhost", "[::1]:1"], True),
        (Address(), ["evil.example", "127.0.0.2", "localhost.evil.example", ""], False),
        (Address("::1"), ["[::1]:80", "localhost:80"], True),
        (Address("localhost"), ["localhost", "127.0.0.1"], True),
        (Address(names=("grid.example",)), ["grid.example", "localhost"], True),
        (Address("192.0.2.7"), ["192.0.2.7:80"], True),
        (Address("2001:db8::7"), ["[2001:db8::7]:80"], True),
        (Address("192.0.2.7"), ["evil.example", "192.0.2.8"], False),
        (Address(ANYWHERE, names=("*.grid.example",)), ["a.grid.example", "localhost"], True),
        (Address("::", names=("grid.example",)), ["evil.example", "grid.example.evil"], False),
        (Address(ANYWHERE, names=("*",)), ["whatever.example"], True),
    ],
)
async def test_only_requests_for_known_hosts_are_served(
    address: Address, hosts: list[str], answered: bool
) -> None:
    app = Starlette(
        routes=[Route("/", lambda _: PlainTextResponse("here"))],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(address.allowed))],
    )
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://x") as client:
        for host in hosts:
            result = await client.get("/", headers={"Host": host})
            assert result.status_code == (200 if answered else 400), host


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (Address(ANYWHERE), "host names by which"),
        (Address("::"), "host names by which"),
        (Address(names=("http://grid.example",)), "not a host name"),
        (Address("::", names=("a*b",)), "not a host name"),
        (Address("::", names=("",)), "not a host name"),
    ],
)
def test_invalid_host_names_are_refused(address: Address, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _ = address.allowed


def test_charts_are_rendered_once_for_concurrent_readers() -> None:
    site = Site(index=cast("Any", None), contracts=cast("Any", None))
    rendered: list[str] = []

    def make(name: str) -> str:
        rendered.append(name)
        return f"{name} {len(rendered)}"

    for name, moment in (("a", 1), ("a", 1), ("b", 1), ("a", 2), ("a", 1), ("b", 1)):
        actual = site.cached(name, (moment, 7), partial(make, name))
        assert actual.startswith(name)
    assert rendered == ["a", "b", "a", "a"]
