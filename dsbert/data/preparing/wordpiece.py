"""WordPiece, trained so that ids do not depend on the run that trained it.

The trainer numbers continuation characters in the order of a randomly seeded hash map, and breaks ties between
merges by number, so two trainings may differ in ids and even in tokens. Here the alphabet is given to the trainer in
sorted order, which fixes the tokens, and the ids are assigned anew: the special tokens first, then the rest sorted.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from dsbert.base.errors import UserError
from dsbert.data.bert_tokenizer import MAX_WORD_CHARS, SPECIAL_TOKENS, bare_tokenizer, build_tokenizer
from dsbert.data.preparing.alphabet import continues_a_word, find_alphabet
from dsbert.data.preparing.scripts import cut_unspaced
from dsbert.data.token_kinds import CONTINUATION

if TYPE_CHECKING:
    from tokenizers import Tokenizer


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
