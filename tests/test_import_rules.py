"""Who may import whom, and what nobody may use, walked over the syntax trees."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "baton": ROOT / "client" / "baton",
    "baton_protos": ROOT / "protos" / "baton_protos",
    "executor_service": ROOT / "executor_service",
    "kernels": ROOT / "kernels",
    "scheduler_service": ROOT / "scheduler_service",
}
MAY_IMPORT = {
    "baton": {"baton_protos"},
    "baton_protos": set(),
    "executor_service": {"baton_protos", "kernels"},
    "kernels": set(),
    "scheduler_service": {"baton_protos"},
}
CORE = PACKAGES["scheduler_service"] / "core"
# The core is deterministic: clocks, randomness, threads and sockets stay outside.
IMPURE = {
    "asyncio", "concurrent", "datetime", "multiprocessing", "random", "secrets", "select", "selectors", "signal",
    "socket", "subprocess", "threading", "time", "uuid",
}  # fmt: skip
# Scripts that make checkpoints are run by hand, with the dev extra installed.
CHECKPOINT_SCRIPTS = PACKAGES["baton"] / "checkpoints"
CLIENT_LIBRARIES = {"google", "grpc", "numpy", "rich", "typer"}
# What `baton keys` needs on top is imported by these alone, when it is called.
KEY_LIBRARIES = {"cryptography": "client/baton/certificates.py", "zmq": "client/baton/keys.py"}
CLIENT_EXTRAS = {"matplotlib"}  # imported where it is used, with a word of advice when it is missing
# Whoever can write into these formats, or strings, can run code.
UNSAFE_MODULES = {
    "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "multiprocessing", "pickle",
    "shelve", "yaml",
}  # fmt: skip
UNSAFE_CALLS = {"__import__", "compile", "eval", "exec"}
UNSAFE_METHODS = {"ProcessPoolExecutor", "recv_pyobj", "send_pyobj"}  # they pickle
UNSAFE_FUNCTIONS = {("torch", "load"), ("os", "system"), ("os", "popen"), ("subprocess", "getoutput")}
UNSAFE_FLAGS = {("allow_pickle", True), ("shell", True), ("trust_remote_code", True), ("weights_only", False)}


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(module: ast.AST) -> Iterator[tuple[str, int]]:
    """Every imported module's dotted name, with its line; also those inside functions."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            assert node.module is not None
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def top(name: str) -> str:
    return name.partition(".")[0]


def offences(folder: Path, allowed: "set[str] | None" = None, banned: frozenset[str] = frozenset()) -> list[str]:
    """Imports in a folder of a top-level module that is banned, or not among those allowed."""
    return [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources(folder)
        for name, line in imports(tree(path))
        if top(name) in banned or (allowed is not None and top(name) not in allowed)
    ]


def test_every_package_is_there() -> None:
    assert all(len(sources(folder)) for folder in PACKAGES.values())


@pytest.mark.parametrize("package", PACKAGES)
def test_our_packages_import_only_their_neighbours(package: str) -> None:
    foreign = frozenset(PACKAGES) - MAY_IMPORT[package] - {package}
    assert offences(PACKAGES[package], banned=foreign) == []


def test_the_scheduler_never_imports_torch() -> None:
    banned = frozenset({"torch", "transformers", "triton", "safetensors"})
    assert offences(PACKAGES["scheduler_service"], banned=banned) == []


def test_the_core_is_pure() -> None:
    allowed = (set(sys.stdlib_module_names) - IMPURE) | {"numpy", "scheduler_service"}
    assert offences(CORE, allowed=allowed) == []
    elsewhere = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources(CORE)
        for name, line in imports(tree(path))
        if top(name) == "scheduler_service" and not name.startswith("scheduler_service.core")
    ]
    assert elsewhere == []


def test_the_client_needs_only_its_dependencies() -> None:
    allowed = set(sys.stdlib_module_names) | CLIENT_LIBRARIES | CLIENT_EXTRAS | {"baton", "baton_protos"}
    found = [
        offence
        for offence in offences(PACKAGES["baton"], allowed=allowed)
        if KEY_LIBRARIES.get(top(offence.rpartition(": ")[2])) != offence.partition(":")[0]
    ]
    scripts = str(CHECKPOINT_SCRIPTS.relative_to(ROOT))
    assert [offence for offence in found if not offence.startswith(scripts)] == []


def test_generated_types_stop_at_the_wire() -> None:
    found = [
        offence
        for package in ("scheduler_service", "executor_service")
        for offence in offences(PACKAGES[package], banned=frozenset({"baton_protos"}))
        if "_pb2" in offence and "wire.py" not in offence
    ]
    grpc_entry_points = {"servicer.py", "server.py"}  # what gRPC calls, and where it is registered
    assert [offence for offence in found if Path(offence.partition(":")[0]).name not in grpc_entry_points] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_can_run_code_from_data(package: str) -> None:
    found = offences(PACKAGES[package], banned=frozenset(UNSAFE_MODULES))
    for path in sources(PACKAGES[package]):
        found += [f"{path.relative_to(ROOT)}:{line}: {what}" for what, line in unsafe_uses(tree(path))]
    assert found == []


def unsafe_uses(module: ast.AST) -> Iterator[tuple[str, int]]:
    """Calls that run code, and ways to unpickle."""
    for node in ast.walk(module):
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in UNSAFE_CALLS:
                yield called.id, node.lineno
            for keyword in node.keywords:
                # A value that is worked out may come out either way.
                literal = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if any(keyword.arg == name and literal in (unsafe, None) for name, unsafe in UNSAFE_FLAGS):
                    yield str(keyword.arg), node.lineno
        if isinstance(node, ast.Attribute):
            if node.attr in UNSAFE_METHODS:
                yield node.attr, node.lineno
            if isinstance(node.value, ast.Name) and (node.value.id, node.attr) in UNSAFE_FUNCTIONS:
                yield f"{node.value.id}.{node.attr}", node.lineno
        if isinstance(node, ast.ImportFrom):
            for one in node.names:
                if (node.module, one.name) in UNSAFE_FUNCTIONS or one.name in UNSAFE_METHODS:
                    yield f"{node.module}.{one.name}", node.lineno


@pytest.mark.parametrize(
    "defect",
    [
        "eval('1')",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "s.recv_pyobj()",
        "os.system('x')",
        "subprocess.run('x', shell=True)",
        "subprocess.run('x', shell=flag)",
        "load(x, weights_only=False)",
        "np.load(x, allow_pickle=True)",
    ],
)
def test_the_walk_sees_what_it_looks_for(defect: str) -> None:
    assert list(unsafe_uses(ast.parse(defect)))


@pytest.mark.parametrize("modules", ["baton, baton.cli", "scheduler_service.config, scheduler_service.process"])
def test_torch_is_not_loaded(modules: str) -> None:
    check = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False, timeout=60).returncode == 0
