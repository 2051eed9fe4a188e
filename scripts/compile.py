#!/usr/bin/env python3
"""Compile the contracts and write ABI, bytecode and metadata to the package.

The compiler is solc 0.8.37, as installed by py-solc-x, else the npm build through
`scripts/solc-wrapper.js`. All sources form one standard-JSON input with names that do not depend on
the folder (`contracts/...`, `@openzeppelin/...`), so that builds are reproducible.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

import solcx

ROOT = Path(__file__).resolve().parent.parent
ARTIFACTS = ROOT / "deepsquare_chain" / "chain" / "bindings" / "artifacts"
SOLC_VERSION = "0.8.37"
# Contracts whose ABI and bytecode are part of the package, with their sources.
TARGETS = {
    "Credit": "contracts/Credit.sol",
    "ProviderRegistry": "contracts/ProviderRegistry.sol",
    "MetaScheduler": "contracts/MetaScheduler.sol",
    "ERC2771Forwarder": "@openzeppelin/contracts/metatx/ERC2771Forwarder.sol",
}
IMPORT = re.compile(r"""^\s*import\s[^;]*?["']([^"']+)["']\s*;""", re.MULTILINE)
SIZE_LIMIT = 24_576
# 2394: transient storage, which OpenZeppelin's reentrancy guard clears at the end of each call.
ACCEPTED_WARNINGS = {"2394"}


def settings(*, via_ir: bool = True) -> dict[str, Any]:
    """Return the compiler settings of the project; disable via-IR only for tools that need it."""
    return {
        "evmVersion": "cancun",
        # More runs make calls cheaper and code larger; without via-IR, 800 runs exceed the size limit.
        "optimizer": {"enabled": True, "runs": 800 if via_ir else 200},
        "viaIR": via_ir,
        "outputSelection": {
            "*": {
                "*": [
                    "abi",
                    "evm.bytecode.object",
                    "evm.deployedBytecode.object",
                    "evm.deployedBytecode.immutableReferences",
                    "metadata",
                ]
            }
        },
    }


def read_source(name: str) -> str:
    """Return the text of a source by its name in the compiler's input."""
    base = ROOT / "node_modules" if name.startswith("@") else ROOT
    try:
        return (base / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        sys.exit(f"{name} is missing below {base}. Run `npm ci` and try again.")


def gather(names: list[str]) -> dict[str, dict[str, str]]:
    """Return all sources reachable from `names` by imports, by name."""
    sources: dict[str, dict[str, str]] = {}
    queue = list(names)
    while queue:
        name = queue.pop()
        if name in sources:
            continue
        content = read_source(name)
        sources[name] = {"content": content}
        folder = posixpath.dirname(name)
        for target in IMPORT.findall(content):
            relative = target.startswith(".")
            queue.append(posixpath.normpath(posixpath.join(folder, target)) if relative else target)
    return dict(sorted(sources.items()))


def standard_input(*, via_ir: bool = True) -> dict[str, Any]:
    """Return the compiler's standard-JSON input."""
    sources = gather(list(TARGETS.values()))
    return {"language": "Solidity", "sources": sources, "settings": settings(via_ir=via_ir)}


def compiler() -> Path:
    """Return the solc installed by py-solc-x, else the wrapper around the npm build."""
    installed = {str(version) for version in solcx.get_installed_solc_versions()}
    if SOLC_VERSION in installed:
        return Path(solcx.install.get_executable(SOLC_VERSION))
    return ROOT / "scripts" / "solc-wrapper.js"


def run_compiler(compiler_input: dict[str, Any]) -> dict[str, Any]:
    """Return the compiler's standard-JSON output; exit the program if it fails."""
    try:
        output: dict[str, Any] = solcx.compile_standard(compiler_input, solc_binary=compiler())
    except (solcx.exceptions.SolcError, OSError) as error:
        reason = str(error).split("\n> command")[0]
        sys.exit(f"The compiler failed: {reason}\nIs Node.js installed, and did `npm ci` run?")
    for finding in output.get("errors", []):
        if finding["errorCode"] not in ACCEPTED_WARNINGS:
            print(finding["formattedMessage"], file=sys.stderr)
    return output


def compile_sources(names: list[str]) -> dict[str, dict[str, Any]]:
    """Return ABI and bytecode of all contracts in the sources, for tests; without via-IR, for speed."""
    compiler_input = {
        "language": "Solidity",
        "sources": gather(names),
        "settings": settings(via_ir=False),
    }
    output = run_compiler(compiler_input)
    return {
        contract: {"abi": built["abi"], "bytecode": "0x" + built["evm"]["bytecode"]["object"]}
        for name in names
        for contract, built in output["contracts"][name].items()
    }


def compile_contracts(*, via_ir: bool = True) -> dict[str, dict[str, Any]]:
    """Return artifacts by contract name: ABI, bytecodes, immutable references and metadata."""
    compiler_input = standard_input(via_ir=via_ir)
    output = run_compiler(compiler_input)
    digest = hashlib.sha256(json.dumps(compiler_input, sort_keys=True).encode()).hexdigest()
    artifacts: dict[str, dict[str, Any]] = {}
    for target, source in TARGETS.items():
        built = output["contracts"][source][target]
        deployed = built["evm"]["deployedBytecode"]
        artifacts[target] = {
            "contractName": target,
            "compiler": SOLC_VERSION,
            "inputDigest": digest,
            "abi": built["abi"],
            "bytecode": "0x" + built["evm"]["bytecode"]["object"],
            "deployedBytecode": "0x" + deployed["object"],
            "immutableReferences": deployed.get("immutableReferences", {}),
            "metadata": built["metadata"],
        }
    return artifacts


def render(artifact: dict[str, Any]) -> str:
    """Return the text of an artifact's file."""
    return json.dumps(artifact, indent=1, sort_keys=True) + "\n"


def files(artifacts: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return all files for the package by name: artifacts, and the compiler's input."""
    built = {f"{name}.json": render(artifact) for name, artifact in artifacts.items()}
    return built | {"standard-input.json": render(standard_input())}


def sizes(artifacts: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Return the size of the deployed code in bytes, by contract."""
    return {name: len(a["deployedBytecode"]) // 2 - 1 for name, a in artifacts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument(
        "--no-ir", action="store_true", help="compile without via-IR; writes nothing"
    )
    parser.add_argument("--output", type=Path, default=ARTIFACTS, help="folder to write to")
    options = parser.parse_args()
    artifacts = compile_contracts(via_ir=not options.no_ir)
    for name, size in sizes(artifacts).items():
        print(f"{name:18} {size:6} bytes of {SIZE_LIMIT}")
        if size > SIZE_LIMIT:
            sys.exit(f"{name} is larger than a chain accepts.")
    if options.no_ir:
        return
    stale = []
    options.output.mkdir(parents=True, exist_ok=True)
    for name, text in files(artifacts).items():
        path = options.output / name
        if options.check:
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                stale.append(name.removesuffix(".json"))
        else:
            path.write_text(text, encoding="utf-8")
    if stale:
        sys.exit(f"Out of date: {', '.join(stale)}. Run `make contracts`.")


if __name__ == "__main__":
    main()
