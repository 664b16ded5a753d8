"""Records: written as they always were, read as what they must be."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from dsbert.base.jsonl import to_json
from dsbert.base.records import OpenRecord, Record, valid_records
from dsbert.checkpoint.state import CheckpointState, Manifest
from dsbert.cluster.heartbeats import Beat
from dsbert.training.attempts import Attempt, CulpritRecord, Status

# As dsbert wrote them before these classes were there, and as the oldest that are still read were.
ATTEMPT = (
    '{"number": 2, "nonce": "0dd4ba7f2b2ac4ba", "job_id": "7", "restart_count": 1, "started": 1795783160.4061446, '
    '"world_size": 2, "checkpoint": "step_00000006", "previous": {"outcome": "failed", "step": 8, "cause": "died", '
    '"culprit": {"rank": 1, "host": "vm", "step": 8, "phase": "train"}}}'
)
SILENT = '{"number": 2, "nonce": "ab", "previous": {"outcome": null, "step": 7, "cause": "ended without a word"}}'
STATUS = (
    '{"attempt": 1, "job_id": null, "restart_count": 0, "outcome": "done", "step": 60, "cause": null, "culprit": null, '
    '"saved": "step_00000060"}'
)
BEAT = (
    '{"rank": 0, "host": "vm", "pid": 22303, "place": "616f7506pid:[4026531836]", "beat": 106, "step": 60, '
    '"progress": 211, "phase": "train", "saving": null, "ended": {"code": 0, "cause": null}, "interval_s": 5.0}'
)
MANIFEST = (
    '{"kind": "dsbert-checkpoint", "format": 1, "step": 60, "world_size": 1, '
    '"topology_digest": "889c1dc442beba501c495cd788c2593e", "attempt": "1-0dd4ba7f2b2ac4ba", '
    '"created": 1795783167.1862776, "files": {"state.json": {"bytes": 11249, '
    '"xxh3": "96436ab751d56cee805676df3ce96436"}}}'
)
STATE = (
    '{"format": 1, "step": 60, "adam_step": 60, "engine": {"global_steps": 60, "global_samples": 1920, '
    '"skipped_steps": 0, "loss_scaler": {"cur_scale": 65536.0, "cur_iter": 3}}, "world_size": 1, "zero_stage": 0, '
    '"precision": "fp32", "kernels": {"tokens": 1024, "dtype": "torch.float32", "device": "cpu", "layers": {"a": '
    '{"forward": {"backend": "cpu", "ms": null, "speedup": null}, "dgrad": {"backend": "cpu", "ms": 1.5, "speedup": '
    '2.0}, "wgrad": {"backend": "cpu", "ms": null, "speedup": null}}}, "instructions": "AVX2"}, "recipe": {"name": '
    '"demo", "sparsity": {"pattern": "dynamic", "sparsity": 0.9, "block_size": 16, "more": [1, {"b": null}]}, "z": 1}, '
    '"identity": {"model": {"num_layers": 2}, "seed": 1, "data_digest": "ab", "samples": 4}, "vocab_size": 2048, '
    '"layers": {"a": {"shape": [128, 128], "block_size": 16, "kept": 1536}}, "deepspeed": {"zero_optimization": '
    '{"stage": 0}}, "numerics": {"threads": 1}, "params": {"a.blocks": [6, 16, 16]}, "totals": {"tokens": 96332, '
    '"flops": 52848230400000000000, "flops_dense": 314069483520, "skipped": 0, "skipped_in_a_row": 0}}'
)


def without(text: str, *names: str) -> str:
    record = {key: value for key, value in json.loads(text).items() if key not in names}
    return json.dumps(record)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Attempt, ATTEMPT),
        (Attempt, SILENT),
        (Status, STATUS),
        (Status, without(STATUS, "saved", "job_id")),
        (Beat, BEAT),
        (Beat, without(BEAT, "saving", "interval_s")),
        (Manifest, MANIFEST),
        (Manifest, without(MANIFEST, "created", "attempt")),
        (CheckpointState, STATE),
        (CheckpointState, without(STATE, "kernels", "deepspeed", "numerics")),
        (CheckpointState, STATE.replace(', "skipped": 0, "skipped_in_a_row": 0', "")),
    ],
)
def test_what_was_written_before_is_read_and_written_alike(kind: type[Record], text: str) -> None:
    record = kind.from_json(json.loads(text))
    assert to_json(record.to_json()) == text
    assert kind.from_json(record.to_json()) == record


def test_fields_are_written_in_one_order_however_they_are_given() -> None:
    culprit = CulpritRecord(phase="train", step=None, host="vm", rank=3)
    assert to_json(culprit.to_json()) == '{"rank": 3, "host": "vm", "step": null, "phase": "train"}'


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("number", True, "expected a valid number, found True: Input should be a valid integer"),
        ("number", "2", "expected a valid number, found '2': Input should be a valid integer"),
        ("nonce", "../x", "expected a valid nonce, found '../x': String should match"),
        ("world_size", 2**21, "expected a valid world_size, found 2097152: Input should be less than"),
        ("checkpoint", "step_1", "expected a valid checkpoint, found 'step_1'"),
        ("previous", {"step": -1}, "expected a valid previous.step, found -1"),
    ],
)
def test_a_wrong_field_is_named_in_one_line(field: str, value: Any, message: str) -> None:
    wrong = json.loads(ATTEMPT) | {field: value}
    with pytest.raises(ValueError, match=message) as caught:
        Attempt.from_json(wrong)
    assert "\n" not in str(caught.value)
    assert valid_records([wrong, None, [], json.loads(SILENT)], Attempt) == [Attempt.from_json(json.loads(SILENT))]


def test_records_do_not_change() -> None:
    record = Attempt.from_json(json.loads(ATTEMPT))
    with pytest.raises(ValidationError, match="frozen"):
        record.number = 3  # type: ignore[misc]  # mypy knows it too
    assert record.model_copy(update={"checkpoint": None}).checkpoint is None


def test_an_open_record_keeps_what_it_does_not_name() -> None:
    class Named(OpenRecord):
        b: int

    given = {"z": [1, None], "b": 2, "a": {"x": 0.5}}
    record = Named.from_json(given)
    assert (record.b, record.whole, json.dumps(record.to_json())) == (2, given, json.dumps(given))
    with pytest.raises(ValueError, match="expected a valid b, found 'x'"):
        Named.from_json({"b": "x"})
