"""WordPiece, trained so that ids do not depend on the run that trained it.

The trainer numbers continuation characters in the order of a randomly seeded hash map, and breaks ties between
merges by number, so two trainings may differ in ids and even in tokens. Here the alphabet is given to the trainer in
sorted order, which fixes the tokens, and the ids are assigned anew: the special tokens first, then the rest sorted.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dsbert.data.alphabet import continues_a_word, find_alphabet
from dsbert.data.scripts import cut_unspaced
from dsbert.data.token_kinds import CONTINUATION
from dsbert.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Longer words are [UNK] to BERT's WordPiece.
MAX_WORD_CHARS = 100


def train_tokenizer(
    sentences: Iterable[str], vocab_size: int, *, lowercase: bool = True, strip_accents: bool = True
) -> "Tokenizer":
    """Train WordPiece; equal sentences give equal ids, whatever their order and the number of threads.

    Text of a script without spaces has its long runs cut into words (scripts.py), which BERT would take for [UNK].

    The sentences are gone through twice and not held; what grows with them is the number of different words. A corpus
    with too few words gives a smaller vocabulary than asked for.

    Raises:
        UserError: `vocab_size` leaves no room for a word beyond the special tokens and the alphabet.
    """
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Sequence, Split
    from tokenizers.trainers import WordPieceTrainer

    # Without special tokens to look for: in the text that it learns from they are text.
    tokenizer = bare_tokenizer(lowercase, strip_accents)
    room = vocab_size - len(SPECIAL_TOKENS) - 1
    alphabet, unspaced = find_alphabet(tokenizer, sentences, room)
    continuations = [CONTINUATION + char for char in alphabet if continues_a_word(tokenizer, char)]
    smallest = len(SPECIAL_TOKENS) + len(alphabet) + len(continuations) + 1
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size {vocab_size} is too small for this text: its {len(alphabet)} characters alone need "
            f"{smallest - 1} tokens; ask for more than that"
        )
    trainer = WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *continuations],  # "special" here only means: numbered first, in this order
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix=CONTINUATION,
        show_progress=False,
    )
    words_of = [tokenizer.pre_tokenizer, *([cut_unspaced()] if unspaced else [])]
    # What is [UNK] at any rate teaches nothing, and one word of megabytes would take hours.
    tokenizer.pre_tokenizer = Sequence([*words_of, Split(Regex(rf"\A.{{{MAX_WORD_CHARS + 1},}}"), "removed")])
    tokenizer.train_from_iterator(sentences, trainer)
    words = sorted(set(tokenizer.get_vocab()) - set(SPECIAL_TOKENS))
    vocab = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *words])}
    made = build_tokenizer(vocab, lowercase, strip_accents)
    if unspaced:
        made.pre_tokenizer = Sequence(words_of)
    made.add_special_tokens(list(SPECIAL_TOKENS))
    return made


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
