"""A BERT WordPiece tokenizer (lower case, accents stripped) whose ids do not depend on the run that trained it.

The trainer numbers continuation characters in the order of a randomly seeded hash map, and breaks ties between
merges by number, so two trainings may differ in ids and even in tokens. Here the alphabet is given to the trainer in
sorted order, which fixes the tokens, and the ids are assigned anew: the special tokens first, then the rest sorted.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dsbert.data.kinds import INSIDE, LOWER, SPECIAL, token_kinds
from dsbert.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_CONTINUATION = "##"
_FILE = "tokenizer.json"
_MAX_ALPHABET = 1000
_AT_ONCE = 4096  # sentences whose characters are counted together


@dataclass(frozen=True)
class Vocabulary:
    """What batches need to know of a tokenizer: V ids, the special ones, which start a word (bool [V]), and of what
    kind each is (uint8 [V], kinds.py), without which it is only known where words start.
    """

    size: int
    pad: int
    unk: int
    cls: int
    sep: int
    mask: int
    word_start: NDArray[np.bool_]
    kinds: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, dtype=np.uint8))

    def __post_init__(self) -> None:
        if not len(self.kinds):
            kinds = np.where(self.word_start, LOWER, INSIDE).astype(np.uint8)
            kinds[[self.pad, self.unk, self.cls, self.sep, self.mask]] = SPECIAL
            object.__setattr__(self, "kinds", kinds)

    @classmethod
    def of(cls, tokenizer: "Tokenizer") -> "Vocabulary":
        """Raises UserError if one of the five special tokens is missing."""
        pad, unk, cls_id, sep, mask = (_special_id(tokenizer, token) for token in SPECIAL_TOKENS)
        table = word_start_table(tokenizer)
        added = tokenizer.get_added_tokens_decoder().items()
        others = [number for number, token in added if token.special and number < len(table)]
        kinds = token_kinds(vocabulary_of(tokenizer), [pad, unk, cls_id, sep, mask, *others])
        return cls(len(table), pad=pad, unk=unk, cls=cls_id, sep=sep, mask=mask, word_start=table, kinds=kinds)

    @property
    def is_text(self) -> NDArray[np.bool_]:
        """bool [V]: False for special tokens, [UNK] among them, of which there is nothing to learn."""
        return self.kinds != SPECIAL

    @property
    def ordinary_ids(self) -> NDArray[np.int64]:
        """All ids but the special ones, ascending: what a masked token may be replaced by."""
        return np.flatnonzero(self.is_text)


def train_tokenizer(sentences: Iterable[str], vocab_size: int) -> "Tokenizer":
    """Train WordPiece; equal sentences give equal ids, whatever their order and the number of threads.

    The sentences are gone through twice and not held; what grows with them is the number of different words. A corpus
    with too few words gives a smaller vocabulary than asked for.

    Raises:
        UserError: `vocab_size` leaves no room for a word beyond the special tokens and the alphabet.
    """
    from tokenizers.trainers import WordPieceTrainer

    tokenizer = _build({token: number for number, token in enumerate(SPECIAL_TOKENS)})
    alphabet = _alphabet(tokenizer, sentences)
    continuations = [_CONTINUATION + char for char in alphabet if _continues_a_word(tokenizer, char)]
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
        continuing_subword_prefix=_CONTINUATION,
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    words = sorted(set(tokenizer.get_vocab()) - set(SPECIAL_TOKENS))
    return _build({token: number for number, token in enumerate([*SPECIAL_TOKENS, *words])})


def save_tokenizer(tokenizer: "Tokenizer", directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and vocab.txt, as transformers' AutoTokenizer expects them.

    Raises OSError.
    """
    import json

    directory.mkdir(parents=True, exist_ok=True)
    # Not with `tokenizer.save`, whose errors of the disk are no OSError.
    (directory / _FILE).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    normalizer = json.loads(tokenizer.to_str())["normalizer"] or {}
    config = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": is_lowercase(tokenizer),
        "strip_accents": normalizer.get("strip_accents"),
        "tokenize_chinese_chars": normalizer.get("handle_chinese_chars", True),
        **{f"{token.strip('[]').lower()}_token": token for token in SPECIAL_TOKENS},
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "vocab.txt").write_text("".join(token + "\n" for token in vocabulary_of(tokenizer)), encoding="utf-8")


def is_lowercase(tokenizer: "Tokenizer") -> bool:
    """Whether the vocabulary is one of lower case: the tokenizer then folds text by itself."""
    return tokenizer.normalizer is not None and tokenizer.normalizer.normalize_str("A") == "a"


def find_tokenizer(name: str) -> "Tokenizer":
    """The tokenizer of a directory (tokenizer.json), of such a file, or of that name on the hub.

    Raises:
        UserError: there is none, it cannot be fetched, or it is no WordPiece tokenizer with BERT's special tokens.
    """
    import json

    from tokenizers import Tokenizer

    path = Path(name)
    if path.is_dir() or path.suffix == ".json":
        tokenizer = _read(path / _FILE if path.is_dir() else path, "give another, or --tokenizer train")
    else:
        try:
            tokenizer = _bare(Tokenizer.from_pretrained(name))
        except Exception as error:  # of many kinds: of the hub, of the network
            text = " ".join(str(error).split())[:200]
            raise UserError(
                f"expected a directory with tokenizer.json, or a name on the hub, found {name!r} ({text}): check it, "
                "or give --tokenizer train"
            ) from None
    vocab = tokenizer.get_vocab()
    kind = json.loads(tokenizer.to_str())["model"]["type"]
    if kind != "WordPiece" or not any(token.startswith(_CONTINUATION) for token in vocab):
        raise UserError(
            f"expected a WordPiece vocabulary with {_CONTINUATION} tokens in {name}, found none ({kind}): give another"
        )
    Vocabulary.of(tokenizer)
    if (largest := max(vocab.values())) >= len(vocab):
        # As of a vocab.txt that lists a token twice.
        raise UserError(
            f"expected ids without gaps in the tokenizer {name}, found {len(vocab)} tokens with ids up to {largest}: "
            "give another"
        )
    return tokenizer


def load_tokenizer(directory: Path) -> "Tokenizer":
    """Raises UserError if the directory has no readable tokenizer.json."""
    return _read(directory / _FILE, "prepare the data again")


def _read(path: Path, remedy: str) -> "Tokenizer":
    from tokenizers import Tokenizer

    if not path.is_file():
        raise UserError(f"no tokenizer at {path}; {remedy}")
    try:
        return _bare(Tokenizer.from_file(str(path)))
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"{path} is not a tokenizer ({error}); {remedy}") from error


def _bare(tokenizer: "Tokenizer") -> "Tokenizer":
    """Without the padding and truncation that a tokenizer.json may bring along: they would become part of the data."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def tokenizer_digest(tokenizer: "Tokenizer") -> str:
    """xxh3_128 of the tokens in the order of their ids, and of how text is normalised and cut into words."""
    import json

    import xxhash

    state = json.loads(tokenizer.to_str())
    word_limit = state["model"]["max_input_chars_per_word"]
    parts = [vocabulary_of(tokenizer), state["normalizer"], state["pre_tokenizer"], word_limit]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())


def word_start_table(tokenizer: "Tokenizer") -> NDArray[np.bool_]:
    """bool [V]: True where the token begins a word, False for the `##` continuations."""
    return np.array([not token.startswith(_CONTINUATION) for token in vocabulary_of(tokenizer)])


def _build(vocab: dict[str, int]) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", continuing_subword_prefix=_CONTINUATION))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=_CONTINUATION)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def _alphabet(tokenizer: "Tokenizer", sentences: Iterable[str]) -> list[str]:
    """The characters that the vocabulary must spell, sorted: the most frequent ones after normalisation."""
    raw: Counter[str] = Counter()
    remaining = iter(sentences)
    while text := "".join(islice(remaining, _AT_ONCE)):
        points, numbers = np.unique(np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32), return_counts=True)
        raw.update(dict(zip(map(chr, points.tolist()), numbers.tolist(), strict=True)))
    counts: Counter[str] = Counter()
    for char, count in raw.items():
        for normal in tokenizer.normalizer.normalize_str(char).strip():
            counts[normal] += count
    frequent = sorted(counts, key=lambda char: (-counts[char], char))[:_MAX_ALPHABET]
    return sorted(frequent)


def _continues_a_word(tokenizer: "Tokenizer", char: str) -> bool:
    """Letters and digits can stand inside a word; punctuation and Chinese characters are words of their own."""
    return len(tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str("a" + char))) == 1


def vocabulary_of(tokenizer: "Tokenizer") -> list[str]:
    """The tokens in the order of their ids."""
    vocab = tokenizer.get_vocab()
    return sorted(vocab, key=vocab.__getitem__)


def _special_id(tokenizer: "Tokenizer", token: str) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise UserError(f"the tokenizer has no {token} token; BERT needs {' '.join(SPECIAL_TOKENS)}")
    return int(number)
