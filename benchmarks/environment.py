"""What stands beside every published figure: machine, versions, commit."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path


def environment(*packages: str) -> dict[str, object]:
    """One JSON-ready record; ``packages`` are the distributions whose versions matter to the figures."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:  # a bare machine without git
        commit = ""
    return {
        "bench": "environment",
        "commit": commit,
        "cpu": _cpu_model(),
        "load": round(os.getloadavg()[0], 2),  # of the minute before: what others did, not the figures that follow
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
    }


def _cpu_model() -> str:
    if sys.platform != "linux":
        return platform.processor()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} x {models[0]}" if models else platform.processor()


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used: all its threads, and its children that have ended and been waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
