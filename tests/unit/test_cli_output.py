"""Output of commands in each format, with untrusted text."""

from __future__ import annotations

import csv
import io
import json
import re
from importlib import import_module
from pkgutil import iter_modules
from types import SimpleNamespace
from typing import Any

import pytest

from deepsquare_chain import cli
from deepsquare_chain.cli import job as job_commands
from deepsquare_chain.cli import provider as provider_commands
from deepsquare_chain.cli import submit as submit_commands
from deepsquare_chain.cli import wallet as wallet_commands
from deepsquare_chain.cli.output import Column, Format, Kind, Printer, format_cell, iso_time
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.observability.redaction import plain

COLUMNS = (
    Column("id", "job", Kind.NUMBER),
    Column("name", "name"),
    Column("escrow", "escrow", Kind.CREDITS),
    Column("rate", "rate", Kind.RATE),
    Column("since", "since", Kind.TIME),
    Column("open", "open", Kind.FLAG),
)
ROW = (7, "hello", 3 * CREDIT // 2, CREDIT // 3600, 1_700_000_000, True)
NOTHING = (8, None, None, None, None, None)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printer(style: Format) -> tuple[Printer, io.StringIO, io.StringIO]:
    stdout, stderr = io.StringIO(), io.StringIO()
    return Printer(style, out=stdout, err=stderr), stdout, stderr


def test_json_amounts_are_integer_strings_with_a_decimal_field() -> None:
    output, stdout, stderr = printer(Format.JSON)
    output.rows(COLUMNS, [ROW, NOTHING])
    first, second = json.loads(stdout.getvalue())
    assert first == {
        "id": 7,
        "name": "hello",
        "escrow": "1500000000000000000",
        "escrow_credits": "1.5",
        "rate": str(CREDIT // 3600),
        "rate_credits_per_hour": "1",
        "since": 1_700_000_000,
        "open": True,
    }
    assert set(second.values()) == {8, None}
    assert stderr.getvalue() == ""


def test_coin_for_gas_is_not_called_credits() -> None:
    column = Column("fee", "paid (coin)", Kind.COIN)
    output, stdout, _ = printer(Format.JSON)
    output.record((column,), (CREDIT // 4,))
    assert json.loads(stdout.getvalue()) == {"fee": "250000000000000000", "fee_coin": "0.25"}
    assert format_cell(column, CREDIT // 4) == "0.25"


def test_json_record_is_one_object() -> None:
    output, stdout, _ = printer(Format.JSON)
    output.record(COLUMNS, ROW)
    assert json.loads(stdout.getvalue())["id"] == 7


def test_json_list_without_rows_is_an_empty_list() -> None:
    output, stdout, stderr = printer(Format.JSON)
    output.rows(COLUMNS, [])
    assert json.loads(stdout.getvalue()) == []
    assert stderr.getvalue() == ""


def test_csv_has_a_header_and_a_line_for_each_row() -> None:
    output, stdout, _ = printer(Format.CSV)
    output.rows(COLUMNS, [ROW, NOTHING])
    header, first, second = csv.reader(io.StringIO(stdout.getvalue()))
    assert header[:4] == ["id", "name", "escrow", "escrow_credits"]
    assert first[1:4] == ["hello", "1500000000000000000", "1.5"]
    assert second[1:] == [""] * (len(header) - 1)


@pytest.mark.parametrize("name", ["=cmd()", "+1", "-1", "@x"])
def test_csv_disarms_untrusted_formulas(name: str) -> None:
    output, stdout, _ = printer(Format.CSV)
    output.rows(COLUMNS[:2], [(1, name)])
    rows = list(csv.reader(io.StringIO(stdout.getvalue(), newline="")))
    assert rows[1][1] == f"'{name}"


def test_csv_leaves_numbers_alone() -> None:
    output, stdout, _ = printer(Format.CSV)
    output.record((Column("sum", "sum", Kind.CREDITS),), (-CREDIT,))
    assert stdout.getvalue() == "sum,sum_credits\n-1000000000000000000,-1\n"


def test_table_formats_values_for_people() -> None:
    output, stdout, _ = printer(Format.TABLE)
    output.rows(COLUMNS, [ROW, NOTHING])
    text = stdout.getvalue()
    for part in ("hello", "1.5", "1/h", "2023-11-14 22:13:20", "yes", "-"):
        assert part in text


ADDRESS = "0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266"
LISTS = {
    "job list": (
        job_commands._LIST,
        (
            *(18_446, "train-resnet-lr-0.001-seed-17", "META_SCHEDULED", 12, 187_200, 137),
            *(1234 * CREDIT // 10, 0, 3600, 1_700_000_000, ADDRESS),
        ),
    ),
    "quote": (
        submit_commands._QUOTES,
        (
            *(12, ADDRESS, CREDIT // 3600, 12 * CREDIT, 86_400, "now", 0, 0, False),
            *(1_000_000, 12_000, "needs gpu.model=h100, and has gpu.model=a100"),
        ),
    ),
    "submit": (
        submit_commands._SUBMITTED,
        (
            *(18_446, "train-resnet-lr-0.001-seed-17", 120, 12 * CREDIT, "sub-1f3a9c04"),
            *(ADDRESS, "0x" + "ab" * 32),
        ),
    ),
    "tx list": (
        wallet_commands._TRANSACTIONS,
        (
            *(17, 1_204, "pending", "submit 20 jobs", 1_700_000_000, 2, 10**9, None),
            "0x" + "ab" * 32,
        ),
    ),
    "provider jobs": (
        provider_commands._JOBS,
        (
            *(18_446, "train-resnet-lr-0.001-seed-17", "META_SCHEDULED", ADDRESS, 64),
            *(CREDIT // 3600, 1_700_000_000),
        ),
    ),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_fit_a_terminal_of_80_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers, dates and hashes stay whole; only free text wraps."""
    monkeypatch.setenv("COLUMNS", "80")
    columns, row = LISTS[name]
    screen = Terminal()
    Printer(Format.TABLE, out=screen).rows(columns, [row])
    text = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())
    assert max(map(len, text.splitlines())) <= 80
    for column, value in zip(columns, row, strict=True):
        if column.kind is not Kind.TEXT and not column.detail:
            assert format_cell(column, value, short=True) in text, column
    wide = Terminal()
    Printer(Format.TABLE, wide=True, out=wide).rows(columns, [row])
    assert all(format_cell(*cell) in wide.getvalue() for cell in zip(columns, row, strict=True))


@pytest.mark.parametrize("width", range(40, 60))
def test_cells_and_titles_are_whole_at_any_width(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    columns = [Column(f"c{n}", f"title{n} word{n}", Kind.WORD) for n in range(5)]
    screen = Terminal()
    Printer(Format.TABLE, out=screen).rows(columns, [[f"value-{n}" for n in range(5)]])
    assert all(f"title{n}" in screen.getvalue() for n in range(5))
    assert all(f"value-{n}" in screen.getvalue() for n in range(5))


def test_a_list_that_is_too_wide_wraps_titles_and_then_becomes_records(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    columns = [Column(f"c{number}", "credits per hour", Kind.NUMBER) for number in range(3)]
    screen = Terminal()
    Printer(Format.TABLE, out=screen).rows(columns, [(1, 2, 3)])
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in screen.getvalue().splitlines()]
    assert [line.split() for line in lines[:3]] == [["credits"] * 3, ["per"] * 3, ["hour"] * 3]
    columns = [Column(f"c{number}", f"field {number}", Kind.HASH) for number in range(3)]
    values = [tuple(f"0x{digit * 40}" for digit in digits) for digits in ("abc", "def")]
    screen = Terminal()
    Printer(Format.TABLE, out=screen).rows(columns, values)
    text = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())
    assert text.count("field 0") == text.count("field 2") == 2
    assert "─" not in text


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "00:00:00"), (61, "00:01:01"), (86_399, "23:59:59"), (187_261, "2-04:01:01")],
)
def test_durations_as_slurm_writes_them(seconds: int, expected: str) -> None:
    assert format_cell(Column("t", "t", Kind.SECONDS), seconds) == expected


def test_an_empty_table_prints_a_note() -> None:
    output, stdout, stderr = printer(Format.TABLE)
    output.rows(COLUMNS, [], empty="No jobs.")
    assert (stdout.getvalue(), stderr.getvalue()) == ("", "No jobs.\n")


def test_table_record_has_a_line_for_each_field() -> None:
    output, stdout, _ = printer(Format.TABLE)
    output.record(COLUMNS, ROW)
    assert len(stdout.getvalue().splitlines()) == len(COLUMNS)


@pytest.mark.parametrize("style", list(Format))
def test_no_format_passes_untrusted_control_codes(style: Format) -> None:
    output, stdout, _ = printer(style)
    output.rows(COLUMNS[:2], [(1, "[red]x\x1b[2Jy\u202ez")])
    text = stdout.getvalue()
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "[red]" in text


def test_notes_keep_lines_and_lose_control_codes() -> None:
    output, stdout, stderr = printer(Format.TABLE)
    output.note("one\ntwo\x1b[0m")
    assert (stdout.getvalue(), stderr.getvalue()) == ("", "one\ntwo\\x1b[0m\n")


def test_raw_data_is_cleaned_on_a_terminal_only() -> None:
    screen, pipe = Terminal(), io.StringIO()
    Printer(Format.TABLE, out=screen).raw(b"a\x1b[2J\tb\xff\n")
    Printer(Format.TABLE, out=pipe).raw(b"a\x1b[2J\n")
    assert screen.getvalue() == "a\\x1b[2J\tb\ufffd\n"
    assert pipe.getvalue() == "a\x1b[2J\n"


def test_times_beyond_the_calendar_stay_numbers() -> None:
    assert iso_time(2**63) == str(2**63)
    assert format_cell(Column("t", "t", Kind.TIME), 0) == "1970-01-01 00:00:00"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain ~ text", "plain ~ text"),
        ("Grüße 山", "Grüße 山"),
        ("a\x00b\x1bc\x7fd\x9be", "a\\x00b\\x1bc\\x7fd\\x9be"),
        ("a\u202eb\u200bc\ufeffd", "a\\u202eb\\u200bc\\ufeffd"),
        ("line\nbreak\r", "line\\nbreak\\r"),
        ("\ud800", "\\ud800"),
    ],
)
def test_plain_escapes_terminal_control_codes(text: str, expected: str) -> None:
    assert plain(text) == expected


def test_plain_keeps_the_given_characters() -> None:
    assert plain("a\nb\tc\x1b", keep="\n\t") == "a\nb\tc\\x1b"


async def test_waiting_for_several_jobs_keeps_the_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, timeouts = [0.0], []  # type: tuple[list[float], list[float | None]]

    async def follow(
        _context: object, _contracts: object, _job: int, timeout: float | None, **_: object
    ) -> Any:
        timeouts.append(timeout)
        clock[0] += 4
        return SimpleNamespace(exit_code=0)

    async def say_nothing(*_: object) -> None:
        pass

    monkeypatch.setattr(job_commands, "follow_to_end", follow)
    monkeypatch.setattr(job_commands, "print_ended", say_nothing)
    monkeypatch.setattr(job_commands, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    context: Any = SimpleNamespace(printer=SimpleNamespace(note=lambda _words: None))
    contracts: Any = None
    assert await job_commands.wait_for_all(context, contracts, (1, 2, 3), 6.0) == 0
    assert await job_commands.wait_for_all(context, contracts, (4,), None) == 0
    assert timeouts == [6.0, 2.0, 0.0, None]


def test_a_column_name_means_the_same_in_every_command() -> None:
    modules = [
        import_module(f"deepsquare_chain.cli.{part.name}")
        for part in iter_modules(cli.__path__)
        if part.name not in ("__main__", "top_screen")
    ]
    layouts = [
        value for module in modules for value in vars(module).values() if isinstance(value, tuple)
    ]
    columns = [column for layout in layouts for column in layout if isinstance(column, Column)]
    assert len(columns) > 100
    # The ID of another row is `job_id` or `provider_id`; `provider` is an address.
    assert [
        c for c in columns if c.key == "job" or (c.key, c.kind) == ("provider", Kind.NUMBER)
    ] == []
