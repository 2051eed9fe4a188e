"""Anvil, a real node for tests and demos, from its npm package or another installation."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from deepsquare_chain.devnet.node.base import (
    DEFAULT_CHAIN_ID,
    DEV_ACCOUNTS,
    DEV_BALANCE,
    DEV_MNEMONIC,
    ProgramNode,
)
from deepsquare_chain.errors import NotFoundError, UsageError
from deepsquare_chain.observability.serving import HOST

PACKAGE = "@foundry-rs/anvil-linux-amd64"
VARIABLE = "DEEPSQUARE_ANVIL"
_IN_PACKAGE = Path("node_modules") / PACKAGE / "bin" / "anvil"


def find_anvil() -> Path:
    """Find anvil: ``DEEPSQUARE_ANVIL``, npm's package here or in the project, then the PATH.

    Raises ``UsageError`` if the variable does not name a program, ``NotFoundError`` if there is none.
    """
    named = os.environ.get(VARIABLE)
    if named:
        if not _is_program(Path(named)):
            raise UsageError(
                f"{VARIABLE} names {named}, which is not an executable program.",
                hint=f"Point {VARIABLE} at the anvil program, or unset it.",
            )
        return Path(named).absolute()
    for folder in (Path.cwd(), Path(__file__).resolve().parents[3]):
        if _is_program(folder / _IN_PACKAGE):
            return folder / _IN_PACKAGE
    on_path = shutil.which("anvil")
    if on_path:
        return Path(on_path).absolute()
    raise NotFoundError(
        "anvil is not installed.",
        hint=f"Run `npm ci` in the project's folder (it brings {PACKAGE}), or install Foundry, "
        f"or set {VARIABLE} to the program. The embedded chain needs neither.",
    )


class Anvil(ProgramNode):
    """An anvil process on 127.0.0.1, which ends with this process.

    Args:
        port: Port on 127.0.0.1; 0 chooses a free one.
        block_time: Seconds between blocks; None mines each transaction immediately.
        hardfork: Rules of the EVM; the contracts are compiled for cancun.
        options: Additional command-line options of anvil.
    """

    name = "anvil"

    def __init__(
        self,
        *,
        port: int = 0,
        chain_id: int = DEFAULT_CHAIN_ID,
        block_time: int | None = 1,
        hardfork: str = "cancun",
        options: tuple[str, ...] = (),
    ) -> None:
        super().__init__(chain_id, port=port)
        self._block_time = block_time
        self._hardfork = hardfork
        self._options = options

    def command(self, port: int) -> list[str | Path]:
        """Return the command line of anvil."""
        pace = [] if self._block_time is None else ["--block-time", str(self._block_time)]
        return [
            *(find_anvil(), "--silent", "--host", HOST, "--port", str(port)),
            *("--chain-id", str(self.chain_id), "--hardfork", self._hardfork),
            *("--mnemonic", DEV_MNEMONIC, "--accounts", str(DEV_ACCOUNTS + 1)),
            *("--balance", str(DEV_BALANCE // 10**18), "--gas-limit", "60000000"),
            *pace,
            *self._options,
        ]


def _is_program(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)
