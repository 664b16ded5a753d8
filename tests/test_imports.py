"""The fences of ARCHITECTURE.md: who may import whom, read off the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "dsbert"
MODULES = sorted(ROOT.rglob("*.py"))

# Floors, from the top; a package imports only from those below its own, or from itself.
FLOORS = (
    *(
        "__main__",
        "cli",
        "experiment",
        "reports",
        "jobs",
        "monitoring",
        "inspection",
        "training",
        "hf",
        "checkpoint",
        "engine",
        "models",
        "data",
        "config",
    ),
    *("sparse", "cluster", "base", "start"),
)


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
        ("deepspeed", {"dsbert.engine.ds_engine", "dsbert.engine.zero_shards"}),
        ("mpi4py", {"dsbert.cluster.endpoint"}),
        ("wandb", {"dsbert.training.wandb_process"}),
        ("torch.utils.tensorboard", {"dsbert.training.tensorboard_process"}),
        (
            "transformers",
            {
                "dsbert.models.activation_checkpointing",
                "dsbert.models.fast_layers",
                "dsbert.models.residual_norm",
                "dsbert.models.bert",
                "dsbert.models.modern_bert",
                "dsbert.data.preparing.tokenizer_check",
                "dsbert.hf",
                "dsbert.hf.configuration",
                "dsbert.hf.from_checkpoint",
                "dsbert.hf.modeling",
                "dsbert.hf.sentence_embedder",
                "dsbert.hf.finetuning.finetune",
                "dsbert.hf.finetuning.finetune_settings",
                "dsbert.hf.finetuning.starting_model",
                "dsbert.hf.finetuning.trainer_callbacks",
            },
        ),
        ("psutil", {"dsbert.cluster.heartbeats", "dsbert.inspection.doctor", "dsbert.inspection.doctor_storage"}),
        (
            "filelock",
            {
                "dsbert.data.staging",
                "dsbert.data.preparing.prepare",
                "dsbert.experiment.runner",
                "dsbert.experiment.timing",
                "dsbert.inspection.doctor_storage",
            },
        ),
        ("fcntl", {"dsbert.hf.export", "dsbert.training.record_stream"}),
        ("pickle", set()),
        ("typer", set()),
    ],
)
def test_a_package_has_few_importers(package: str, importers: set[str]) -> None:
    found = {named(path) for path in MODULES if any(f"{name}.".startswith(f"{package}.") for name in imports(path))}
    assert found <= importers
    if package in ("deepspeed", "mpi4py", "wandb", "torch.utils.tensorboard", "transformers"):
        assert found, f"nobody imports {package}: has the test gone blind?"


def test_no_import_runs_back_up() -> None:
    height = {name: floor for floor, name in enumerate(FLOORS)}
    assert {room(named(path)) for path in MODULES} - {"__init__"} == set(height), "a new package needs a floor"
    for path in MODULES:
        here = room(named(path))
        for name in imports(path):
            if name.startswith("dsbert.") and here != "__init__" and room(name) in height:
                assert height[room(name)] >= height[here], f"{named(path)} imports {name}, which stands above it"


def test_no_circle_of_imports() -> None:
    """Between modules, also by what functions import when they run. A package stands for its __init__.py alone."""
    modules = {named(path): path for path in MODULES}

    def target(name: str) -> str | None:
        return next((found for found in (name, name.rpartition(".")[0]) if found in modules), None)

    arrows = {name: {target(found) for found in imports(path)} - {None, name} for name, path in modules.items()}
    assert sum(map(len, arrows.values())) > 500, "imports are not seen: has the test gone blind?"
    list(TopologicalSorter(arrows).static_order())  # CycleError names the circle


def test_no_two_modules_have_one_name() -> None:
    """But for those of the command line, which are called after what they are about."""
    names = Counter(path.stem for path in MODULES if not path.stem.startswith("__"))
    assert [name for name, count in names.items() if count > 1] == []


def test_batches_need_nothing_of_what_prepares_data() -> None:
    for path in (ROOT / "data").glob("*.py"):
        assert not [name for name in imports(path) if name.startswith("dsbert.data.preparing")], path


# A step, with an update of the masks and a check of the replicas: what is imported late is imported by then.
SPARSE_TRAINING = """
import sys, torch
from dsbert.sparse import MaskManager, SparsityConfig, TorchBlockEditor, sparsify_

model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
config = SparsityConfig(sparsity=0.75, block_size=16, modules=("*",), num_updates=4, regrow="gradient")
layers = sparsify_(model, config)
optimizer = torch.optim.AdamW(model.parameters())
masks = MaskManager(layers, config, total_steps=4, editor=TorchBlockEditor(optimizer))
model(torch.randn(8, 32)).square().sum().backward()
optimizer.step()
assert masks.maybe_update(1).num_pruned
print(*sys.modules)
"""


def test_sparse_is_a_library_of_its_own() -> None:
    """What training a sparse model loads of dsbert, and of what only dsbert's own training needs."""
    loaded = set(subprocess.check_output([sys.executable, "-c", SPARSE_TRAINING], text=True).split())
    ours = {name for name in loaded if name.startswith("dsbert.") and not name.startswith("dsbert.sparse")}
    leaves = ("collectives", "errors", "exchange", "fields", "own_time", "splitmix64")
    assert ours == {"dsbert.base", *(f"dsbert.base.{leaf}" for leaf in leaves)}
    assert not loaded & {"deepspeed", "transformers", "wandb", "datasets", "click"}
    for path in (ROOT / "sparse").rglob("*.py"):  # and what is imported later
        found = {name for name in imports(path) if name.startswith("dsbert.") and room(name) != "sparse"}
        assert {name.rpartition(".")[0] for name in found} <= ours, path


def test_recipes_and_jobs_need_no_torch() -> None:
    """`dsbert submit` and the launcher of ranks answer at once."""
    program = "import sys, dsbert.config.recipe, dsbert.training.preflight, dsbert.jobs.submit; print(*sys.modules)"
    loaded = set(subprocess.check_output([sys.executable, "-c", program], text=True).split())
    assert not loaded & {"torch", "transformers", "deepspeed", "datasets"}


def test_nobody_imports_the_loop_but_the_command_line() -> None:
    found = {
        named(path) for path in MODULES if any(name.startswith("dsbert.training.pretrain.") for name in imports(path))
    }
    assert found == {"dsbert.cli.training"}


def test_nobody_imports_what_is_for_notebooks() -> None:
    assert not [named(path) for path in MODULES if any(name.startswith("dsbert.reports.api") for name in imports(path))]


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
