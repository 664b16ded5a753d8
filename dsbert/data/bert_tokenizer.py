"""BERT's tokenizer around a vocabulary."""

from typing import TYPE_CHECKING, Any

from dsbert.data.token_kinds import CONTINUATION

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Longer words are [UNK] to BERT's WordPiece.
MAX_WORD_CHARS = 100


def bare_tokenizer(lowercase: bool, strip_accents: bool) -> "Tokenizer":
    """A tokenizer that has learned nothing, to be asked for what it makes of characters."""
    return build_tokenizer({token: number for number, token in enumerate(SPECIAL_TOKENS)}, lowercase, strip_accents)


def build_tokenizer(vocab: dict[str, int], lowercase: bool, strip_accents: bool) -> "Tokenizer":
    """BERT's tokenizer with this vocabulary, in which no token is special yet."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", continuing_subword_prefix=CONTINUATION))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUATION)
    tokenizer.post_processor = cls_and_sep(vocab["[CLS]"], vocab["[SEP]"])
    return tokenizer


def cls_and_sep(cls: int, sep: int) -> Any:
    """A post-processor: [CLS] and [SEP] around one text or two, as the model is trained on."""
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", cls), ("[SEP]", sep)],
    )
