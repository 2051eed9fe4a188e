#!/usr/bin/env python3
"""Count lines, modules, short modules and duplicate class names of the package."""

from __future__ import annotations

import argparse
import ast
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1] / "deepsquare_chain"
SHORT = 60
EXPLORER = ("audit", "indexer", "web")


def measure(root: Path = ROOT) -> dict[str, Any]:
    """Return the figures of a package; `explorer` is the sum of audit, indexer and web.

    Migrations count only in `lines`. `short_modules` have fewer than 60 lines. `__init__` modules
    count neither in `modules` nor in `short_modules`.
    """
    packages: dict[str, int] = defaultdict(int)
    modules: dict[str, int] = {}
    classes: dict[str, list[str]] = defaultdict(list)
    total = 0
    for path in sorted(root.rglob("*.py")):
        name = str(path.relative_to(root))
        text = path.read_text(encoding="utf-8")
        lines = text.count("\n")
        total += lines
        if "migrations" in path.parts:
            continue
        packages[name.split("/", maxsplit=1)[0]] += lines
        if path.name != "__init__.py":
            modules[name] = lines
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes[node.name].append(name)
    return {
        "lines": total,
        "packages": dict(packages),
        "explorer": sum(packages[package] for package in EXPLORER),
        "modules": len(modules),
        "short_modules": sorted(name for name, lines in modules.items() if lines < SHORT),
        "duplicate_classes": {name: files for name, files in classes.items() if len(files) > 1},
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    figures = measure()
    if parser.parse_args().json:
        print(json.dumps(figures, indent=2))
        return
    print(f"Python lines                 {figures['lines']:>7,}")
    print(f"  audit + indexer + web      {figures['explorer']:>7,}  (without migrations)")
    print(f"modules                      {figures['modules']:>7,}")
    print(f"  with fewer than {SHORT} lines   {len(figures['short_modules']):>7,}")
    print(f"class names used twice       {len(figures['duplicate_classes']):>7,}")
    for name, files in sorted(figures["duplicate_classes"].items()):
        print(f"  {name}: {', '.join(files)}")


if __name__ == "__main__":
    main()
