"""A BERT WordPiece tokenizer (by default lower case, no accents) whose ids do not depend on the run that trained it.

The trainer numbers continuation characters in the order of a randomly seeded hash map, and breaks ties between
merges by number, so two trainings may differ in ids and even in tokens. Here the alphabet is given to the trainer in
sorted order, which fixes the tokens, and the ids are assigned anew: the special tokens first, then the rest sorted.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dsbert.data.alphabet import continues_a_word, find_alphabet
from dsbert.data.scripts import cut_unspaced
from dsbert.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_CONTINUATION = "##"
_FILE, _VOCABULARY, _CONFIG = "tokenizer.json", "vocab.txt", "tokenizer_config.json"
# Longer words are [UNK] to BERT's WordPiece.
_MAX_WORD_CHARS = 100


@dataclass(frozen=True)
class Vocabulary:
    """What batches need to know of a tokenizer: V ids, the special ones, and which start a word (bool [V])."""

    size: int
    pad: int
    unk: int
    cls: int
    sep: int
    mask: int
    word_start: NDArray[np.bool_]

    @classmethod
    def of(cls, tokenizer: "Tokenizer") -> "Vocabulary":
        """Raises UserError if one of the five special tokens is missing."""
        pad, unk, cls_id, sep, mask = (_special_id(tokenizer, token) for token in SPECIAL_TOKENS)
        table = word_start_table(tokenizer)
        return cls(size=len(table), pad=pad, unk=unk, cls=cls_id, sep=sep, mask=mask, word_start=table)

    @property
    def ordinary_ids(self) -> NDArray[np.int64]:
        """All ids but the special ones, ascending: what a masked token may be replaced by."""
        return np.setdiff1d(np.arange(self.size), [self.pad, self.unk, self.cls, self.sep, self.mask])


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
    continuations = [_CONTINUATION + char for char in alphabet if continues_a_word(tokenizer, char)]
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
    words_of = [tokenizer.pre_tokenizer, *([cut_unspaced()] if unspaced else [])]
    # What is [UNK] at any rate teaches nothing, and one word of megabytes would take hours.
    tokenizer.pre_tokenizer = Sequence([*words_of, Split(Regex(rf"\A.{{{_MAX_WORD_CHARS + 1},}}"), "removed")])
    tokenizer.train_from_iterator(sentences, trainer)
    words = sorted(set(tokenizer.get_vocab()) - set(SPECIAL_TOKENS))
    vocab = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *words])}
    made = _build(vocab, lowercase, strip_accents)
    if unspaced:
        made.pre_tokenizer = Sequence(words_of)
    made.add_special_tokens(list(SPECIAL_TOKENS))
    return made


def save_tokenizer(tokenizer: "Tokenizer", directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and vocab.txt, as transformers' AutoTokenizer expects them.

    It makes a BertTokenizer anew from vocabulary and flags; of a tokenizer that is more than that, it is told to take
    tokenizer.json as it is. Raises OSError.
    """
    import json

    directory.mkdir(parents=True, exist_ok=True)
    # Not with `tokenizer.save`, whose errors of the disk are no OSError.
    (directory / _FILE).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    normalizer = json.loads(tokenizer.to_str())["normalizer"] or {}
    config = {
        "tokenizer_class": "BertTokenizer" if is_plain_bert(tokenizer) else "PreTrainedTokenizerFast",
        "do_lower_case": is_lowercase(tokenizer),
        "strip_accents": normalizer.get("strip_accents"),
        "tokenize_chinese_chars": normalizer.get("handle_chinese_chars", True),
        **{f"{token.strip('[]').lower()}_token": token for token in SPECIAL_TOKENS},
    }
    (directory / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    (directory / _VOCABULARY).write_text("".join(token + "\n" for token in vocabulary_of(tokenizer)), encoding="utf-8")


def is_plain_bert(tokenizer: "Tokenizer") -> bool:
    """Whether vocabulary and flags are all there is to it: transformers' BertTokenizer then gives the same ids."""
    import json

    state = json.loads(tokenizer.to_str())
    normalizer, model = state["normalizer"] or {}, state["model"]
    rules = [normalizer.get("type"), normalizer.get("clean_text"), state["pre_tokenizer"], model["type"]]
    return (
        rules == ["BertNormalizer", True, {"type": "BertPreTokenizer"}, "WordPiece"]
        and (model["unk_token"], model["continuing_subword_prefix"]) == ("[UNK]", _CONTINUATION)
        and model["max_input_chars_per_word"] == _MAX_WORD_CHARS
        and {token["content"] for token in state["added_tokens"]} == set(SPECIAL_TOKENS)
        and not any(token["normalized"] or token["lstrip"] or token["rstrip"] for token in state["added_tokens"])
    )


def is_lowercase(tokenizer: "Tokenizer") -> bool:
    """Whether the vocabulary is one of lower case: the tokenizer then folds text by itself."""
    return tokenizer.normalizer is not None and tokenizer.normalizer.normalize_str("A") == "a"


def find_tokenizer(name: str) -> "Tokenizer":
    """The tokenizer of a directory (tokenizer.json, or else vocab.txt), of such a file, or of that name on the hub.

    Raises:
        UserError: there is none, it cannot be fetched, or it is no WordPiece tokenizer with BERT's special tokens.
    """
    import json

    from tokenizers import Tokenizer

    path = Path(name)
    if path.is_dir() and not (path / _FILE).exists() and (path / _VOCABULARY).exists():
        tokenizer = _from_vocabulary(path)
    elif path.is_dir() or path.suffix == ".json":
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
    known = Vocabulary.of(tokenizer)
    tokenizer.post_processor = _pairs(known.cls, known.sep)  # what the model is trained on, whatever it came with
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


def _from_vocabulary(directory: Path) -> "Tokenizer":
    """As transformers' BertTokenizer reads vocab.txt, a token a line, and what tokenizer_config.json may say of it.

    Where nothing says so, a vocabulary without capitals is one of lower case. Raises UserError.
    """
    import json

    from tokenizers import normalizers

    path = directory / _VOCABULARY
    try:
        tokens = [token.removesuffix("\r") for token in path.read_bytes().decode().removesuffix("\n").split("\n")]
        config = json.loads((directory / _CONFIG).read_bytes()) if (directory / _CONFIG).exists() else {}
        said = {name: config.get(name) for name in ("do_lower_case", "strip_accents", "tokenize_chinese_chars")}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot read the tokenizer in {directory} ({error}): give another") from None
    if missing := [token for token in SPECIAL_TOKENS if token not in tokens]:
        raise UserError(f"expected {' '.join(SPECIAL_TOKENS)} in {path}, found no {' '.join(missing)}: give another")
    if repeated := [token for token, count in Counter(tokens).items() if count > 1]:
        raise UserError(f"expected each token once in {path}, found {repeated[0]!r} again: give another")
    ordinary = (token for token in tokens if not (token.startswith("[") and token.endswith("]")))
    folds = (
        all(token == token.lower() for token in ordinary) if said["do_lower_case"] is None else said["do_lower_case"]
    )
    tokenizer = _build({token: number for number, token in enumerate(tokens)}, bool(folds), bool(folds))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=bool(folds),
        strip_accents=said["strip_accents"],
        handle_chinese_chars=said["tokenize_chinese_chars"] is not False,
    )
    return tokenizer


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


def normalizer_of(tokenizer: "Tokenizer") -> str:
    """The normaliser as JSON: what folding.py takes."""
    import json

    return json.dumps(json.loads(tokenizer.to_str())["normalizer"], sort_keys=True)


def bare_tokenizer(lowercase: bool, strip_accents: bool) -> "Tokenizer":
    """A tokenizer that has learned nothing, to be asked for what it makes of characters."""
    return _build({token: number for number, token in enumerate(SPECIAL_TOKENS)}, lowercase, strip_accents)


def _build(vocab: dict[str, int], lowercase: bool, strip_accents: bool) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", continuing_subword_prefix=_CONTINUATION))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=_CONTINUATION)
    tokenizer.post_processor = _pairs(vocab["[CLS]"], vocab["[SEP]"])
    return tokenizer


def _pairs(cls: int, sep: int) -> Any:
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", cls), ("[SEP]", sep)],
    )


def vocabulary_of(tokenizer: "Tokenizer") -> list[str]:
    """The tokens in the order of their ids."""
    vocab = tokenizer.get_vocab()
    return sorted(vocab, key=vocab.__getitem__)


def _special_id(tokenizer: "Tokenizer", token: str) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise UserError(f"the tokenizer has no {token} token; BERT needs {' '.join(SPECIAL_TOKENS)}")
    return int(number)
