"""The browser's script for the gateway, run by Node.js with a stubbed page and a stubbed gateway."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from deepsquare_chain.web.site import FOLDER

MARKER = b"deepsquare-encrypted-log/1\nbinary"
ENCRYPTED = "It is encrypted to its customer's key."
#: Serves the log's chunks, each in a connection of its own if `lost` is set, and prints its text.
HARNESS = """
import { showOutput } from "./gateway.mjs";
const { chunks, lost } = JSON.parse(process.argv[2]);
const session = { gateway: "http://gateway", account: "", token: "", expires: 1e12 };
globalThis.sessionStorage = { getItem: () => JSON.stringify(session) };
globalThis.setTimeout = (run) => queueMicrotask(run);
const frame = (chunk) => `event: log\\ndata: ${chunk}\\n\\n`;
const offsets = chunks.map((_, index) => chunks.slice(0, index).reduce((sum, chunk) => sum + atob(chunk).length, 0));
globalThis.fetch = async (url) => {
  if (url.endsWith("/results")) return Response.json({ files: [] });
  const first = Number(new URL(url).searchParams.get("offset"));
  const rest = chunks.filter((_, index) => offsets[index] >= first);
  const sent = lost ? rest.slice(0, 1) : rest;
  const end = sent.length === rest.length ? "event: end\\ndata: {}\\n\\n" : "";
  return new Response(sent.map(frame).join("") + end);
};
const log = { textContent: "" };
const section = { dataset: { job: "7" }, querySelector: (name) => (name === "pre" ? log : {}) };
await showOutput(section, session);
process.stdout.write(log.textContent);
"""


@pytest.mark.parametrize("is_lost", [False, True], ids=["one connection", "lost connections"])
@pytest.mark.parametrize(
    ("chunks", "text"),
    [
        ([MARKER], ENCRYPTED),
        ([MARKER[:1], MARKER[1:20], MARKER[20:]], ENCRYPTED),
        ([b"hello\n", b"world\n"], "hello\nworld\n"),
        ([b"deepsquare-encrypted", b" is a word\n"], "deepsquare-encrypted is a word\n"),
        ([b"deep"], "deep"),
        (["é".encode()[:1], "é".encode()[1:] + b"!"], "é!"),
        ([], "It printed nothing."),
    ],
    ids=["marker", "split marker", "plain", "begins alike", "short", "split character", "empty"],
)
def test_an_encrypted_log_is_recognised_in_any_chunks(
    chunks: Sequence[bytes], text: str, is_lost: bool, tmp_path: Path
) -> None:
    script = (FOLDER / "static/gateway.js").read_text(encoding="utf-8")
    (tmp_path / "gateway.mjs").write_text(script, encoding="utf-8")
    (tmp_path / "harness.mjs").write_text(HARNESS, encoding="utf-8")
    log = {"chunks": [base64.b64encode(chunk).decode() for chunk in chunks], "lost": is_lost}
    result = subprocess.run(
        ["node", "harness.mjs", json.dumps(log)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(text) if text == ENCRYPTED else result.stdout == text
