"""All checks in one command: format, lint, types, tests with coverage."""

import subprocess
import sys
import time

PYTHON = sys.executable

CHECKS = [
    ("format", [PYTHON, "-m", "ruff", "format", "--check", "."]),
    ("lint", [PYTHON, "-m", "ruff", "check", "."]),
    ("types", [PYTHON, "-m", "mypy"]),
    (
        "tests",
        [
            *(PYTHON, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal"),
            *("--cov", "--cov-report=term", "--cov-fail-under=90", *sys.argv[1:]),
        ],
    ),
]


def main() -> int:
    for name, command in CHECKS:
        started = time.monotonic()
        code = subprocess.run(command).returncode
        print(f"--- {name}: {'ok' if code == 0 else 'FAILED'} in {time.monotonic() - started:.0f} s", flush=True)
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
