"""A sparse model as transformers knows models: once this is imported, Auto classes, pipelines and Trainer take it.

configuration      config.json of a sparse model: BERT's, and how many blocks each linear layer has
modeling           the encoder on padded batches, and its heads
unpadded           rows without their padding, and back
from_checkpoint    a model out of a run or a checkpoint, and its tokenizer
export             `dsbert export`: a directory that transformers loads; export_forms.py writes its files, model_card.py
                   its README.md, hub_upload.py hands it over to the hub
finetuning/        `dsbert finetune`
sentence_embedder  embeddings of sentences by mean pooling, also as a module of sentence-transformers

    import dsbert.hf
    fill = transformers.pipeline("fill-mask", model="exports/sparse")    # what `dsbert export --form sparse` wrote
    model = dsbert.hf.from_run("runs/demo")                              # without an export
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from dsbert.hf.configuration import DsbertConfig
from dsbert.hf.from_checkpoint import from_run, tokenizer_from_run
from dsbert.hf.modeling import (
    DsbertForMaskedLM,
    DsbertForPreTraining,
    DsbertForQuestionAnswering,
    DsbertForSequenceClassification,
    DsbertForTokenClassification,
    DsbertModel,
)
from dsbert.hf.sentence_embedder import SentenceEmbedder

__all__ = [
    "DsbertConfig",
    "DsbertForMaskedLM",
    "DsbertForPreTraining",
    "DsbertForQuestionAnswering",
    "DsbertForSequenceClassification",
    "DsbertForTokenClassification",
    "DsbertModel",
    "SentenceEmbedder",
    "from_run",
    "tokenizer_from_run",
]

AutoConfig.register(DsbertConfig.model_type, DsbertConfig)
for _auto, _model in (
    (AutoModel, DsbertModel),
    (AutoModelForPreTraining, DsbertForPreTraining),
    (AutoModelForMaskedLM, DsbertForMaskedLM),
    (AutoModelForSequenceClassification, DsbertForSequenceClassification),
    (AutoModelForTokenClassification, DsbertForTokenClassification),
    (AutoModelForQuestionAnswering, DsbertForQuestionAnswering),
):
    _auto.register(DsbertConfig, _model)
