"""Training on every kind of kernels takes the same way, on two ranks; a checkpoint keeps the choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers import run_distributed

STEPS = 10
KERNELS = ("reference", "cpu", "dense", "auto")


def losses_by_kernels(directory: str) -> dict[str, Any]:
    """The losses and the last digest of a short run on each kind of kernels; and what a resumed run goes on with."""
    from dsbert.base.errors import UserError
    from dsbert.checkpoint.loading import load_checkpoint
    from dsbert.checkpoint.publisher import Retention
    from dsbert.checkpoint.state import Totals
    from dsbert.checkpoint.writer import CheckpointWriter
    from dsbert.cluster import process_group
    from dsbert.sparse.kernel_plan import KernelPlan
    from dsbert.sparse.kernels.record import KernelRecord
    from tests import workbench as bench

    world = process_group.init(60)
    (Path(directory) / "companions").mkdir(exist_ok=True)
    found: dict[str, Any] = {}
    for kernels in KERNELS:
        recipe = bench.recipe(
            model={"hidden_size": 64},
            sparsity={"kernels": kernels, "block_size": 16},
            deepspeed=bench.zero_config(1, "fp32"),
        )
        engine, masks = bench.engine_and_masks(recipe, world)
        losses = []
        for step in range(1, STEPS + 1):
            result = engine.train_step(bench.step_batches(engine, bench.stream(), step - 1))
            losses.append(result.mean_losses())
            masks.maybe_update(step)
        masks.verify_replicas()
        found[kernels] = {"losses": losses, "digest": masks.digest(), "plan": engine.kernels.record.to_json()}
    # What the last engine chose by measurement is changed in its checkpoint: a resumed run follows the checkpoint.
    record = engine.kernels.record.to_json()
    for products in record["layers"].values():
        products["dgrad"]["backend"] = "reference"
    engine.kernels = KernelPlan(KernelRecord.from_json(record))
    writer = CheckpointWriter(Path(directory), Path(directory) / "companions", attempt="1-test", retention=Retention(2))
    saved = writer.save(engine, masks, bench.run_record(engine.recipe), Totals()).path
    engine, masks = bench.engine_and_masks(recipe, world)
    load_checkpoint(saved, engine, masks)
    found["resumed"] = {
        "plan": engine.kernels.record.to_json(),
        "notes": engine.kernels.notes,
        "choices": sorted({layer.choice.dgrad for layer in engine.layers.values()}),
    }
    with pytest.raises(UserError) as error:
        bench.engine_and_masks(bench.recipe(sparsity={"kernels": "triton", "block_size": 16}), world)
    found["refused"] = [str(error.value), error.value.shared]
    return found


@pytest.mark.slow
def test_training_takes_the_same_way_on_every_kind_of_kernels(tmp_path: Path) -> None:
    first, second = run_distributed(losses_by_kernels, 2, {"directory": str(tmp_path)})
    assert first == second  # plans and digests included: rank 0 chooses for all
    expected = first["reference"]
    for kernels in KERNELS:
        for one, other in zip(first[kernels]["losses"], expected["losses"], strict=True):
            assert one == pytest.approx(other, abs=1e-5), kernels
        assert first[kernels]["digest"] == expected["digest"]
    assert expected["losses"][0] != expected["losses"][-1]
    measured = [row for layer in first["auto"]["plan"]["layers"].values() for row in layer.values()]
    assert all(row["ms"] > 0 and row["speedup"] >= 1 for row in measured)
    resumed = first["resumed"]
    assert resumed["choices"] == ["reference"]
    assert not resumed["notes"]
    assert first["refused"] == [
        "expected sparsity.kernels that can run here, found triton: needs a CUDA device, found cpu; choose auto",
        True,
    ]
