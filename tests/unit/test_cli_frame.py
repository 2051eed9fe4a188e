"""The frame of every command: options, settings, errors, exit codes."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from deepsquare_chain import errors
from deepsquare_chain.cli import frame, job_output, main
from deepsquare_chain.cli.app import app as real_app
from deepsquare_chain.cli.frame import SETTING_FLAGS, CommandContext, command
from deepsquare_chain.cli.types import amount, label, price
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.errors import GridError
from deepsquare_chain.job import JobStatus
from deepsquare_chain.settings import Settings

runner = CliRunner()


def app_of(action: object) -> typer.Typer:
    """A program of two commands: one runs `act`, the other does nothing."""
    app = typer.Typer(pretty_exceptions_enable=False)

    @command(app)
    async def act(
        context: CommandContext, word: Annotated[str, typer.Argument()] = ""
    ) -> int | None:
        """Act."""
        return action(context, word)  # type: ignore[operator]

    @command(app)
    async def other(context: CommandContext) -> None:
        """Do nothing."""

    return app


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in Settings.model_fields:
        monkeypatch.delenv(f"DEEPSQUARE_{name.upper()}", raising=False)


def test_result_of_a_command_is_its_exit_code() -> None:
    for code in (0, 3, 137):
        result = runner.invoke(app_of(lambda _d, _w, code=code: code), ["act"])
        assert result.exit_code == code
    assert runner.invoke(app_of(lambda _d, _w: None), ["act"]).exit_code == 0


ERRORS = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, GridError)
]


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_have_a_message_and_an_exit_code(kind: type[GridError]) -> None:
    def fail(_desk: CommandContext, _word: str) -> None:
        raise kind("It is broken\x1b[2J", hint="Mend it.")

    result = runner.invoke(app_of(fail), ["act"])
    assert result.exit_code == kind.exit_code
    assert result.stderr == "Error: It is broken\\x1b[2J\nHint: Mend it.\n"
    assert result.stdout == ""


def test_exit_codes_are_the_documented_ones() -> None:
    assert {kind.__name__: kind.exit_code for kind in ERRORS} == {
        "GridError": 1,
        "UsageError": 2,
        "JobFileError": 3,
        "NotFoundError": 4,
        "InsufficientFundsError": 5,
        "RevertedError": 6,
        "EndpointError": 7,
        "StoreError": 1,
        "NotAuthorisedError": 8,
        "WaitTimeoutError": 9,
        "AuditError": 10,
    }


def test_unexpected_errors_are_one_line_without_a_traceback() -> None:
    def fail(_desk: CommandContext, _word: str) -> None:
        raise RuntimeError("first line\nsecond line")

    result = runner.invoke(app_of(fail), ["act"])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: unexpected RuntimeError: first line\nHint: ")
    assert "Traceback" not in result.output
    assert "Traceback" in runner.invoke(app_of(fail), ["act", "--debug"]).stderr


def test_interruption_is_130() -> None:
    def fail(_desk: CommandContext, _word: str) -> None:
        raise KeyboardInterrupt

    assert runner.invoke(app_of(fail), ["act"]).exit_code == 130


def test_common_options_reach_the_settings() -> None:
    settings_seen: list[Settings] = []
    app = app_of(lambda context, _w: settings_seen.append(context.settings))
    arguments = ["act", "--endpoint", "http://h:1", "--timeout", "5", "--store", "/s"]
    assert runner.invoke(app, arguments).exit_code == 0
    assert (settings_seen[0].endpoint, settings_seen[0].timeout, str(settings_seen[0].store)) == (
        "http://h:1",
        5.0,
        "/s",
    )


def test_flag_wins_over_environment_over_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: list[str] = []
    app = app_of(lambda context, _w: values.append(context.settings.endpoint))
    (tmp_path / ".deepsquare.toml").write_text('endpoint = "http://project:1"\n')
    runner.invoke(app, ["act"])
    monkeypatch.setenv("DEEPSQUARE_ENDPOINT", "http://environment:1")
    runner.invoke(app, ["act"])
    runner.invoke(app, ["act", "--endpoint", "http://flag:1"])
    assert values == ["http://project:1", "http://environment:1", "http://flag:1"]


def test_options_of_a_service_may_be_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: list[Any] = []
    app = typer.Typer(pretty_exceptions_enable=False)

    @command(app, table="relay_options")
    async def act(
        context: CommandContext,
        most: Annotated[int, typer.Option("--most", min=1)] = 5,
        least: Annotated[int | None, typer.Option("--least-credits", parser=amount)] = None,
        site: Annotated[list[str] | None, typer.Option("--site")] = None,
        quiet: Annotated[bool, typer.Option("--quiet")] = False,
    ) -> None:
        """Act."""
        values.append((most, least, site, quiet))

    @command(app)
    async def other(context: CommandContext) -> None:
        """Do nothing."""

    def run(*arguments: str) -> Any:
        return runner.invoke(app, ["act", *arguments])

    table = 'least = "0.5"\nmost = 7\nsite = ["a", "b"]\nquiet = true\n'
    (tmp_path / ".deepsquare.toml").write_text(f"[relay_options]\n{table}")
    assert (run().exit_code, run("--most", "8", "--site", "c").exit_code) == (0, 0)
    assert values == [(7, CREDIT // 2, ["a", "b"], True), (8, CREDIT // 2, ["c"], True)]
    monkeypatch.setenv("DEEPSQUARE_RELAY_OPTIONS", "quiet=no most=9")
    assert (run().exit_code, values[-1]) == (0, (9, None, None, False))
    for value, message in (
        ("most=0", "'0' is not a whole number of 1 or more"),
        ("more=1", "no option 'more'"),
    ):
        monkeypatch.setenv("DEEPSQUARE_RELAY_OPTIONS", value)
        refusal = run()
        assert refusal.exit_code == 2
        assert "relay_options: " in refusal.stderr
        assert message in refusal.stderr
    assert len(values) == 3


def test_invalid_settings_are_refused_with_their_source() -> None:
    app = app_of(lambda context, _w: context.settings and None)
    result = runner.invoke(app, ["act", "--endpoint", "nonsense"])
    assert result.exit_code == 2
    assert "Setting endpoint of the command line" in result.stderr
    result = runner.invoke(app, ["act", "--timeout", "soon"])
    assert result.exit_code == 2
    assert "--timeout" in result.stderr


def test_every_setting_has_its_flag() -> None:
    assert set(SETTING_FLAGS) == set(Settings.model_fields)


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["job", "nonsense"],
        ["job", "get"],
        ["job", "get", "seven"],
        ["job", "get", "0"],
        ["job", "get", "-1"],
        ["job", "get", str(2**64)],
        ["job", "get", "1", "--nonsense"],
        ["job", "list", "-o", "xml"],
        ["credit", "transfer", "0x00", "much"],
        ["credit", "transfer", "0x00", "-1"],
        ["submit", "x.yaml", "--array", "0"],
        ["provider", "register", "--cpu-price", "x", "--mem-price", "1"],
        ["devnet", "up", "--port", "70000"],
        ["demo", "--chain", "bitcoin"],
    ],
    ids=" ".join,
)
def test_usage_errors_end_with_exit_code_2(arguments: list[str]) -> None:
    result = runner.invoke(real_app, arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("job list -o xml", "'xml' is not one of 'table', 'json', 'csv'"),
        ("gateway serve --max-files x", "'x' is not a whole number of 1 or more, such as 1"),
        ("gateway serve --port 70000", "'70000' is not a whole number from 0 to 65535, such as"),
        ("relay serve --collect 9", "'9' is not a number from 0 to 5, such as"),
        ("job list --confirmations 1.5", "'1.5' is not a whole number from 0 to 10000, such as 1"),
        ("job list --timeout 0", "'0' is not a number above 0, at most 86400, such as 60"),
        ("job list --log-level loud", "'loud' is not one of 'debug', 'info', 'warning' or 'error'"),
    ],
)
def test_an_invalid_value_is_named_with_the_allowed_ones(line: str, message: str) -> None:
    result = runner.invoke(real_app, line.split(), terminal_width=300)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_version() -> None:
    result = runner.invoke(real_app, ["--version"])
    assert re.fullmatch(r"deepsquare \d+\.\d+\.\d+\n", result.stdout)


def test_config_show_hides_the_key_in_an_endpoint() -> None:
    arguments = ["config", "show", "-o", "json", "--endpoint", "https://u:p@host/v3/secret"]
    result = runner.invoke(real_app, arguments)
    values = {row["setting"]: row["value"] for row in json.loads(result.stdout)}
    assert values["endpoint"] == "https://host/..."
    assert "secret" not in result.output


def test_amounts_prices_and_labels() -> None:
    assert amount("1.5") == 15 * 10**17
    assert price("3.6") == 10**15
    assert label("a=b=c") == ("a", "b=c")
    for text in ("-1", "x", "1e3", "0.0000000000000000001"):
        with pytest.raises(typer.BadParameter):
            amount(text)
    for text in ("a", "=b", "a="):
        with pytest.raises(errors.UsageError):
            label(text)


def test_nothing_shows_a_traceback_unless_requested(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(**_options: object) -> None:
        raise AttributeError("a fault outside of any command")

    monkeypatch.setattr("deepsquare_chain.cli.app.app", broken)
    with pytest.raises(SystemExit) as exit_info:
        main(["job", "list"])
    assert exit_info.value.code == 1
    assert "unexpected AttributeError: a fault outside" in capsys.readouterr().err
    with pytest.raises(AttributeError):
        main(["job", "list", "--debug"])


@pytest.mark.parametrize("gasless", [False, True])
async def test_an_interrupted_command_reports_sent_transactions(
    monkeypatch: pytest.MonkeyPatch, gasless: bool
) -> None:
    lines: list[str] = []
    printer: Any = SimpleNamespace(note=lines.append)
    context: Any = CommandContext(printer)
    context.settings = None
    entry = SimpleNamespace(
        label="submit 1 job", digest="0xaa", call=SimpleNamespace(label="submit 1 job"),
        latest=SimpleNamespace(tx_hash="0xaa"),
    )  # fmt: skip

    @asynccontextmanager
    async def opened(*_: Any) -> AsyncIterator[Any]:
        yield SimpleNamespace(
            sender=SimpleNamespace(pending=lambda: [entry]),
            store=SimpleNamespace(open_requests=lambda: [entry]),
        )

    monkeypatch.setattr("deepsquare_chain.client.gasless.open_gasless", opened)
    monkeypatch.setattr("deepsquare_chain.client.network.open_wallet", opened)
    with pytest.raises(asyncio.CancelledError):
        async with frame.open_sending(context, gasless=gasless, yes=True):
            raise asyncio.CancelledError
    [line] = lines
    command = "relay requests" if gasless else "tx list"
    assert line.startswith("'submit 1 job' was sent and may still be executed (0xaa)")
    assert f"`deepsquare {command}`" in line


@pytest.mark.parametrize(
    ("follow", "status", "continues"),
    [
        (True, JobStatus.RUNNING, True),
        (True, JobStatus.FINISHED, False),
        (False, JobStatus.RUNNING, False),
    ],
)
async def test_ctrl_c_while_a_log_is_followed_reports_that_the_job_continues(
    monkeypatch: pytest.MonkeyPatch, follow: bool, status: JobStatus, continues: bool
) -> None:
    async def read_jobs(_: Any) -> list[Any]:
        return [SimpleNamespace(status=status)]

    async def log_of(*_: Any, **__: Any) -> AsyncIterator[bytes]:
        assert ("Job 7 continues" in context.continues) is continues
        yield b"line\n"

    monkeypatch.setattr(job_output, "log_of", log_of)
    printed: list[bytes] = []
    context: Any = SimpleNamespace(
        continues="", settings=None, printer=SimpleNamespace(raw=printed.append)
    )
    contracts: Any = SimpleNamespace(scheduler=SimpleNamespace(get_existing_jobs=read_jobs))
    await job_output.stream(context, contracts, 7, follow=follow)
    assert printed == [b"line\n"]
