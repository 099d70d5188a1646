"""``python -m tests.type_check``: pyright over what fastbf exports and over the code of pages; fails on any error.

Each symbol that an importer can reach needs a type that pyright knows without guessing.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def pyright(*arguments: str, cwd: Path = ROOT) -> dict[str, Any]:
    """What pyright reports, with this interpreter's packages and this checkout's fastbf."""
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pyright", "--outputjson", *arguments]
    result = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8", check=False
    )
    try:
        return json.loads(result.stdout)
    except json.JSONDecodeError:
        sys.exit(result.stdout + result.stderr)


def exported() -> Iterator[str]:
    """The symbols of fastbf whose types are missing, unknown or ambiguous, each with the reason."""
    report = pyright("--verifytypes", "fastbf", "--ignoreexternal")
    for d in report["generalDiagnostics"]:
        yield d["message"]
    for symbol in report["typeCompleteness"]["symbols"]:
        for d in symbol["diagnostics"]:
            if d["severity"] == "error":
                yield f"{symbol['name']}: {' '.join(d['message'].split())}"


def code_of(name: str) -> Iterator[str]:
    """The errors in a page's code, with its line numbers."""
    page = (ROOT / name).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        for block in re.finditer(r"^```python\n(.+?)^```", page, flags=re.DOTALL | re.MULTILINE):
            line = page.count("\n", 0, block.start(1))
            code = "\n" * line + block[1]
            (Path(folder) / f"block_{line + 1}.py").write_text(code, encoding="utf-8")
        settings = {"typeCheckingMode": "basic", "pythonVersion": "3.10", "extraPaths": [str(ROOT)]}
        (Path(folder) / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
        report = pyright("--project", folder, cwd=Path(folder))
    for d in report["generalDiagnostics"]:
        yield f"{name}:{d['range']['start']['line'] + 1}: {' '.join(d['message'].split())}"


def results() -> Iterator[str]:
    """The calls of ``tests/result_types.py`` whose results have another type than it says."""
    for d in pyright("tests/result_types.py")["generalDiagnostics"]:
        yield f"tests/result_types.py:{d['range']['start']['line'] + 1}: {' '.join(d['message'].split())}"


def main() -> None:
    found = [*exported(), *results(), *code_of("README.md"), *code_of("docs/usage.md")]
    print(*found, f"pyright: {len(found)} errors in what fastbf exports and in the code of pages", sep="\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
