"""Layers of settings, and errors that name the layer."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepsquare_chain.errors import UsageError
from deepsquare_chain.settings import (
    READY_CONTEXTS,
    Settings,
    find_sources,
    format_setting,
    load_settings,
    safe_url,
    split_urls,
    user_config_path,
)
from deepsquare_chain.web.site import Link


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("DEEPSQUARE_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


@pytest.fixture
def user(tmp_path: Path) -> Path:
    return tmp_path / "user" / "config.toml"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def load(project: Path, user: Path, **flags: object) -> Settings:
    return load_settings(flags, project_dir=project, user_config=user)


def test_defaults(project: Path, user: Path) -> None:
    result = load(project, user)
    assert result.endpoint == "http://127.0.0.1:8545"
    assert result.state_dir == Path(".deepsquare")
    assert result.keystore is None
    assert result.log_level == "info"


def test_each_layer_wins_over_the_next(
    project: Path, user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(user, 'endpoint = "http://user:1"')
    assert load(project, user).endpoint == "http://user:1"
    write(project / ".deepsquare.toml", 'endpoint = "http://project:1"')
    assert load(project, user).endpoint == "http://project:1"
    monkeypatch.setenv("DEEPSQUARE_ENDPOINT", "http://environment:1")
    assert load(project, user).endpoint == "http://environment:1"
    assert load(project, user, endpoint="http://flag:1").endpoint == "http://flag:1"
    assert load(project, user, endpoint=None).endpoint == "http://environment:1"


def test_an_empty_variable_is_ignored(
    project: Path, user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSQUARE_ENDPOINT", "")
    assert load(project, user).endpoint == "http://127.0.0.1:8545"


def test_paths_in_a_file_are_relative_to_it(project: Path, user: Path) -> None:
    write(project / ".deepsquare.toml", 'keystore = "keys/me.json"\nstore = "/abs"')
    write(user, 'deployment = "~/d.json"')
    result = load(project, user, state_dir=Path("here"))
    assert result.keystore == project / "keys/me.json"
    assert result.store == Path("/abs")
    assert result.deployment == Path.home() / "d.json"
    assert result.state_dir == Path("here")


def test_settings_can_not_be_changed(project: Path, user: Path) -> None:
    result = load(project, user)
    with pytest.raises(ValueError, match="frozen"):
        result.endpoint = "http://other:1"  # type: ignore[misc]


def test_user_config_path_follows_the_base_directory() -> None:
    assert user_config_path({"XDG_CONFIG_HOME": "/x"}) == Path("/x/deepsquare/config.toml")
    assert user_config_path({}) == Path.home() / ".config/deepsquare/config.toml"


@pytest.mark.parametrize("base", [None, "", "~nobody-of-this-name/config"])
def test_without_a_home_there_is_no_user_configuration(
    project: Path, base: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)
    if base is not None:
        monkeypatch.setenv("XDG_CONFIG_HOME", base)
    assert user_config_path() is None
    assert load_settings(project_dir=project).endpoint == Settings().endpoint
    with pytest.raises(UsageError, match="no context") as error:
        load_settings({"context": "main"}, project_dir=project)
    assert str(project) in error.value.hint


def test_a_byte_order_mark_is_ignored(project: Path, user: Path) -> None:
    write(project / ".deepsquare.toml", "\ufeffchain_id = 5")
    write(user, '\ufeffcontext = "far"\n[contexts.far]\nconfirmations = 3')
    result = load(project, user)
    assert (result.chain_id, result.confirmations) == (5, 3)


@pytest.mark.parametrize(
    "text",
    [
        'endpont = "http://x:1"',
        "[endpoint]\nurl=1",
        "chain_id = 0",
        "chain_id = true or",
        "timeout = 0",
        "log_level = 3",
        'confirmations = "many"',
        'endpoint = "ftp://x"',
        'endpoint = "http://"',
        'endpoint = "http://x:99999"',
        'endpoint = "http://[::1"',
    ],
)
def test_a_wrong_file_is_refused_by_name(project: Path, user: Path, text: str) -> None:
    write(project / ".deepsquare.toml", text)
    with pytest.raises(UsageError, match=r"\.deepsquare\.toml"):
        load(project, user)


def test_an_unknown_key_is_refused_with_the_one_that_was_meant(project: Path, user: Path) -> None:
    write(user, 'endpont = "http://x:1"')
    with pytest.raises(
        UsageError, match=r"config\.toml has an unknown setting 'endpont'"
    ) as error_info:
        load(project, user)
    assert error_info.value.hint == "Did you mean endpoint?"
    with pytest.raises(UsageError, match="the command line has an unknown setting 'zzz'"):
        load(project, user, zzz=1)


def test_the_layer_of_a_wrong_value_is_named(
    project: Path, user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("deepsquare_log_level", "loud")
    with pytest.raises(UsageError, match=r"log_level of the environment \(deepsquare_log_level\)"):
        load(project, user)
    with pytest.raises(UsageError, match="log_level of the command line"):
        load(project, user, log_level="louder")
    write(user, "follow_offer = 'perhaps'")
    with pytest.raises(UsageError, match="'perhaps' is neither true nor false"):
        load(project, user, log_level="info")
    write(user, "store = 3")
    with pytest.raises(UsageError, match=r"store of .*: '3' is not text in quotes"):
        load(project, user, log_level="info")


def test_credentials_of_a_wrong_endpoint_are_not_repeated(project: Path, user: Path) -> None:
    with pytest.raises(UsageError) as error_info:
        load(project, user, endpoint="ftp://me:secret@host/key")
    assert "secret" not in str(error_info.value) + error_info.value.hint


def test_a_file_that_can_not_be_read(project: Path, user: Path) -> None:
    (project / ".deepsquare.toml").mkdir()
    with pytest.raises(UsageError, match="can't be read"):
        load(project, user)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff", "not UTF-8"),
        (b"a" * 1_000_001, "larger than"),
        (b"a = ", "not valid TOML"),
        (b"a = " + b"[" * 5_000, "not valid TOML"),
        (b"a = " + b"9" * 5_000, "not valid TOML"),
    ],
)
def test_hostile_files_are_refused(project: Path, user: Path, data: bytes, message: str) -> None:
    (project / ".deepsquare.toml").write_bytes(data)
    with pytest.raises(UsageError, match=message):
        load(project, user)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_file_is_settings_or_a_refusal(project: Path, user: Path, data: bytes) -> None:
    (project / ".deepsquare.toml").write_bytes(data)
    try:
        load(project, user)
    except UsageError as error:
        assert ".deepsquare.toml" in str(error)  # noqa: PT017 - both endings are right


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        ("http://127.0.0.1:8545", "http://127.0.0.1:8545"),
        ("http://127.0.0.1:8545/", "http://127.0.0.1:8545"),
        ("https://me:pass@node.example/v3/key?token=1", "https://node.example/..."),
        ("wss://node.example?key=1", "wss://node.example/..."),
        ("http://[::1]:8545", "http://[::1]:8545"),
        ("http://x:notaport", "(unreadable URL)"),
        ("http://a/key,https://u:p@b:1", "http://a/..., https://b:1"),
    ],
)
def test_urls_are_shown_without_secrets(url: str, safe: str) -> None:
    assert safe_url(url) == safe


TWO = ("http://one:1/a,b", "https://two")


@pytest.mark.parametrize(
    "text", ['["http://one:1/a,b", "https://two"]', '"http://one:1/a,b , https://two"']
)
def test_several_endpoints_of_a_file(project: Path, user: Path, text: str) -> None:
    write(project / ".deepsquare.toml", f"endpoint = {text}")
    assert split_urls(load(project, user).endpoint) == TWO


def test_several_endpoints_of_flags_and_the_environment(
    project: Path, user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSQUARE_ENDPOINT", ", ".join(TWO))
    assert split_urls(load(project, user).endpoint) == TWO
    result = load(project, user, endpoint=["http://flag:1", "http://flag:2", "http://flag:1"])
    assert split_urls(result.endpoint) == ("http://flag:1", "http://flag:2")
    # No flag was given.
    assert split_urls(load(project, user, endpoint=[]).endpoint) == TWO


@pytest.mark.parametrize("url", ["http://one,nonsense://", "http://one,", ""])
def test_each_endpoint_is_checked(project: Path, user: Path, url: str) -> None:
    with pytest.raises(UsageError, match="endpoint of the command line"):
        load(project, user, endpoint=url)


def test_a_websocket_is_one(project: Path, user: Path) -> None:
    assert load(project, user, websocket="wss://x/key").websocket == "wss://x/key"
    with pytest.raises(UsageError, match="websocket of the command line: must be a URL such as ws"):
        load(project, user, websocket="http://x")


CONTEXTS = """
[contexts.test]
endpoint = "http://test:1"
deployment = "test.json"
[contexts.main]
endpoint = ["http://main:1", "http://main:2"]
"""


def test_a_context_chosen_by_a_flag_wins_over_both_files(
    project: Path, user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(user, f'endpoint = "http://user:1"\ntimeout = 7\n{CONTEXTS}')
    write(project / ".deepsquare.toml", 'endpoint = "http://project:1"')
    assert load(project, user).endpoint == "http://project:1"
    result = load(project, user, context="test")
    assert (result.context, result.endpoint, result.timeout) == ("test", "http://test:1", 7)
    assert result.deployment == user.parent / "test.json"
    assert load(project, user, context="main").endpoint == "http://main:1,http://main:2"
    flags = {"context": "test", "endpoint": "http://flag:1"}
    assert load(project, user, **flags).endpoint == "http://flag:1"
    monkeypatch.setenv("DEEPSQUARE_CONTEXT", "main")
    assert load(project, user).endpoint == "http://main:1,http://main:2"
    assert load(project, user, context="test").endpoint == "http://test:1"
    monkeypatch.setenv("DEEPSQUARE_ENDPOINT", "http://environment:1")
    assert load(project, user).endpoint == "http://environment:1"


def test_a_context_chosen_by_a_file_ranks_just_above_that_file(project: Path, user: Path) -> None:
    write(user, f'context = "test"\nendpoint = "http://user:1"\n{CONTEXTS}')
    assert load(project, user).endpoint == "http://test:1"
    write(project / ".deepsquare.toml", 'endpoint = "http://project:1"')
    result = load(project, user)
    assert (result.endpoint, result.deployment.name) == ("http://project:1", "test.json")
    write(project / ".deepsquare.toml", 'context = "main"\nendpoint = "http://project:1"')
    assert load(project, user).endpoint == "http://main:1,http://main:2"


def test_both_files_define_one_context_and_the_project_wins(project: Path, user: Path) -> None:
    write(user, CONTEXTS)
    write(project / ".deepsquare.toml", '[contexts.test]\nendpoint = "http://own:1"')
    result = load(project, user, context="test")
    assert (result.endpoint, result.deployment) == ("http://own:1", user.parent / "test.json")


def test_an_unknown_context_is_refused_with_those_there_are(project: Path, user: Path) -> None:
    with pytest.raises(UsageError, match="There is no context 'tset'") as error_info:
        load(project, user, context="tset")
    assert "[contexts.tset]" in error_info.value.hint
    write(user, CONTEXTS)
    with pytest.raises(UsageError) as error_info:
        load(project, user, context="tset")
    assert error_info.value.hint.startswith(
        "Contexts: arbitrum-sepolia, base-sepolia, main, sepolia, test; "
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("contexts = 3", "contexts must be tables"),
        ("[contexts]\nmain = 3", "contexts must be tables"),
        ('[contexts.main]\nendpont = "x"', "context 'main' of .* unknown setting 'endpont'"),
        ('[contexts.main]\ncontext = "main"', "context 'main' of .* unknown setting 'context'"),
        ("[contexts.main]\ntimeout = 0", "timeout of context main of .*toml"),
    ],
)
def test_wrong_contexts_are_refused_by_name(
    project: Path, user: Path, text: str, message: str
) -> None:
    write(project / ".deepsquare.toml", text)
    with pytest.raises(UsageError, match=message):
        load(project, user, context="main")


def test_each_value_has_its_source(
    project: Path, user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(user, f"timeout = 7\n{CONTEXTS}")
    write(project / ".deepsquare.toml", "confirmations = 3")
    monkeypatch.setenv("DEEPSQUARE_CHAIN_ID", "5")
    flags = {"context": "test", "log_level": "debug"}
    sources = find_sources(flags, project_dir=project, user_config=user)
    assert sources.origin("log_level") == "the command line"
    assert sources.origin("chain_id") == "the environment (DEEPSQUARE_CHAIN_ID)"
    assert sources.origin("endpoint") == f"context test of {user}"
    assert sources.origin("confirmations") == str(project / ".deepsquare.toml")
    assert sources.origin("timeout") == str(user)
    assert sources.origin("keystore") == "the defaults"
    assert set(sources.contexts) - set(READY_CONTEXTS) == {"test", "main"}


def test_a_displayed_value_hides_secrets_in_urls() -> None:
    assert format_setting("https://me:secret@node/key") == "https://node/..."
    assert (
        format_setting("postgresql+psycopg://me:secret@host/name")
        == "postgresql+psycopg://host/..."
    )
    assert format_setting("a.tx=https://x/tx/{} b=https://k@y") == "a.tx=https://x/... b=https://y"
    assert format_setting("https://x/?key=https://y/secret") == "https://x/..."
    assert (format_setting(None), format_setting(Path("a/b")), format_setting(3)) == (
        None,
        "a/b",
        "3",
    )


def test_the_home_of_another_user_is_ignored(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The kernel's error for a folder without search permission; root may search any.
    def closed(path: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", closed)
    assert load(project, tmp_path / "home" / "config.toml").confirmations == 1


def test_a_user_configuration_that_may_not_be_read_is_named(
    project: Path, user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(path: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    write(user, "confirmations = 3")
    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(UsageError, match="can't be read: Permission denied"):
        load(project, user)


@pytest.mark.parametrize("name", READY_CONTEXTS)
def test_ready_contexts_hold_valid_settings_which_a_file_may_change(
    project: Path, user: Path, name: str
) -> None:
    result = load(project, user, context=name)
    assert result.chain_id == READY_CONTEXTS[name]["chain_id"]
    assert Link.parse(result.explorer_links)[0].urls.keys() == {"tx", "address", "block"}
    write(user, f"[contexts.{name}]\nconfirmations = 7")
    assert load(project, user, context=name).confirmations == 7
