"""Create the virtual environment and install the pinned CPU set and the project, with no CUDA wheel.

    python3 packaging/install.py .venv
    python3 packaging/install.py .venv requirements-test.txt   # then, what only tests need

uv installs (about a minute; pip took four times as long). torch's CPU build for Linux is on PyTorch's own index; plain
PyPI has the CUDA build. The index is probed once. Without it a CPU build may still be found where pip is configured
with one (find-links); else the install stops before anything large is downloaded, and says why.
"""

import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH_INDEX = os.environ.get("TORCH_INDEX", "https://download.pytorch.org/whl/cpu")
UV = "uv==0.13.9"


def main() -> None:
    """Install into the folder named first: the CPU set and the project, or the requirements file named next."""
    if sys.version_info < (3, 11):  # noqa: UP036  (runs before anything is installed)
        sys.exit(f"install: expected Python 3.11 or newer, got {sys.version.split()[0]}. Set PYTHON=python3.x.")
    folder = Path(sys.argv[1]).absolute()
    python = folder / "bin" / "python"
    if not python.exists():
        # --clear: a folder without its python is a broken or half-made environment.
        run([sys.executable, "-m", "venv", "--clear", str(folder)])
    run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", UV])
    environment = uv_environment(python)
    # Installed with bytecode: without it every process pays seconds for its imports.
    install = [str(folder / "bin" / "uv"), "pip", "install", "--python", str(python), "--compile-bytecode"]
    if len(sys.argv) > 2:
        print(f"install: {sys.argv[2]}", flush=True)
        run([*install, "--quiet", "-r", sys.argv[2]], environment)
        return
    extra: list[str] = []
    if answers(TORCH_INDEX):
        extra = ["--extra-index-url", TORCH_INDEX, "--index-strategy", "unsafe-best-match"]
    else:
        print("install: PyTorch's CPU index does not answer; using the places pip is configured with")
        refuse_cuda(install, environment)
    print("install: the CPU set (a minute or a few, the first time)", flush=True)
    run([*install, "--quiet", *extra, "-r", "requirements-cpu.txt"], environment)
    run([*install, "--quiet", "--no-deps", "--no-build-isolation", "--editable", "."], environment)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20
    print(f"install: done, {size:.0f} MiB in {folder.name}")


def uv_environment(python: Path) -> dict[str, str]:
    """Return the environment for uv: where pip is configured to look, uv looks too."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    names = {"find-links": "UV_FIND_LINKS", "index-url": "UV_DEFAULT_INDEX"}
    listed = subprocess.run([str(python), "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        name = names.get(key.rsplit(".", 1)[-1])
        if name is not None:
            environment.setdefault(name, value.strip("'\"").replace(" ", ","))
    return environment


def refuse_cuda(install: list[str], environment: dict[str, str]) -> None:
    """Stop where a torch with CUDA packages would be installed."""
    torch = next(
        line for line in (ROOT / "requirements-cpu.txt").read_text().splitlines() if line.startswith("torch==")
    )
    plan = subprocess.run(
        [*install, "--dry-run", "--reinstall", torch], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    if plan.returncode:
        sys.exit(f"install: {torch} cannot be found: {plan.stderr.strip().splitlines()[-1]}")
    added = [line.split()[1] for line in plan.stderr.splitlines() if line.strip().startswith("+ ")]
    if cuda := [name for name in added if name.startswith(("nvidia", "cuda"))]:
        sys.exit(
            f"install: expected a CPU build of {torch}, but {len(cuda)} CUDA packages (gigabytes) would come with it. "
            f"Make {TORCH_INDEX} reachable, or set TORCH_INDEX to a mirror of it."
        )


def answers(index: str) -> bool:
    """Whether the package index answers within three seconds."""
    try:
        with urllib.request.urlopen(f"{index.rstrip('/')}/torch/", timeout=3):
            return True
    except (urllib.error.URLError, OSError, ValueError):
        return False


def run(command: list[str], environment: dict[str, str] | None = None) -> None:
    """Run a command in the project's folder; stop with its exit code if it fails."""
    code = subprocess.call(command, env=environment, cwd=ROOT)
    if code:
        sys.exit(f"install: `{' '.join(command[:4])} ...` failed with exit code {code}; its message is above.")


if __name__ == "__main__":
    main()
