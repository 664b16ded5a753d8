"""The weights that a run begins with where its recipe names some: read at its first start alone.

A run that goes on has them in its checkpoints; the source may be gone by then, or have been trained further. What the
run began with is told by a digest, which is part of its identity.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dsbert.base.collectives import gather_json, on_main_rank, raise_on_all_ranks
from dsbert.base.durable import replace_durably
from dsbert.base.errors import CheckpointError, UserError
from dsbert.checkpoint.loading import published
from dsbert.config.recipe import Recipe
from dsbert.data.manifest import TOKENIZER
from dsbert.training.attempts import Attempt
from dsbert.training.history import read_config
from dsbert.training.run_directory import INITIAL_TOPOLOGY, RunDirectory

if TYPE_CHECKING:
    from torch import nn

    from dsbert.checkpoint.weight_source import WeightSource
    from dsbert.sparse import BlockSparseLinear, MaskManager
    from dsbert.training.agreement import Agreement


@dataclass(eq=False)
class InitFrom:
    """digest: of the source. source: what was read of it, until a model has it; None where the run goes on from a
    checkpoint of its own. tokenizer: the directory of the data's. lines: what became of the weights, for people."""

    digest: str
    source: WeightSource | None
    tokenizer: Path
    lines: list[str] = field(default_factory=list)

    def fill_(self, model: nn.Module, layers: dict[str, BlockSparseLinear], recipe: Recipe) -> None:
        """Give a model that was just built the weights. Raises UserError."""
        from dsbert.checkpoint.initial_weights import begin_with_

        if self.source is not None:
            taken = begin_with_(model, layers, self.source, recipe, self.tokenizer)
            self.lines += taken.lines(self.source, recipe)
            self.source = None  # the model has it

    def keep_topology(self, directory: RunDirectory, attempt: Attempt, masks: MaskManager) -> None:
        """Write down where the blocks stand at first, for who replays the updates later. Collective. Raises
        CheckpointError where the run was to go on from a checkpoint that is gone."""
        if attempt.checkpoint is not None:
            return
        if not self.lines:
            raise CheckpointError(f"expected a checkpoint in {directory.checkpoints}, found it gone: start once more")
        on_main_rank(lambda: _write(directory.path / INITIAL_TOPOLOGY, masks))


def init_from_of(agreed: Agreement) -> InitFrom | None:
    """None where the recipe names nothing. Collective. Raises the same UserError or CheckpointError on every rank."""
    path = agreed.recipe.init_from
    if path is None:
        return None
    goes_on, recorded = gather_json([bool(published(agreed.directory.checkpoints)), _recorded(agreed)])[0]
    found = raise_on_all_ranks(lambda: _open(path, agreed.recipe.data.path / TOKENIZER, goes_on, recorded))
    digests = gather_json(found.digest)
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise UserError(f"expected the same weights in {path} on all ranks, found others on rank {rank}").for_all()
    return found


def _open(path: Path, tokenizer: Path, goes_on: bool, recorded: str | None) -> InitFrom:
    from dsbert.checkpoint.weight_source import open_source, source_digest

    if goes_on:
        return InitFrom(recorded or source_digest(path), None, tokenizer)
    source = open_source(path)
    return InitFrom(source.digest, source, tokenizer)


def _recorded(agreed: Agreement) -> str | None:
    """The digest in the record of the run, where that names the same source."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        config = read_config(agreed.directory.path)
        if Path(config["recipe"]["init_from"]).resolve() == Path(str(agreed.recipe.init_from)).resolve():
            return str(config["identity"]["init_from"])
    return None


def _write(path: Path, masks: MaskManager) -> None:
    from safetensors.torch import save

    replace_durably(path, save({key: tensor.contiguous() for key, tensor in masks.state_dict().items()}))
