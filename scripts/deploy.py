#!/usr/bin/env python3
"""Deploy the contracts from a keystore, or check a deployment, at any JSON-RPC endpoint.

Writes the deployment record that all commands read, and prints one JSON document. An interrupted
deployment continues when it is started again with the same options.

    python scripts/deploy.py --endpoint http://127.0.0.1:8545 --keystore admin.json
    python scripts/deploy.py --endpoint http://127.0.0.1:8545 --verify-only

Exit codes are those of `deepsquare`: 0 ok, 2 usage, 4 not found, 5 insufficient funds for gas,
6 reverted by a contract, 7 endpoint, 8 wrong password, 10 the chain does not match the record.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from deepsquare_chain.chain.bindings.deployment import Deployment, Timeouts
from deepsquare_chain.chain.deploying import DEMO_PARAMS, GridParams, verify_deployment
from deepsquare_chain.chain.rpc.pool import connected
from deepsquare_chain.client.deploy import deploy
from deepsquare_chain.errors import AuditError, GridError
from deepsquare_chain.observability.logs import configure_logging
from deepsquare_chain.settings import Settings


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    arguments = argparse.ArgumentParser(description="Deploy the contracts, or check a deployment.")
    arguments.add_argument("--endpoint", required=True, help="JSON-RPC endpoint (http or https)")
    arguments.add_argument("--chain-id", type=int, help="refuse any other chain")
    arguments.add_argument(
        "--record", type=Path, default=Path(".deepsquare/deployment.json"), help="deployment record"
    )
    arguments.add_argument(
        "--verify-only", action="store_true", help="send nothing, check the record"
    )
    wallet = arguments.add_argument_group("wallet")
    wallet.add_argument("--keystore", type=Path, help="encrypted wallet of the administrator")
    wallet.add_argument(
        "--password-file", type=Path, help="else DEEPSQUARE_PASSWORD_FILE, else a prompt"
    )
    wallet.add_argument("--max-fee-gwei", type=float, default=500.0, help="ceiling of gas fees")
    wallet.add_argument("--timeout", type=float, default=300.0, help="seconds a transaction")
    grid = arguments.add_argument_group("grid")
    grid.add_argument("--demo", action="store_true", help="timeouts of seconds, no admin delay")
    grid.add_argument("--treasury", help="gets the fees (default: the wallet)")
    for role in ("scheduler", "approver", "minter"):
        grid.add_argument(
            f"--{role}",
            action="append",
            metavar="ADDRESS",
            help=f"gets the {role}'s role; may be repeated (default: the wallet)",
        )
    for name in ("fee_bps", "admin_delay", "approval_period"):
        default = getattr(GridParams(), name)
        grid.add_argument(_flag(name), type=int, help=f"default {default}")
    for timeout in fields(Timeouts):
        grid.add_argument(_flag(timeout.name), type=int, help=f"default {timeout.default}")
    return arguments


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def params_of(options: argparse.Namespace) -> GridParams:
    """Convert the options to parameters of the grid; `--demo` changes the defaults."""
    base = DEMO_PARAMS if options.demo else GridParams()

    def given(names: tuple[str, ...]) -> dict[str, Any]:
        values = {name: getattr(options, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    timeouts = replace(base.timeouts, **given(tuple(timeout.name for timeout in fields(Timeouts))))
    return replace(
        base,
        timeouts=timeouts,
        schedulers=tuple(options.scheduler or ()),
        approvers=tuple(options.approver or ()),
        minters=tuple(options.minter or ()),
        **given(("fee_bps", "admin_delay", "approval_period", "treasury")),
    )


def settings_of(options: argparse.Namespace) -> Settings:
    """Convert the options to settings; other sources of settings are not read."""
    return Settings(
        endpoint=options.endpoint,
        chain_id=options.chain_id,
        deployment=options.record,
        keystore=options.keystore,
        password_file=options.password_file,
        max_fee_gwei=options.max_fee_gwei,
        timeout=options.timeout,
    )


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """Deploy, unless `--verify-only` is set, verify the result, and return the document to print."""
    if not options.verify_only:
        await deploy(settings_of(options), params_of(options))
    deployment = Deployment.load(options.record)
    chain_id = options.chain_id or deployment.chain_id
    async with connected(options.endpoint, chain_id=chain_id) as w3:
        findings = await verify_deployment(w3, deployment)
    return {
        "ok": all(finding.ok for finding in findings),
        "record": str(options.record),
        "deployment": asdict(deployment),
        "findings": [asdict(finding) for finding in findings],
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the script, and return its exit code."""
    options = parser().parse_args(arguments)
    configure_logging("warning")
    try:
        document = asyncio.run(run(options))
    except GridError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(error.hint, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; start again with the same options to go on", file=sys.stderr)
        return 130
    print(json.dumps(document, indent=2))
    for finding in document["findings"]:
        if not finding["ok"]:
            print(f"error: {finding['subject']}: {finding['detail']}", file=sys.stderr)
    return 0 if document["ok"] else AuditError.exit_code


if __name__ == "__main__":
    sys.exit(main())
