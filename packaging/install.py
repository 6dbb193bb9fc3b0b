"""Create the virtual environment and install the pinned CPU set and the project, with no CUDA wheel.

    python3 packaging/install.py .venv

torch's CPU build for Linux is on PyTorch's own index; plain PyPI has the CUDA build. The index is probed once: an
unreachable extra index costs pip seconds a package. Without it pip still finds a CPU build where one is configured;
else the install stops before anything large is downloaded, and says why.
"""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH_INDEX = os.environ.get("TORCH_INDEX", "https://download.pytorch.org/whl/cpu")


def main() -> None:
    """Install into the folder named by the one argument."""
    if sys.version_info < (3, 11):  # noqa: UP036  (runs before anything is installed)
        sys.exit(f"install: expected Python 3.11 or newer, got {sys.version.split()[0]}. Set PYTHON=python3.x.")
    folder = Path(sys.argv[1])
    python = folder / "bin" / "python"
    if not python.exists():
        # --clear: a folder without its python is a broken or half-made environment.
        run([sys.executable, "-m", "venv", "--clear", str(folder)])
    # Installed with bytecode: without it every process pays seconds for its imports.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    extra = ["--extra-index-url", TORCH_INDEX] if answers(TORCH_INDEX) else []
    requirements = ["-r", str(ROOT / "requirements-cpu.txt")]
    if not extra:
        print("install: PyTorch's CPU index does not answer; using the indexes pip is configured with")
        refuse_cuda(pip, environment)
    print("install: the CPU set (a few minutes the first time)", flush=True)
    run([*pip, *extra, *requirements], environment)
    run([*pip, "--no-deps", "--no-build-isolation", "--editable", str(ROOT)], environment)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20
    print(f"install: done, {size:.0f} MiB in {folder}")


def refuse_cuda(pip: list[str], environment: dict[str, str]) -> None:
    """Stop where pip would take a torch with CUDA dependencies."""
    torch = next(
        line for line in (ROOT / "requirements-cpu.txt").read_text().splitlines() if line.startswith("torch==")
    )
    dry_run = [*pip, "--dry-run", "--ignore-installed", "--report", "-", torch]
    report = subprocess.run(dry_run, capture_output=True, text=True, env=environment)
    if report.returncode:
        sys.exit(f"install: pip cannot find {torch}: {report.stderr.strip().splitlines()[-1]}")
    names = [package["metadata"]["name"] for package in json.loads(report.stdout)["install"]]
    if cuda := [name for name in names if name.startswith(("nvidia", "cuda"))]:
        sys.exit(
            f"install: expected a CPU build of {torch}, but pip would install {len(cuda)} CUDA packages (gigabytes) "
            f"with it. Make {TORCH_INDEX} reachable, or set TORCH_INDEX to a mirror of it."
        )


def answers(index: str) -> bool:
    """Whether the package index answers within three seconds."""
    try:
        with urllib.request.urlopen(f"{index.rstrip('/')}/torch/", timeout=3):
            return True
    except (urllib.error.URLError, OSError, ValueError):
        return False


def run(command: list[str], environment: dict[str, str] | None = None) -> None:
    """Run a command; stop with its exit code if it fails."""
    code = subprocess.call(command, env=environment)
    if code:
        sys.exit(f"install: `{' '.join(command[:4])} ...` failed with exit code {code}; its message is above.")


if __name__ == "__main__":
    main()
