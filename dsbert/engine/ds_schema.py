"""What dsbert honours of DeepSpeed's JSON: every key at every level, with its type; and what it refuses, and why.

Written out instead of DeepSpeed's own models, which know half of the keys, ignore others without a word, and take
seconds to import; a test holds both side by side.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from dsbert.base.fields import Flag, Number, Text, Whole, whole

Size = Annotated[Whole, Field(ge=0)]
Count = Annotated[Whole, Field(gt=0)]
Precision = Literal["fp32", "bf16", "fp16"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Zero(_Section):
    """zero_optimization."""

    stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(whole)] = 0
    contiguous_gradients: Flag = True
    reduce_scatter: Flag = True
    reduce_bucket_size: Count = 500_000_000
    use_multi_rank_bucket_allreduce: Flag = True
    allgather_partitions: Flag = True
    allgather_bucket_size: Size = 500_000_000
    overlap_comm: Flag | None = None
    compute_grad_norm: Literal[True] = True
    load_from_fp32_weights: Flag = True
    sub_group_size: Size = 1_000_000_000
    stage3_prefetch_bucket_size: Size = 50_000_000
    stage3_param_persistence_threshold: Size = 100_000
    stage3_model_persistence_threshold: Size = 2**63 - 1
    stage3_max_live_parameters: Size = 1_000_000_000
    stage3_max_reuse_distance: Size = 1_000_000_000
    stage3_gather_16bit_weights_on_model_save: Flag = False
    stage3_module_granularity_threshold: Size = 0
    stage3_use_all_reduce_for_fetch_params: Flag = False
    stage3_allgather_sequential: Flag = False
    ignore_unused_parameters: Flag = True
    round_robin_gradients: Flag = False
    parameter_alignment: Flag = False
    memory_efficient_linear: Flag = True
    override_module_apply: Flag = True
    log_trace_cache_warnings: Flag = False
    enable_sanity_checks: Flag = False


class Bf16(_Section):
    """bf16."""

    enabled: Flag = False
    immediate_grad_update: Flag = False
    check_grad_overflow: Flag = True


class Fp16(_Section):
    """fp16. loss_scale: 0 is dynamic, from 2 ** initial_scale_power."""

    enabled: Flag = False
    auto_cast: Flag = False
    loss_scale: Annotated[Number, Field(ge=0)] = 0.0
    initial_scale_power: Annotated[Whole, Field(ge=0, le=126)] = 16
    loss_scale_window: Count = 1000
    hysteresis: Count = 2
    consecutive_hysteresis: Flag = False
    min_loss_scale: Count = 1


class DataTypes(_Section):
    """data_types."""

    grad_accum_dtype: Precision | None = None


class FlopsProfiler(_Section):
    """flops_profiler."""

    enabled: Flag = False
    recompute_fwd_factor: Annotated[Number, Field(ge=0)] = 0.0
    profile_step: Count = 1
    module_depth: Annotated[Whole, Field(ge=-1)] = -1
    top_modules: Count = 1
    detailed: Flag = True
    output_file: Text | None = None


class CommsLogger(_Section):
    """comms_logger."""

    enabled: Flag = False
    verbose: Flag = False
    prof_all: Flag = True
    prof_ops: list[Text] = []
    debug: Flag = False


class Monitor(_Section):
    """tensorboard, csv_monitor."""

    enabled: Flag = False
    output_path: str = ""
    job_name: Text = "DeepSpeedJobName"


class Throughput(_Section):
    """timers.throughput."""

    enabled: Flag = True
    synchronized: Flag = True


class Timers(_Section):
    """timers."""

    throughput: Throughput = Throughput()


class DeepSpeedJson(_Section):
    """The whole file. Where gradient_clipping is missing, DeepSpeed clips at 1."""

    zero_optimization: Zero = Zero()
    bf16: Bf16 = Bf16()
    fp16: Fp16 = Fp16()
    gradient_clipping: Annotated[Number, Field(ge=0)] = 1.0
    communication_data_type: Precision | None = None
    data_types: DataTypes = DataTypes()
    managed_gradient_accumulation: Literal[True] = True
    zero_allow_untested_optimizer: Flag = False
    steps_per_print: Count | None = None
    wall_clock_breakdown: Flag = False
    memory_breakdown: Flag = False
    dump_state: Flag = False
    disable_python_gc: Flag = False
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = None
    vocabulary_size: Count | None = None
    flops_profiler: FlopsProfiler = FlopsProfiler()
    comms_logger: CommsLogger = CommsLogger()
    tensorboard: Monitor = Monitor()
    csv_monitor: Monitor = Monitor()
    timers: Timers = Timers()

    @model_validator(mode="after")
    def _one_precision(self) -> DeepSpeedJson:
        if self.bf16.enabled and self.fp16.enabled:
            raise ValueError("expected one of bf16 and fp16 enabled, found both")
        return self


# The recipe's key for what the JSON may only leave to it, as absent or "auto".
RECIPE_OWNS = {
    "optimizer": "optim",
    "scheduler": "optim",
    "train_batch_size": "batch.global_batch",
    "train_micro_batch_size_per_gpu": "batch.micro_batch",
    "gradient_accumulation_steps": "batch.micro_batch",
}
_OFFLOAD = "a further copy of the weights, in which a re-pointed block would live on"
_MASTERS = "dsbert's masters and moments are fp32"
_OTHER_MODEL = "dsbert's BERT is not built for it"
_SCALING = "it would scale the gradients that mask updates look at"
_GONE = "this DeepSpeed has it no more"
# What dsbert does not do, and why; switched off, as templates have them, they are left out. Dotted, as far as needed.
REFUSED = {
    "zero_optimization.offload_optimizer": _OFFLOAD,
    "zero_optimization.offload_param": _OFFLOAD,
    "zero_optimization.cpu_offload": _OFFLOAD,
    "zero_optimization.cpu_offload_param": _OFFLOAD,
    "zero_optimization.cpu_offload_use_pin_memory": _OFFLOAD,
    "zero_optimization.zenflow": _OFFLOAD,
    "zero_optimization.zero_hpz_partition_size": _OFFLOAD,
    "zero_optimization.mics_shard_size": _GONE,
    "zero_optimization.mics_hierarchical_params_gather": _GONE,
    "zero_optimization.zeropp_loco_param": _GONE,
    "zero_optimization.zero_quantized_weights": "ranks would no longer hold the same weights as the masters",
    "zero_optimization.zero_quantized_nontrainable_weights": "all weights are trained",
    "zero_optimization.zero_quantized_gradients": "gradients would no longer be those of the global batch",
    "zero_optimization.legacy_stage1": _GONE,
    "zero_optimization.elastic_checkpoint": "dsbert writes its own checkpoints",
    "zero_optimization.pipeline_loading_checkpoint": "dsbert writes its own checkpoints",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "write stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.save_muon_momentum_buffer_in_memory": "the optimizer is AdamW",
    "zero_optimization.leaf_module": _OTHER_MODEL,
    "bf16.bf16_master_weights_and_grads": _MASTERS,
    "bf16.bf16_optimizer_states": _MASTERS,
    "fp16.fp16_master_weights_and_grads": _MASTERS,
    "bfloat16": "write bf16",
    "data_types.param_dtype": "write bf16 or fp16",
    "data_types.buffer_dtype": "write bf16 or fp16",
    "data_types.keep_in_fp32_modules": "write bf16 or fp16",
    "torch_autocast": "write bf16 or fp16",
    "amp": _GONE,
    "prescale_gradients": _SCALING,
    "gradient_predivide_factor": _SCALING,
    "gradient_allreduce_op": _SCALING,
    "sparse_gradients": _GONE,
    "disable_allgather": "ranks would no longer hold the same weights",
    "zero_force_ds_cpu_optimizer": "nothing is offloaded",
    "dataloader_drop_last": "the recipe owns the data",
    "data_efficiency": "the recipe owns the data",
    "curriculum_learning": _GONE,
    "activation_checkpointing": _OTHER_MODEL,
    "progressive_layer_drop": _GONE,
    "pipeline": _OTHER_MODEL,
    "tensor_parallel": _OTHER_MODEL,
    "expert_parallel": _OTHER_MODEL,
    "use_data_before_expert_parallelism": _OTHER_MODEL,
    "sequence_parallel_size": _OTHER_MODEL,
    "seq_parallel_communication_data_type": _OTHER_MODEL,
    "hybrid_engine": _OTHER_MODEL,
    "compile": _OTHER_MODEL,
    "weight_quantization": _OTHER_MODEL,
    "compression_training": _GONE,
    "quantize_training": _GONE,
    "eigenvalue": _GONE,
    "sparse_attention": _GONE,
    "graph_harvesting": _GONE,
    "elasticity": "dsbert resumes at any number of ranks by itself",
    "autotuning": "kernels are chosen by sparsity.kernels, batches by the recipe",
    "checkpoint": "dsbert writes its own checkpoints",
    "nebula": _GONE,
    "datastates": "dsbert writes its own checkpoints",
    "aio": "nothing is offloaded",
    "wandb": "the recipe owns it as log.wandb",
    "comet": "records go to metrics.jsonl, and to W&B by log.wandb",
}
# What means "off" for a key of REFUSED beside null, false and what has no entry that is on.
OFF: dict[str, tuple[Any, ...]] = {
    "zero_optimization.zero_hpz_partition_size": (0, 1),
    "zero_optimization.mics_shard_size": (-1, 0),
    "gradient_predivide_factor": (1,),
    "gradient_allreduce_op": ("mean",),
    "zero_force_ds_cpu_optimizer": (True,),
    "seq_parallel_communication_data_type": ("fp32",),
    "sequence_parallel_size": (1,),
    "data_types.keep_in_fp32_modules": ("auto",),
}
# What others, or other files, call a key.
SYNONYMS = {
    "clip_grad": "gradient_clipping",
    "max_grad_norm": "gradient_clipping",
    "zero": "zero_optimization",
    "zero_stage": "zero_optimization.stage",
    "prefetch_bucket_size": "zero_optimization.stage3_prefetch_bucket_size",
    "param_persistence_threshold": "zero_optimization.stage3_param_persistence_threshold",
    "loss_scaling": "fp16.loss_scale",
    "float16": "fp16",
    "half": "fp16",
}
