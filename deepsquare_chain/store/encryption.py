"""Results and logs encrypted with age (X25519), so that gateways and object stores can't read them.

The recipients are part of the definition. The provider encrypts before it uploads, and stores the
names of files in an encrypted manifest. A log is a sequence of frames: the length in four bytes,
then an age file of one line (`JOB FROM TO`, positions in the output) and the bytes printed between
them. Frames may repeat output of earlier ones, e.g. after an interrupted upload; readers skip it.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import pyrage
from pyrage import x25519

from deepsquare_chain.chain.wallet import read_secret, write_secret
from deepsquare_chain.errors import AuditError, NotAuthorisedError, NotFoundError, UsageError

#: Folder of encrypted files, both at a gateway and below a provider's folder of the run.
FOLDER: Final = "encrypted"
MANIFEST: Final = f"{FOLDER}/manifest"
_LOG_START: Final = b"deepsquare-encrypted-log/1\n"
#: Labels of a provider that accepts secrets: a short name of its key, and the key.
SECRETS_LABEL: Final = "secrets"
SECRETS_KEY_LABEL: Final = "secrets.key"
_LENGTH: Final = 4
_MAX_FRAME: Final = 1024 * 1024
_MAX_HEADER: Final = 64
_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class ResultKey:
    """The age key of a customer; `recipient` is its public part."""

    path: Path
    recipient: str
    _identities: tuple[Any, ...]

    def decrypt(self, data: bytes) -> bytes:
        """Return the decrypted content of an age file.

        Raises:
            NotAuthorisedError: The file is encrypted to other keys.
            AuditError: The file was altered.
        """
        target = io.BytesIO()
        self.decrypt_file(io.BytesIO(data), target)
        return target.getvalue()

    def decrypt_file(self, source: BinaryIO, target: Any) -> None:
        """Decrypt from one binary stream into another, in pieces.

        Raises:
            NotAuthorisedError: The source is encrypted to other keys.
            AuditError: The source was altered.
            OSError: A stream can't be read or written.
        """
        try:
            with _writer(target) as writer:
                pyrage.decrypt_io(source, writer, list(self._identities))
        except (pyrage.DecryptError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # an error of the streams, not of their content
            if "matching keys" in str(error):
                raise NotAuthorisedError(
                    f"It is encrypted to other keys than the one in {self.path}",
                    hint="Give the right key with --result-key.",
                ) from None
            raise AuditError(
                "The encrypted data was altered or is incomplete",
                hint="Ask the operator of the gateway; the provider may still have the original.",
            ) from None


def load_result_key(path: Path) -> ResultKey:
    """Load the key of a file in `age-keygen` format; the first key is used to encrypt.

    Raises:
        NotFoundError: The file does not exist.
        UsageError: The file can't be read, holds no key, or is readable by other users.
    """
    lines = [line.strip() for line in read_secret(path, "result key").splitlines()]
    try:
        identities = [x25519.Identity.from_str(line) for line in lines if line and line[0] != "#"]
    except pyrage.IdentityError:
        identities = []
    if not identities:
        raise UsageError(
            f"{path} does not contain an age key",
            hint="It has a line AGE-SECRET-KEY-1...; bring it back from a backup, or name another "
            "file with --result-key.",
        )
    return ResultKey(path, str(identities[0].to_public()), tuple(identities))


def ensure_result_key(path: Path) -> tuple[ResultKey, bool]:
    """Load the key of a file, creating it if missing; returns key and whether it was created.

    Errors as `load_result_key`.
    """
    try:
        return load_result_key(path), False
    except NotFoundError:
        identity = x25519.Identity.generate()
    try:
        write_secret(path, f"# public key: {identity.to_public()}\n{identity}\n", "result key")
    except UsageError:
        if not path.exists():
            raise
        return load_result_key(path), False  # another command created it first
    return load_result_key(path), True


def find_result_key(path: Path | None, description: str) -> ResultKey:
    """Load the key to decrypt `description`, a name for messages.

    Raises:
        NotAuthorisedError: There is no key.
        UsageError: The file can't be used.
    """
    with suppress(NotFoundError):
        if path is not None:
            return load_result_key(path)
    raise NotAuthorisedError(
        f"{description} is encrypted, and there is no key{'' if path is None else f' at {path}'}",
        hint="Give the file of the key with --result-key; it can't be decrypted without it.",
    )


# -- for providers


def encrypt(data: bytes, recipients: Sequence[str]) -> bytes:
    """Encrypt data to recipients, which were validated with the definition."""
    encrypted: bytes = pyrage.encrypt(data, _keys(recipients))
    return encrypted


def encrypt_file(source: BinaryIO, target: BinaryIO, recipients: Sequence[str]) -> None:
    """Encrypt from one binary stream into another, in pieces.

    Raises:
        OSError: A stream can't be read or written.
    """
    with _writer(target) as writer:
        pyrage.encrypt_io(source, writer, _keys(recipients))


def encrypted_log_part(
    job_id: int, start: int, end: int, data: bytes, recipients: Sequence[str], *, first: bool
) -> bytes:
    """Return the frame of an encrypted log for the output between two positions."""
    frame = encrypt(f"{job_id} {start} {end}\n".encode() + data, recipients)
    return (_LOG_START if first else b"") + len(frame).to_bytes(_LENGTH, "big") + frame


def manifest(job_id: int, files: Sequence[dict[str, Any]]) -> bytes:
    """Return the list of an encrypted job's files; `part` is the name of each encrypted file."""
    return json.dumps({"version": _VERSION, "job": job_id, "files": list(files)}).encode()


class _CheckedWriter:
    """Writes to a stream and keeps a write error, which pyrage may ignore at the end."""

    def __init__(self, target: Any) -> None:
        self._target = target
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write all of the data."""
        try:
            self._target.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        return len(data)

    def flush(self) -> None:
        """Do nothing: the stream is flushed when it is closed."""


@contextmanager
def _writer(target: Any) -> Iterator[_CheckedWriter]:
    """Provide a writer for pyrage; raises a write error even if pyrage ignored it."""
    writer = _CheckedWriter(target)
    try:
        yield writer
    finally:
        if writer.error is not None:
            raise writer.error


def _keys(recipients: Sequence[str]) -> list[Any]:
    return [x25519.Recipient.from_str(recipient) for recipient in recipients]


# -- secrets of jobs


def secrets_labels(recipient: str) -> dict[str, str]:
    """Return the labels of a provider that accepts secrets: short name and public key."""
    name = hashlib.sha256(recipient.encode()).hexdigest()[:12]
    return {SECRETS_LABEL: name, SECRETS_KEY_LABEL: recipient}


def encrypt_secrets(secrets: Mapping[str, str], customer: str, recipients: Sequence[str]) -> str:
    """Encrypt variables of a customer's job to the providers that may run it (base64).

    Raises:
        UsageError: A provider published an invalid key.
    """
    body = {"customer": customer.lower(), "env": dict(secrets)}
    try:
        return base64.b64encode(encrypt(json.dumps(body).encode(), recipients)).decode()
    except pyrage.RecipientError:
        raise UsageError("The published key of a provider is not an age key") from None


def decrypt_secrets(text: str, customer: str, key: ResultKey) -> dict[str, str]:
    """Decrypt the secrets of a customer's job; returns its variables.

    Secrets are bound to the customer, so that a copy in a job of another account is refused.

    Raises:
        NotAuthorisedError: The secrets are encrypted to other keys, or belong to another customer.
        AuditError: The secrets were altered.
    """
    try:
        body = _json_object(key.decrypt(base64.b64decode(text, validate=True)))
    except ValueError:  # not base64
        body = {}
    env = body.get("env")
    if not isinstance(env, dict):
        raise AuditError("The secrets of the job are not readable")
    if body.get("customer") != customer.lower():
        raise NotAuthorisedError("The secrets of the job belong to another customer")
    return {str(name): str(value) for name, value in env.items()}


def _json_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object; empty if the data is something else."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


# -- for customers


def read_manifest(data: bytes, job_id: int) -> list[dict[str, Any]]:
    """Return the files of a decrypted manifest; their values come unchecked from the provider.

    Raises:
        AuditError: The data is not a manifest, or that of another job.
    """
    body = _json_object(data)
    files = body.get("files")
    if (
        body.get("version") != _VERSION
        or body.get("job") != job_id
        or not isinstance(files, list)
        or not all(isinstance(file, dict) for file in files)
    ):
        raise AuditError(
            f"The gateway does not have a valid list of files of job {job_id}",
            hint="Ask the provider of the job, or the operator of the gateway.",
        )
    return files


class LogDecoder:
    """Decrypts the log of one job as a stream; a log that is not encrypted is returned unchanged.

    The key is read when it is first needed; `key_file` is None if there is none.
    """

    def __init__(self, job_id: int, key_file: Path | None) -> None:
        self._job_id = job_id
        self._key_file = key_file
        self._key: ResultKey | None = None
        self._encrypted: bool | None = None
        self._buffer = b""
        self._position = 0

    def feed(self, data: bytes) -> bytes:
        """Return the output in the next bytes of a log; incomplete frames are kept.

        Raises:
            NotAuthorisedError: The log is encrypted to another key, or there is no key.
            AuditError: The log was altered, or belongs to another job.
        """
        self._buffer += data
        if self._encrypted is None:
            head = self._buffer[: len(_LOG_START)]
            if len(head) < len(_LOG_START) and _LOG_START.startswith(head):
                return b""
            self._encrypted = head == _LOG_START
            if self._encrypted:
                self._buffer = self._buffer[len(_LOG_START) :]
        if not self._encrypted:
            return self._take_rest()
        output = b""
        while (frame := self._frame()) is not None:
            output += self._decrypt_frame(frame)
        return output

    def finish(self, *, complete: bool = True) -> bytes:
        """Return the rest of a log at its end that was too short to detect encryption.

        Raises:
            AuditError: The log is `complete`, but its last frame is not.
        """
        if not self._encrypted:
            return self._take_rest()
        if complete and self._buffer:
            raise self._altered_error()
        return b""

    def _take_rest(self) -> bytes:
        rest, self._buffer = self._buffer, b""
        return rest

    def _frame(self) -> bytes | None:
        length = int.from_bytes(self._buffer[:_LENGTH], "big")
        if length > _MAX_FRAME:
            raise self._altered_error()
        if len(self._buffer) < _LENGTH + length or not self._buffer:
            return None
        frame = self._buffer[_LENGTH : _LENGTH + length]
        self._buffer = self._buffer[_LENGTH + length :]
        return frame

    def _decrypt_frame(self, frame: bytes) -> bytes:
        self._key = self._key or find_result_key(
            self._key_file, f"The output of job {self._job_id}"
        )
        head, newline, data = self._key.decrypt(frame).partition(b"\n")
        numbers = head.split(b" ")
        if (
            not newline
            or len(head) > _MAX_HEADER
            or not all(number.isdigit() for number in numbers)
        ):
            raise self._altered_error()
        if len(numbers) != 3 or int(numbers[0]) != self._job_id:
            raise self._altered_error()
        start, end = int(numbers[1]), int(numbers[2])
        if start > self._position or end < start:
            raise self._altered_error()
        repeated = self._position - start
        self._position = max(self._position, end)
        # A length that differs: the data is a note about omitted output, which is not cut.
        return (
            data[repeated:] if len(data) == end - start else data if end > start + repeated else b""
        )

    def _altered_error(self) -> AuditError:
        return AuditError(
            f"The encrypted log of job {self._job_id} was altered or cut short at the gateway",
            hint=f"`deepsquare job results {self._job_id}` compares the output with the chain.",
        )
