"""The fences of ARCHITECTURE.md: who may import whom, read off the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "dsbert"
MODULES = sorted(ROOT.rglob("*.py"))

# Floors, from the top; a module imports only from floors below its own or from its own.
FLOORS = [
    {"__main__", "cli", "cli_checkpoints", "cli_data", "cli_types"},
    {"pretrain", "submit"},
    {"run", "job_queue"},
    {"preflight"},
    {
        "reporting",
        "run_directory",
        "history",
        "export",
        "evaluate",
        "inspection",
        "restore",
        "comparison",
        "numerics",
        "opening",
    },
    {"auditing", "job_script", "ownership"},
    {"model", "engine", "checkpoint", "checkpoint_writer", "publication"},
    {"bert_layers"},
    {"layout_proof", "micro_batches"},
    {
        "data",
        "ds_engine",
        "step_guard",
        "fragments",
        "zero_shards",
        "metrics",
        "ds_config",
        "ds_schema",
        "stopping",
        "health",
        "heartbeats",
    },
    {"wandb_process"},
    {"wandb_file"},
    {"sparse"},
    {
        "config",
        "distributed",
        "rendezvous",
        "handshake",
        "meeting_place",
        "sealed_store",
        "jsonl",
        "records",
        "provenance",
    },
    {"overrides", "recipe_files"},
    {
        "awake",
        "complaints",
        "documents",
        "durable",
        "errors",
        "fields",
        "launch",
        "malloc",
        "memory_kills",
        "output",
        "progress",
        "ranks",
        "secret",
        "start",
        "wandb_mode",
    },
]


def imports(path: Path) -> set[str]:
    """Dotted names of everything that the file imports at run time, at any depth of the code."""
    found = set()
    typing_only: set[ast.AST] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            typing_only |= {child for statement in node.body for child in ast.walk(statement)}
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(name: str) -> str:
    """The module or package right below dsbert."""
    return name.split(".")[1] if "." in name else "__init__"


def named(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize(
    ("package", "importers"),
    [
        ("deepspeed", {"dsbert.ds_engine", "dsbert.zero_shards", "dsbert.checkpoint"}),
        ("mpi4py", {"dsbert.meeting_place"}),
        ("wandb", {"dsbert.wandb_process"}),
        ("transformers", {"dsbert.bert_layers", "dsbert.model", "dsbert.export", "dsbert.data.tokenizer_check"}),
        ("pickle", set()),
        ("typer", set()),
    ],
)
def test_a_package_has_few_importers(package: str, importers: set[str]) -> None:
    found = {named(path) for path in MODULES if any(name.split(".")[0] == package for name in imports(path))}
    assert found <= importers
    if package in ("deepspeed", "mpi4py", "wandb", "transformers"):
        assert found, f"nobody imports {package}: has the test gone blind?"


def test_no_import_runs_back_up() -> None:
    height = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    rooms = {room(named(path)) for path in MODULES} - {"__init__"}
    assert rooms == set(height), "a new room needs a floor"
    for path in MODULES:
        here = room(named(path))
        for name in imports(path):
            if name.startswith("dsbert.") and here != "__init__":
                there = room(name)
                if there in height:
                    assert height[there] >= height[here], f"{named(path)} imports {name}, which stands above it"


def test_sparse_is_a_library_of_its_own() -> None:
    for path in (ROOT / "sparse").rglob("*.py"):
        for name in imports(path):
            assert name.split(".")[0] not in ("deepspeed", "transformers", "wandb", "datasets"), (path, name)
            if name.startswith("dsbert."):
                assert room(name) in ("sparse", "config", "distributed", "errors"), (path, name)


def test_nobody_imports_pretrain_but_the_command_line() -> None:
    found = {named(path) for path in MODULES if any(name.startswith("dsbert.pretrain") for name in imports(path))}
    assert found == {"dsbert.cli"}


def test_no_pickle_is_read_or_written() -> None:
    """torch.load, torch.save, numpy's and pandas' pickles, and torch's object collectives all unpickle."""
    forbidden = ("torch.load", "torch.save", "allow_pickle=True", "read_pickle", "_object_list", "all_gather_object")
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert not [word for word in forbidden if word in text], path


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_modules_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{node.name} has two jobs"
