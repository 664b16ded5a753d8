"""A sparse model of transformers with weights that tell, and transformers' own with the same weights, written out."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from dsbert import hf
from dsbert.hf.from_checkpoint import pretrained_of
from dsbert.models.construction import build_model
from dsbert.sparse import BlockSparseLinear, BlockTopology
from tests import workbench as bench

PAIRS = {
    "base": (hf.DsbertModel, transformers.BertModel),
    "pre-training": (hf.DsbertForPreTraining, transformers.BertForPreTraining),
    "masked": (hf.DsbertForMaskedLM, transformers.BertForMaskedLM),
    "sequence": (hf.DsbertForSequenceClassification, transformers.BertForSequenceClassification),
    "token": (hf.DsbertForTokenClassification, transformers.BertForTokenClassification),
    "answer": (hf.DsbertForQuestionAnswering, transformers.BertForQuestionAnswering),
}


def sparse_model(head: str = "pre-training", *, low_rank: int = 0, kernels: str = "auto", **changes: Any) -> Any:
    """Three layers, weights so large that all that is seen tells, slots in no order; in evaluation mode."""
    recipe = bench.recipe(
        model={"num_layers": 3, "max_positions": 64, "initializer_std": 0.1},
        sparsity={"low_rank": low_rank},
    )
    model, layers = build_model(recipe, bench.VOCAB_SIZE)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith(("low_rank_u", "bias")):
                param.normal_(std=0.1, generator=generator)
    for layer in layers.values():
        order = torch.randperm(layer.num_active, generator=generator)
        topology = layer.topology
        layer.set_topology(BlockTopology(layer.shape, layer.block_size, topology.rows[order], topology.cols[order]))
    torch.manual_seed(5)  # of heads that were not trained
    return pretrained_of(model, layers, PAIRS[head][0], kernels=kernels, **changes)


def written_out(model: nn.Module) -> dict[str, Tensor]:
    """The state of the dense model: every block put where it stands, one by one, and U V added."""
    state = dict(model.state_dict())
    for name, layer in model.named_modules():
        if isinstance(layer, BlockSparseLinear):
            size, weight = layer.block_size, torch.zeros(layer.shape)
            blocks, rows, cols = (state.pop(f"{name}.{part}") for part in ("blocks", "rows", "cols"))
            for block, row, col in zip(blocks, rows.tolist(), cols.tolist(), strict=True):
                weight[row * size : (row + 1) * size, col * size : (col + 1) * size] = block
            if layer.low_rank:
                weight += state.pop(f"{name}.low_rank_u") @ state.pop(f"{name}.low_rank_v")
            state[f"{name}.weight"] = weight
    return state


def dense_twin(model: Any, head: str) -> Any:
    """transformers' own model with the same weights, computed as transformers does."""
    known = {name: value for name, value in model.config.to_dict().items() if name != "model_type"}
    twin = PAIRS[head][1](transformers.BertConfig(**known))
    twin.set_attn_implementation("eager")
    missing, unexpected = twin.load_state_dict(written_out(model), strict=False)
    assert not unexpected
    assert set(missing) <= twin.all_tied_weights_keys.keys()
    return twin.eval()


def padded_rows(lengths: list[int], columns: int, seed: int = 0) -> dict[str, Tensor]:
    """input_ids, token_type_ids and attention_mask of random tokens: int64 [rows, columns]."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.arange(columns) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, bench.VOCAB_SIZE, real.shape, generator=generator)
    second = torch.arange(columns) >= torch.tensor(lengths)[:, None] // 2
    return {
        "input_ids": torch.where(real, ids, 0),
        "token_type_ids": (real & second).long(),
        "attention_mask": real.long(),
    }
