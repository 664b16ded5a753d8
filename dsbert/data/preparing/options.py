"""How a preparation is to be made, and what that asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsbert.base.errors import UserError
from dsbert.data.manifest import Request, Source
from dsbert.data.preparing.corpus import MIN_WORDS, TEXT_COLUMN
from dsbert.data.preparing.plan import source_fingerprint
from dsbert.data.preparing.sources import TextSource
from dsbert.data.shards import DEFAULT_SHARD_TOKENS

_MAX_SHARD_TOKENS = 1 << 30
_MAX_VOCAB_SIZE = 1 << 22


@dataclass(frozen=True)
class Options:
    """How a preparation is made.

    documents: how rows make documents (grouping.py): none (each source's default), one for all, or one for each.
    tokenizer: "train" (to `vocab_size`; a small corpus has fewer tokens), a directory, or a name on the hub.
    validation: fraction of the documents held out, chosen by their text; 0 holds out none. A split that would get no
    document gets the nearest one. shard_tokens: largest shard. min_words: documents with fewer words are dropped.
    near_duplicates: whether near copies are, too. text_column: what tables call their text. cased: the tokenizer that
    is trained keeps case and accents; keep_accents: only accents, as languages need whose vowel signs are some.
    """

    vocab_size: int | None = None
    validation: float = 0.05
    documents: Sequence[str] = ()
    tokenizer: str = "train"
    shard_tokens: int = DEFAULT_SHARD_TOKENS
    min_words: int = MIN_WORDS
    near_duplicates: bool = False
    text_column: str = TEXT_COLUMN
    cased: bool = False
    keep_accents: bool = False

    def check(self) -> None:
        """Raises UserError for a number out of bounds."""
        if not 0 <= self.validation < 1:
            raise UserError(f"the validation fraction must be in [0, 1), got {self.validation}")
        if not 1 <= self.shard_tokens <= _MAX_SHARD_TOKENS:
            raise UserError(f"shard_tokens must be in [1, {_MAX_SHARD_TOKENS}], got {self.shard_tokens}")
        if self.tokenizer == "train" and not self.vocab_size:
            raise UserError(
                "expected --vocab-size for a tokenizer that is trained, found none: give it, or --tokenizer DIR"
            )
        if self.tokenizer != "train" and (self.cased or self.keep_accents):
            raise UserError(
                "expected --cased and --keep-accents for a tokenizer that is trained, found --tokenizer "
                f"{self.tokenizer}, which has a rule of its own: leave them out"
            )
        if self.vocab_size is not None and self.vocab_size > _MAX_VOCAB_SIZE:
            raise UserError(f"expected a vocab_size of at most {_MAX_VOCAB_SIZE}, found {self.vocab_size}")


def make_request(sources: Sequence[TextSource], files: Sequence[Sequence[dict[str, Any]]], options: Options) -> Request:
    """What is asked for. files: of each source, from `files_by_source`.

    Raises UserError if the tokenizer or the library for near duplicates is missing.
    """
    from dsbert.data.preparing.near_duplicates import algorithm

    found = [
        Source(source.name, source_fingerprint(own), source.documents)
        for source, own in zip(sources, files, strict=True)
    ]
    trained = options.tokenizer == "train"
    digest = "train"
    if not trained:
        from dsbert.data.tokenizer import find_tokenizer, tokenizer_digest

        digest = tokenizer_digest(find_tokenizer(options.tokenizer))
    return Request(
        sources=tuple(found),
        tokenizer=digest,
        vocab_size=(options.vocab_size or 0) if trained else 0,
        validation=options.validation,
        shard_tokens=options.shard_tokens,
        text_column=options.text_column,
        min_words=options.min_words,
        near_duplicates=algorithm() if options.near_duplicates else "",
        cased=options.cased,
        keep_accents=options.keep_accents and not options.cased,
    )


def chosen_normalizer(options: Options) -> str:
    """What the tokenizer to be makes of characters, as JSON. Raises UserError if the one given cannot be found."""
    from dsbert.data.bert_tokenizer import bare_tokenizer
    from dsbert.data.tokenizer import find_tokenizer, normalizer_of

    if options.tokenizer != "train":
        return normalizer_of(find_tokenizer(options.tokenizer))
    return normalizer_of(bare_tokenizer(not options.cased, not (options.cased or options.keep_accents)))
