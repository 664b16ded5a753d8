"""How ZeRO cuts a model: what a rank holds of masters and moments, and what of the weights stays on every rank.

As DeepSpeed 0.19 does it (engine/zero_shards.py), without building anything. N: elements of all parameters; W ranks.
Source: Rajbhandari et al. 2020, arXiv:1910.02054.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dsbert.engine.ds_config import precision, zero_stage
from dsbert.engine.ds_schema import DeepSpeedJson
from dsbert.jobs.capacity.cards import Precision
from dsbert.jobs.capacity.model_size import ModelSize

_PRECISIONS: dict[str, Precision] = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16"}
ELEMENT_BYTES: dict[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
_ALIGNMENT = 2  # elements of a rank's partition of stages 1 and 2: DeepSpeed's nccl_start_alignment_factor


@dataclass(frozen=True)
class ZeroLayout:
    """config: what `load_ds_config` returned."""

    size: ModelSize
    config: dict[str, Any]
    ranks: int

    @property
    def stage(self) -> int:
        """0 to 3."""
        return zero_stage(self.config)

    @property
    def precision(self) -> Precision:
        """That forward and backward compute in."""
        return _PRECISIONS[precision(self.config)]

    @property
    def element_bytes(self) -> int:
        """Of a weight as forward reads it."""
        return ELEMENT_BYTES[self.precision]

    @property
    def gradient_bytes(self) -> int:
        """Of an element of a gradient that is sent."""
        return ELEMENT_BYTES[self.config.get("communication_data_type") or self.precision]

    @property
    def settings(self) -> DeepSpeedJson:
        """With DeepSpeed's defaults."""
        known = {key: value for key, value in self.config.items() if key in DeepSpeedJson.model_fields}
        return DeepSpeedJson.model_validate(known)

    @property
    def numel(self) -> int:
        """N."""
        return self.size.numel

    @property
    def bucket_numel(self) -> int:
        """Elements of ZeRO's buffer for gradients: as large as all of them, at most (engine/ds_engine.py)."""
        return min(self.settings.zero_optimization.reduce_bucket_size, self.numel)

    @property
    def flat_numel(self) -> int:
        """Elements of the flat weights of stages 1 and 2: two groups, each a whole number of partitions."""
        unit = _ALIGNMENT * self.ranks
        return sum(-(-sum(group) // unit) * unit for group in self.size.groups())

    @property
    def partition_numel(self) -> int:
        """Elements of masters, and of either moment, on a rank."""
        if self.stage == 0:
            return self.numel
        if self.stage < 3:
            return self.flat_numel // self.ranks
        return sum(-(-math.prod(shape) // self.ranks) for shape in self.size.parameters.values())

    @property
    def persistent_numel(self) -> int:
        """Stage 3: elements of the parameters that stay gathered on every rank, being small."""
        zero = self.settings.zero_optimization
        kept = 0
        for numel in map(math.prod, self.size.parameters.values()):
            small = numel <= zero.stage3_param_persistence_threshold
            if self.stage == 3 and small and kept + numel <= zero.stage3_model_persistence_threshold:
                kept += numel
        return kept

    @property
    def stays_gathered(self) -> bool:
        """Stage 3: whether forward's large weights are still there for backward: where DeepSpeed counts their next use
        as near, and has room for them."""
        zero = self.settings.zero_optimization
        return 2 * self.numel <= zero.stage3_max_reuse_distance and self.numel <= zero.stage3_max_live_parameters

    @property
    def owned_numel(self) -> int:
        """Elements that a rank answers for in a checkpoint: each once."""
        return -(-self.numel // self.ranks)
