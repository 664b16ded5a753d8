"""GLUE and SQuAD by the names of their tasks, as they stand on the Hugging Face hub.

GLUE (Wang et al. 2019, arXiv 1804.07461): the labels of its test splits are not public, so that those get predictions
alone. SQuAD (Rajpurkar et al. 2016 and 2018, arXiv 1606.05250 and 1806.03822): squad_v2 has questions without an
answer.
"""

from __future__ import annotations

from typing import Any

_GLUE = "nyu-mll/glue"


def _pair(first: str, second: str) -> dict[str, str]:
    return {"text": first, "text_pair": second, "id": "idx"}


def _glue(config: str, columns: dict[str, str], metric: str = "accuracy", **more: Any) -> dict[str, Any]:
    splits = more.pop("splits", {"test": "test"})
    task = {"dataset": _GLUE, "config": config, "columns": columns, "metric": metric, "splits": splits}
    return {"kind": "classification"} | task | more


_MNLI_SPLITS = {
    "validation": "validation_matched",
    "validation_mismatched": "validation_mismatched",
    "test": "test_matched",
    "test_mismatched": "test_mismatched",
}

BENCHMARKS: dict[str, dict[str, Any]] = {
    "cola": _glue("cola", {"text": "sentence", "id": "idx"}, "matthews_correlation"),
    "sst2": _glue("sst2", {"text": "sentence", "id": "idx"}),
    "mrpc": _glue("mrpc", _pair("sentence1", "sentence2"), "f1"),
    "stsb": _glue("stsb", _pair("sentence1", "sentence2"), "pearson", kind="regression"),
    "qqp": _glue("qqp", _pair("question1", "question2"), "f1"),
    "mnli": _glue("mnli", _pair("premise", "hypothesis"), splits=_MNLI_SPLITS),
    "qnli": _glue("qnli", _pair("question", "sentence")),
    "rte": _glue("rte", _pair("sentence1", "sentence2")),
    "wnli": _glue("wnli", _pair("sentence1", "sentence2")),
    "squad": {"kind": "question-answering", "dataset": "rajpurkar/squad"},
    "squad_v2": {"kind": "question-answering", "dataset": "rajpurkar/squad_v2"},
}
