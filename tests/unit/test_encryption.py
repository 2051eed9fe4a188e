"""Results and logs that only the holder of an age key can read."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyrage import x25519

from deepsquare_chain.client import job_file
from deepsquare_chain.errors import AuditError, JobFileError, NotAuthorisedError, UsageError
from deepsquare_chain.job import JobFlags
from deepsquare_chain.provider.uploads import Upload, _resume_position
from deepsquare_chain.settings import Settings
from deepsquare_chain.store.encryption import (
    LogDecoder,
    decrypt_secrets,
    encrypt,
    encrypt_file,
    encrypt_secrets,
    encrypted_log_part,
    ensure_result_key,
    find_result_key,
    load_result_key,
    manifest,
    read_manifest,
    secrets_labels,
)
from deepsquare_chain.workflow import Definition, parse_job_file

KEY = x25519.Identity.generate()
OTHER = x25519.Identity.generate()
TO = [str(KEY.to_public())]
JOB_FILE = b"""
resources: {tasks: 1, cpusPerTask: 1, memPerCpu: 64, gpus: 0}
timeLimit: 1m
credits: 1
steps: [{run: {command: echo hello}}]
"""


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "alice.json.age-key"
    path.write_text(f"# made by age-keygen\n{KEY}\n{OTHER}\n")
    path.chmod(0o600)
    return path


def test_a_key_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "wallets" / "alice.age-key"
    key, new = ensure_result_key(path)
    assert new
    assert path.stat().st_mode & 0o777 == 0o600
    same_key, new = ensure_result_key(path)
    assert (same_key.recipient, new) == (key.recipient, False)
    assert key.recipient in path.read_text()
    assert key.decrypt(encrypt(b"secret", [key.recipient])) == b"secret"


def test_the_first_key_of_a_file_is_encrypted_to_and_all_decrypt(key_file: Path) -> None:
    key = load_result_key(key_file)
    assert key.recipient == TO[0]
    for value in (KEY, OTHER):
        assert key.decrypt(encrypt(b"x", [str(value.to_public())])) == b"x"


@pytest.mark.parametrize("text", ["", "# a comment\n", "AGE-SECRET-KEY-1XYZ\n", "age1abc\n"])
def test_an_invalid_key_file_is_refused_and_not_replaced(tmp_path: Path, text: str) -> None:
    path = tmp_path / "key"
    path.write_text(text)
    path.chmod(0o600)
    for open_key in (load_result_key, ensure_result_key):
        with pytest.raises(UsageError, match="does not contain an age key"):
            open_key(path)
    assert path.read_text() == text


def test_a_key_that_others_can_read_is_refused(key_file: Path) -> None:
    key_file.chmod(0o644)
    with pytest.raises(UsageError, match="is readable by other users"):
        load_result_key(key_file)


def test_no_key_and_a_wrong_key_are_distinguished_from_altered_data(
    tmp_path: Path, key_file: Path
) -> None:
    with pytest.raises(NotAuthorisedError, match="no key at"):
        find_result_key(tmp_path / "none", "It")
    ciphertext = encrypt(b"secret" * 100, TO)
    stranger, _ = ensure_result_key(tmp_path / "stranger")
    with pytest.raises(NotAuthorisedError, match="encrypted to other keys"):
        stranger.decrypt(ciphertext)
    key = load_result_key(key_file)
    for altered in (ciphertext[:-1], ciphertext[:-1] + bytes([ciphertext[-1] ^ 1]), b"", b"age"):
        with pytest.raises(AuditError, match="altered"):
            key.decrypt(altered)


def test_a_full_disk_is_no_altered_file(key_file: Path) -> None:
    class Full(io.BytesIO):
        def write(self, _data: object) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        load_result_key(key_file).decrypt_file(io.BytesIO(encrypt(b"x" * 200_000, TO)), Full())
    with pytest.raises(OSError, match="No space"):
        encrypt_file(io.BytesIO(b"x"), Full(), TO)


def test_the_key_is_next_to_the_wallet_unless_its_path_is_given(tmp_path: Path) -> None:
    wallet = tmp_path / "alice.json"
    assert Settings(keystore=wallet).result_key_file == tmp_path / "alice.json.age-key"
    assert Settings(state_dir=tmp_path).result_key_file == tmp_path / "results.age-key"
    with_path = Settings(keystore=wallet, result_key=tmp_path / "key")
    assert with_path.result_key_file == tmp_path / "key"
    assert with_path.result_key_file in with_path.private_paths  # jobs can't see it


def test_recipients_are_part_of_the_definition() -> None:
    plain = parse_job_file(JOB_FILE).definition
    definition = parse_job_file(JOB_FILE + f"recipients: [{TO[0]}]\n".encode()).definition
    assert definition.recipients == tuple(TO)
    assert Definition.from_bytes(definition.to_bytes()) == definition
    assert plain.encrypted_to(TO * 2) == definition
    assert b"recipients" not in plain.to_bytes()
    # The last character is part of the checksum.
    last = "p" if TO[0].endswith("q") else "q"
    for wrong in (f"{TO[0][:-1]}{last}", str(KEY), "ssh-ed25519 AAAA", "age1"):
        with pytest.raises(JobFileError, match="public key of age"):
            plain.encrypted_to([wrong])


def test_a_manifest_is_of_one_job(key_file: Path) -> None:
    files = [{"name": "output", "size": 3, "digest": "ab", "part": "encrypted/0"}]
    data = manifest(7, files)
    assert read_manifest(data, 7) == files
    for wrong, job_id in ((data, 8), (b"{}", 7), (b"[" * 10_000, 7), (b"", 7)):
        with pytest.raises(AuditError):
            read_manifest(wrong, job_id)


# -- secrets of jobs


def test_secrets_are_for_one_customer_and_the_providers_that_may_run_the_job(
    tmp_path: Path, key_file: Path
) -> None:
    secrets = {"TOKEN": "s3cret", "EMPTY": "", "LINES": "a\nb"}
    ciphertext = encrypt_secrets(secrets, "0xABCD", TO)
    assert "s3cret" not in ciphertext
    assert b"s3cret" not in base64.b64decode(ciphertext)
    key = load_result_key(key_file)
    assert decrypt_secrets(ciphertext, "0xabcd", key) == secrets
    # Secrets copied into another customer's job can't be decrypted.
    with pytest.raises(NotAuthorisedError, match="another customer"):
        decrypt_secrets(ciphertext, "0xabce", key)
    stranger, _ = ensure_result_key(tmp_path / "stranger")
    with pytest.raises(NotAuthorisedError, match="other keys"):
        decrypt_secrets(ciphertext, "0xabcd", stranger)
    for wrong in (base64.b64encode(encrypt(b"[]", TO)).decode(), "QUJD", ciphertext[:-8]):
        with pytest.raises(AuditError):
            decrypt_secrets(wrong, "0xabcd", key)


def test_a_definition_with_secrets_shows_none_of_them() -> None:
    ciphertext = encrypt_secrets({"TOKEN": "s3cret", "LONG": "x" * 20_000}, "0xABCD", TO)
    definition = replace(parse_job_file(JOB_FILE).definition, secrets=ciphertext)
    assert Definition.from_bytes(definition.to_bytes()) == definition
    assert definition.redacted()["secrets"] == "(hidden)"
    with pytest.raises(JobFileError, match="base64"):
        Definition.from_bytes(definition.to_bytes().replace(ciphertext.encode(), b"not base64!"))


class Grid:
    """Providers of a grid, by their labels; all of them could run the job."""

    def __init__(self, *labels: dict[str, str]) -> None:
        self._labels = labels

    async def quotes(self, _contracts: object, _terms: object) -> list[object]:
        return [
            SimpleNamespace(provider=SimpleNamespace(labels=label), eligible=True)
            for label in self._labels
        ]


async def test_a_job_with_secrets_goes_to_providers_that_can_read_them(
    monkeypatch: pytest.MonkeyPatch, key_file: Path
) -> None:
    file = parse_job_file(JOB_FILE + b"uses: [gpu.model=h100]\n")
    forged = {**secrets_labels(TO[0]), "secrets.key": str(OTHER.to_public())}
    grid = Grid({}, forged, secrets_labels(TO[0]))
    monkeypatch.setattr(job_file, "quotes", grid.quotes)
    definition, terms = await job_file.with_secrets(
        *(None, file.definition, file.terms(), {"TOKEN": "s3cret"}), customer="0xabcd"
    )
    assert terms.uses == f"gpu.model=h100,secrets:in:{secrets_labels(TO[0])['secrets']}"
    assert JobFlags.NO_SELF_SCHEDULING in terms.flags
    assert definition.secrets is not None
    assert decrypt_secrets(definition.secrets, "0xabcd", load_result_key(key_file)) == {
        "TOKEN": "s3cret"
    }
    monkeypatch.setattr(job_file, "quotes", Grid({}, forged).quotes)
    with pytest.raises(UsageError, match="No eligible provider"):
        await job_file.with_secrets(
            *(None, file.definition, file.terms(), {"TOKEN": "x"}), customer="0xabcd"
        )
    with pytest.raises(JobFileError, match="reserved for the grid"):
        await job_file.with_secrets(
            *(None, file.definition, file.terms(), {"DEEPSQUARE_X": "x"}), customer="0xabcd"
        )


def test_secrets_come_from_the_environment_or_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TOKEN", "s3cret")
    file = tmp_path / "token"
    file.touch(0o600)
    file.write_text("from a file\n")
    assert job_file.read_secrets(["TOKEN", f"OTHER={file}"]) == {
        "TOKEN": "s3cret",
        "OTHER": "from a file",
    }
    with pytest.raises(UsageError, match="does not have this variable"):
        job_file.read_secrets(["MISSING_TOKEN"])


# -- logs


def decoded(key_file: Path | None, *pieces: bytes, job_id: int = 7) -> bytes:
    decoder = LogDecoder(job_id, key_file)
    return b"".join([*(decoder.feed(piece) for piece in pieces), decoder.finish()])


def log_of(*parts: tuple[int, int, bytes], job_id: int = 7) -> list[bytes]:
    return [
        encrypted_log_part(job_id, start, end, data, TO, first=number == 0)
        for number, (start, end, data) in enumerate(parts)
    ]


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 30), max_size=5), size=st.integers(1, 400), seed=st.randoms())
def test_a_log_is_the_same_however_it_is_cut(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], size: int, seed: object
) -> None:
    path = tmp_path_factory.getbasetemp() / "log.age-key"
    if not path.exists():
        path.touch(0o600)
        path.write_text(str(KEY))
    text = bytes(range(65, 95))
    places = sorted({0, *cuts, len(text)})
    parts = [(start, end, text[start:end]) for start, end in pairwise(places)]
    whole = b"".join(log_of(*parts))
    assert text[:20] not in whole
    pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
    assert decoded(path, *pieces) == text


@pytest.mark.parametrize(
    "text", [b"", b"d", b"deepsquare-encrypted-log", b"hello\n", b"deepsquare-encrypted-log/2\n"]
)
def test_a_log_that_is_not_encrypted_passes_through(text: bytes) -> None:
    assert decoded(None, *(bytes([item]) for item in text)) == text


def test_a_log_without_its_end_is_refused_unless_it_still_grows(key_file: Path) -> None:
    whole = b"".join(log_of((0, 4, b"abcd"), (4, 6, b"ef")))
    decoder = LogDecoder(7, key_file)
    assert decoder.feed(whole[:-1]) == b"abcd"
    assert decoder.finish(complete=False) == b""
    with pytest.raises(AuditError, match="cut short"):
        decoder.finish()


def test_repeated_parts_are_shown_once(key_file: Path) -> None:
    """A gateway that lost the end of a log gets all of it again, in other parts."""
    parts = log_of((0, 4, b"abcd"), (4, 6, b"ef"), (0, 5, b"abcde"), (5, 9, b"fghi"))
    assert decoded(key_file, *parts) == b"abcdefghi"


@pytest.mark.parametrize(
    ("size", "encrypted", "position", "offset"),
    [
        (80, True, 0, 80),  # it lost a part: everything is sent again, after the remaining part
        (130, True, 50, 130),  # it has the part whose response was lost
        (
            80,
            False,
            0,
            0,
        ),  # plain bytes are sent again from the start; the gateway keeps those that it has
    ],
)
def test_a_log_resumes_at_the_position_of_the_gateway(
    size: int, encrypted: bool, position: int, offset: int
) -> None:
    upload = Upload("key", 7, "handle", position=50, offset=100)
    resume_position = _resume_position(upload, size, encrypted=encrypted)
    assert (resume_position.position, resume_position.offset) == (position, offset)


def test_a_note_about_missing_output_is_shown(key_file: Path) -> None:
    parts = log_of((0, 4, b"abcd"), (4, 90, b"[... 86 bytes left out ...]"), (90, 91, b"z"))
    assert decoded(key_file, *parts) == b"abcd[... 86 bytes left out ...]z"


def test_an_altered_log_is_detected(tmp_path: Path, key_file: Path) -> None:
    first, second, third = log_of((0, 2, b"ab"), (2, 4, b"cd"), (4, 6, b"ef"))
    other = log_of((0, 2, b"xy"), job_id=8)[0]
    flipped = first[:-1] + bytes([first[-1] ^ 1])
    start = first[: first.index(b"\n") + 1]
    for altered in (first + third, other, flipped, start + b"\xff" * 8, start + bytes(8)):
        with pytest.raises(AuditError):
            decoded(key_file, altered, second)
    with pytest.raises(NotAuthorisedError, match="no key"):
        decoded(tmp_path / "none", first)
