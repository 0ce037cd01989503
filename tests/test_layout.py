"""The shape of the program: which way imports point, and which file knows which library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "tuner").rglob("*.py"))
RUNNERS = sorted((ROOT / "runners").glob("*.py"))

LAYERS = [
    {"space", "intervals"},
    {"trial"},
    {"limits"},
    {"supervise", "keeper", "serving", "quality", "installed", "models", "expression"},
    {"journal", "machine", "summary", "runs"},
    {"convergence"},
    {
        "files",
        "replay",
        "checks",
        "control",
        "repeats",
        "measure",
        "telemetry",
        "meters",
        "chats",
        "proposers",
        "export",
    },
    {"worker", "doctor"},
    {"evaluate"},
    {"study", "display"},
    {"confirm", "assemble", "calibrate", "cost", "calls"},
    {"session", "record", "compare", "figures", "apply"},
    {"live", "outcome", "page"},
    {"cli"},
]
"""A file imports from its own row or the rows above it."""

HOMES = {
    "typer": {"cli.py"},
    "rich": {"display.py"},
    "pandas": {"export.py"},
    "jinja2": {"proposers/llm.py", "page.py"},
    "matplotlib": {"figures.py"},
    "optuna": {"proposers/optuna_samplers.py"},
    "scipy": {"proposers/sobol.py", "convergence.py"},
    "pynvml": {"meters/nvml.py", "machine.py"},
    "zeus": {"meters/zeus.py"},
    "openai": {"chats/openai_chat.py"},
    "anthropic": {"chats/anthropic_chat.py"},
    "pyRAPL": set(),
}


def imported(path):
    """(module, whether at the top of the file) of every import in a file."""
    tree = ast.parse(path.read_text())
    top = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node in top
            if node.module == "tuner":
                yield from ((f"tuner.{alias.name}", node in top) for alias in node.names)


def layer(module):
    name = module.split(".")[1]
    return next((rank for rank, names in enumerate(LAYERS) if name in names), None)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    if own in ("tuner.__init__", "tuner._bundled"):
        return
    rank = layer(own)
    assert rank is not None, f"{own} has no place in LAYERS"
    for module, _ in imported(path):
        if module.startswith("tuner.") and module != "tuner.__init__" and not module.startswith("tuner.__"):
            assert layer(module) is not None, f"{module} has no place in LAYERS"
            assert layer(module) <= rank, f"{own} imports {module}, which stands above it"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_third_party_library_is_imported_in_its_home_only(path):
    where = str(path.relative_to(ROOT / "tuner"))
    for module, _ in imported(path):
        home = HOMES.get(module.split(".")[0])
        assert home is None or where in home, f"{where} imports {module}"


@pytest.mark.parametrize("path", RUNNERS, ids=lambda p: p.name)
def test_a_runner_knows_of_tune_only_what_is_made_for_runners(path):
    known = {m for m, _ in imported(path) if m.split(".")[0] == "tuner"}
    models = {"models", "models.gguf", "models.hugging_face", "models.images"}
    shared = {"space", "trial", "serving", "keeper", "expression", "quality", "installed", *models}
    assert known <= {f"tuner.{name}" for name in shared}


def test_starting_the_command_line_imports_nothing_heavy():
    heavy = {
        "openai",
        "anthropic",
        "optuna",
        "scipy",
        "pandas",
        "numpy",
        "jinja2",
        "matplotlib",
        "pynvml",
        "xllamacpp",
        "gguf",
        "msgspec",
    }
    code = "import sys, tuner.cli; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not heavy & set(loaded)


def test_importing_every_module_adds_no_log_handler_and_prints_nothing():
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in SOURCES if p.name != "__init__.py"]
    code = (
        "import importlib, logging\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "assert not logging.getLogger().handlers, logging.getLogger().handlers"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("path", RUNNERS, ids=lambda p: p.name)
def test_a_runner_uses_no_private_name_of_another_one(path):
    tree = ast.parse(path.read_text())
    siblings = {
        target.id
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and "beside" in ast.dump(node)
        for target in [node.target]
    }
    private = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in siblings
        if node.attr.startswith("_")
    }
    assert private == set()
