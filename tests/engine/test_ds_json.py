"""The DeepSpeed JSON: every key at every level, beside DeepSpeed's own models; what holds, and what has changed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsbert.base.errors import UserError
from dsbert.config.recipe import load_recipe
from dsbert.engine.ds_config import load_ds_config, what_holds
from dsbert.engine.ds_schema import RECIPE_OWNS, REFUSED, DeepSpeedJson
from tests.commands import ENVIRONMENT, SMALL
from tests.inspection.test_auditing import edit_state


def complaint_about(text: str, folder: Path, run_dir: Path | None = None) -> str:
    (folder / "mine.json").write_text(text)
    recipe = load_recipe("demo", [f"deepspeed.config={folder / 'mine.json'}"])
    with pytest.raises(UserError) as caught:
        load_ds_config(recipe, 1, 1, run_dir)
    assert "\n" not in str(caught.value)
    assert "mine.json" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"gradient_cliping": 1}, "unknown DeepSpeed key 'gradient_cliping': the nearest known key is 'gradient_cl"),
        ({"zero_optimisation": {}}, "the nearest known key is 'zero_optimization'"),
        ({"zero_optimization": {"stge": 1}}, "the nearest known key is 'zero_optimization.stage'"),
        ({"fp16": {"enable": True}}, "the nearest known key is 'fp16.enabled'"),
        ({"timers": {"throughput": {"enable": True}}}, "the nearest known key is 'timers.throughput.enabled'"),
        ({"prefetch_bucket_size": 1}, "the nearest known key is 'zero_optimization.stage3_prefetch_bucket_size'"),
        ({"gradient_clipping": "auto"}, "'gradient_clipping': expected a number, found 'auto'"),
        ({"gradient_clipping": "1"}, "expected a number, found '1'"),
        ({"gradient_clipping": True}, "expected a number, found true"),
        ({"gradient_clipping": -1}, "expected at least 0, found -1"),
        ({"gradient_clipping": None}, "expected a number, found null"),
        ({"bf16": {"enabled": "auto"}}, "'bf16.enabled': expected true or false, found 'auto'"),
        ({"bf16": {"enabled": 1}}, "'bf16.enabled': expected true or false, found 1"),
        ({"bf16": True}, "'bf16': expected a section of keys, found true"),
        ({"bfloat16": {"enabled": True}}, "expected no 'bfloat16', found {'enabled': True}: write bf16"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "expected one of bf16 and fp16 enabled, found both"),
        ({"fp16": {"loss_scale": -2}}, "'fp16.loss_scale': expected at least 0, found -2"),
        ({"fp16": {"loss_scale_window": 0}}, "expected more than 0, found 0"),
        ({"zero_optimization": True}, "'zero_optimization': expected a section of keys, found true"),
        ({"zero_optimization": {"stage": 4}}, "'zero_optimization.stage': expected 0, 1, 2 or 3, found 4"),
        ({"zero_optimization": {"stage": "auto"}}, "expected a whole number, found 'auto'"),
        ({"zero_optimization": {"cpu_offload": True}}, "expected no 'zero_optimization.cpu_offload', found true"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "expected no 'zero_optimization.offload_param'"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, "no longer be those of the global batch"),
        ({"communication_data_type": "int8"}, "expected 'fp32', 'bf16' or 'fp16', found 'int8'"),
        ({"train_batch_size": 32}, "the recipe owns it as batch.global_batch"),
        ({"wandb": {"enabled": True}}, "the recipe owns it as log.wandb"),
        ({"elasticity": {"enabled": True}}, "expected no 'elasticity'"),
        ({"sparse_gradients": True}, "expected no 'sparse_gradients'"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "expected no 'activation_checkpointing'"),
        ({"managed_gradient_accumulation": False}, "'managed_gradient_accumulation'"),
        ({"tensorboard": {"enabled": True, "job_name": ""}}, "'tensorboard.job_name': expected text"),
    ],
)  # fmt: skip
def test_every_key_is_looked_at(config: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert expected in complaint_about(json.dumps(config), tmp_path)


def test_all_complaints_at_once(tmp_path: Path) -> None:
    config = {"gradient_cliping": 1, "optimizer": {"type": "Lamb"}, "amp": {"enabled": True}, "fp16": {"hysteresis": 0}}
    found = complaint_about(json.dumps(config), tmp_path)
    assert all(word in found for word in ("'gradient_cliping'", "'optimizer'", "'amp'", "'fp16.hysteresis'"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"bf16": {}, "bf16": {}}', "found the key 'bf16' twice: keep one"),
        ('{"gradient_clipping": NaN}', "the number NaN, which is not finite"),
        ('{"gradient_clipping": Infinity}', "the number Infinity, which is not finite"),
        ('{"gradient_clipping": 1e999}', "the number 1e999, which is not finite"),
        ('{"gradient_clipping": ' + "9" * 5000 + "}", "a number of 5000 digits"),
        ('{\n// clip\n"gradient_clipping": 1}', "line 2: Expecting property name enclosed in double quotes (JSON"),
        ("[" * 60_000, "too many levels"),
        ("[]", "expected a JSON object"),
        ("", "line 1: Expecting value"),
    ],
)  # fmt: skip
def test_json_is_strict(text: str, expected: str, tmp_path: Path) -> None:
    assert expected in complaint_about(text, tmp_path)


def test_what_is_off_or_left_to_the_recipe_is_left_out(tmp_path: Path) -> None:
    """As templates of other trainers have it."""
    template = {
        "train_batch_size": "auto",
        "optimizer": "auto",
        "amp": {"enabled": False},
        "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "none", "pin_memory": True},
            "reduce_bucket_size": "auto",
            "allgather_bucket_size": 2e8,
        },
        "bf16": {"enabled": True},
        "wall_clock_breakdown": False,
    }
    (tmp_path / "mine.json").write_text(json.dumps(template), encoding="utf-8-sig")
    recipe = load_recipe("demo", [f"deepspeed.config={tmp_path / 'mine.json'}"])
    config = load_ds_config(recipe, 2, 1)
    assert config == {
        "gradient_clipping": 1.0,
        "steps_per_print": None,
        "zero_optimization": {"stage": 2, "allgather_bucket_size": 200_000_000},
        "bf16": {"enabled": True},
        "wall_clock_breakdown": False,
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 32,
    }
    assert "ZeRO stage 2, bf16, gradients clipped at norm 1 (DeepSpeed's default" in what_holds(recipe, config)


def test_what_deepspeed_writes_stays_in_the_run_directory(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for config in (
        {"flops_profiler": {"enabled": True, "output_file": "../metrics.jsonl"}},
        {"flops_profiler": {"enabled": True, "output_file": str(tmp_path / "flops.txt")}},
        {"csv_monitor": {"enabled": True, "output_path": "../../csv"}},
        {"csv_monitor": {"enabled": True, "job_name": "../../../csv"}},
    ):
        assert "inside the folder 'deepspeed' of the run directory" in complaint_about(
            json.dumps(config), tmp_path, run_dir
        )
    (run_dir / "deepspeed").mkdir(parents=True)
    (run_dir / "deepspeed" / "out").symlink_to(tmp_path)
    linked = {"csv_monitor": {"enabled": True, "output_path": "out"}}
    assert "inside the folder" in complaint_about(json.dumps(linked), tmp_path, run_dir)
    (tmp_path / "mine.json").write_text(json.dumps({"flops_profiler": {"enabled": True, "output_file": "flops.txt"}}))
    recipe = load_recipe("demo", [f"deepspeed.config={tmp_path / 'mine.json'}"])
    config = load_ds_config(recipe, 1, 1, run_dir)
    assert config["flops_profiler"]["output_file"] == str(run_dir / "deepspeed" / "flops.txt")


def test_our_keys_are_deepspeeds() -> None:
    """Every key that DeepSpeed knows is honoured or refused by name, and what is honoured has DeepSpeed's default."""
    import deepspeed.runtime.config as theirs
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    ours = DeepSpeedJson()
    pairs = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "csv_monitor": type(DeepSpeedMonitorConfig().csv_monitor),
        "tensorboard": type(DeepSpeedMonitorConfig().tensorboard),
        "timers.throughput": theirs.get_timers_config({}).__class__,
    }
    for name, model in pairs.items():
        section: Any = ours
        for part in name.split("."):
            section = getattr(section, part)
        known = type(section).model_fields
        for field, info in model.model_fields.items():
            key = info.alias or field
            assert (key in known) != (f"{name}.{key}" in REFUSED), f"{name}.{key}"
            if key in known and key != "overlap_comm":
                assert getattr(section, key) == info.default, f"{name}.{key}"
        assert known.keys() <= {info.alias or field for field, info in model.model_fields.items()}
    source = Path(theirs.__file__).read_text() + Path(theirs.__file__).with_name("constants.py").read_text()
    for key in (*DeepSpeedJson.model_fields, *RECIPE_OWNS):
        if key not in pairs and key not in ("timers", "comms_logger", "flops_profiler"):
            assert re.search(rf"""["']{key}["']""", source), key
    for key in theirs._REMOVED_TOP_LEVEL_CONFIG_KEYS:
        assert key in REFUSED
    for key in theirs._REMOVED_ZERO_CONFIG_KEYS:
        assert f"zero_optimization.{key}" in REFUSED


@pytest.mark.slow
def test_what_has_changed_is_said_when_a_run_goes_on(run: Path, data: Path, tmp_path: Path) -> None:
    """Another clipping, an untold one before, another number of threads, a checkpoint of before arithmetic had numbers,
    and a file of DeepSpeed's own."""
    first = yaml.safe_load((run / "config.yaml").read_text())
    assert first["deepspeed"] == {
        "gradient_clipping": 1.0, "steps_per_print": None, "zero_optimization": {"stage": 1},
    }  # fmt: skip
    assert first["numerics"]["threads"] == 1
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000012")
    edit_state(tmp_path / "run" / "checkpoints" / "step_00000006", lambda state: state["numerics"].pop("arithmetic"))
    changed = {
        "zero_optimization": {"stage": 1},
        "gradient_clipping": 0.5,
        "csv_monitor": {"enabled": True, "job_name": "mine"},
    }
    (tmp_path / "mine.json").write_text(json.dumps(changed))
    words = ["pretrain", "demo", "--nproc", "2", "--run-dir", str(tmp_path / "run"), f"data.path={data}", *SMALL]
    done = subprocess.run(
        [sys.executable, "-m", "dsbert", *words, f"deepspeed.config={tmp_path / 'mine.json'}"],
        env=ENVIRONMENT | {"OMP_NUM_THREADS": "2"}, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("dsbert: ")]
    for line in (
        "dsbert: DeepSpeed's gradient_clipping has changed since step_00000006: 1.0 -> 0.5",
        "dsbert: not bit for bit as before step_00000006, but as good: threads 1 -> 2, arithmetic none -> 2",
        f"dsbert: {tmp_path / 'mine.json'}: ZeRO stage 1, fp32, gradients clipped at norm 0.5, nothing offloaded",
    ):
        assert said.count(line) == 1, done.stderr
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["deepspeed"]["gradient_clipping"] == 0.5
    assert os.listdir(tmp_path / "run" / "deepspeed") == ["csv_monitor"]
    assert list((tmp_path / "run" / "deepspeed" / "csv_monitor" / "mine").glob("*.csv"))
