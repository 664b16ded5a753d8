"""What the parts of a run take, in seconds: one table, whether they were timed here or follow from a card's data
sheet."""

from __future__ import annotations

from dataclasses import dataclass

from dsbert.jobs.capacity.figures import Figure, total
from dsbert.jobs.capacity.model_size import ModelSize
from dsbert.jobs.capacity.workload import Workload
from dsbert.sparse.flops import linear_flops, sequence_flops


@dataclass(frozen=True)
class Costs:
    """step: parts of an optimizer step, one after the other. evaluation: of one validation. update: of a mask update.
    save: for which training waits. publish: from a save until it counts, in the background. peak: FLOP/s of dense
    products, of a rank."""

    step: tuple[Figure, ...]
    evaluation: Figure
    update: Figure
    save: Figure
    publish: Figure
    peak: Figure

    @property
    def step_s(self) -> Figure:
        """Seconds of a step without saves, updates and validations."""
        return total("step", self.step, "the sum of the parts above")


@dataclass(frozen=True)
class StepFlops:
    """Forward and backward of the global batch. paper: as the paper counts, encoder linears and attention products of
    real tokens (sparse/flops.py); dense: the same with every weight; head: of the prediction of masked tokens."""

    paper: float
    dense: float
    head: float

    @classmethod
    def of(cls, size: ModelSize, work: Workload) -> StepFlops:
        """Of real tokens, spread as the samples are."""
        model, lengths = size.recipe.model, work.samples.lengths
        per_sample = work.global_batch / len(lengths)
        pairs = size.spec.attention_pairs(model, lengths)
        shape = (int(lengths.sum()), model.hidden_size, pairs)
        dense = sum(out * inner for out, inner, _ in size.linears.values())
        head = linear_flops(work.predictions(lengths), model.hidden_size * (model.hidden_size + size.vocab_size))
        return cls(
            per_sample * sequence_flops(*shape, [size.kept]),
            per_sample * sequence_flops(*shape, [dense]),
            per_sample * head,
        )


def utilisation(flops: StepFlops, step_s: float, ranks: int, peak: Figure) -> Figure:
    """MFU: the model's FLOPs over those that the cards could do meanwhile (Chowdhery et al. 2022, arXiv:2204.02311,
    appendix B)."""
    how = "the paper's FLOPs of kept weights / (step x ranks x the most that dense products reach)"
    return Figure("MFU", flops.paper / (step_s * ranks * peak.value), "share", "estimated", how)
