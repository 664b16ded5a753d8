"""A BERT WordPiece tokenizer: what batches need of it, and how it is saved, found and told from another."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dsbert.base.errors import UserError
from dsbert.data.bert_tokenizer import MAX_WORD_CHARS, SPECIAL_TOKENS, build_tokenizer, cls_and_sep
from dsbert.data.token_kinds import CONTINUATION, INSIDE, LOWER, SPECIAL, token_kinds

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_FILE, _VOCABULARY, _CONFIG = "tokenizer.json", "vocab.txt", "tokenizer_config.json"


@dataclass(frozen=True)
class Vocabulary:
    """What batches need to know of a tokenizer: V ids, the special ones, which start a word (bool [V]), and of what
    kind each is (uint8 [V], token_kinds.py), without which it is only known where words start.
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
        is_text: NDArray[np.bool_] = self.kinds != SPECIAL
        return is_text

    @property
    def ordinary_ids(self) -> NDArray[np.int64]:
        """All ids but the special ones, ascending: what a masked token may be replaced by."""
        return np.flatnonzero(self.is_text)


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
        and (model["unk_token"], model["continuing_subword_prefix"]) == ("[UNK]", CONTINUATION)
        and model["max_input_chars_per_word"] == MAX_WORD_CHARS
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

    if not name:
        raise UserError("expected a tokenizer, found an empty name: give --tokenizer DIR, or --tokenizer train")
    path = Path(name)
    if path.name == _VOCABULARY and path.is_file():
        tokenizer = _from_vocabulary(path)
    elif path.is_dir() and not (path / _FILE).exists() and (path / _VOCABULARY).exists():
        tokenizer = _from_vocabulary(path / _VOCABULARY)
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
    model = json.loads(tokenizer.to_str())["model"]
    kind = model["type"]
    if kind != "WordPiece" or not any(token.startswith(CONTINUATION) for token in vocab):
        raise UserError(
            f"expected a WordPiece vocabulary with {CONTINUATION} tokens in {name}, found none ({kind}): give another"
        )
    if model["unk_token"] not in vocab:
        raise UserError(
            f"expected an unk_token of the vocabulary in {name}, found {model['unk_token']!r}: give another"
        )
    known = Vocabulary.of(tokenizer)
    tokenizer.post_processor = cls_and_sep(known.cls, known.sep)  # what the model is trained on, whatever it came with
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


def _from_vocabulary(path: Path) -> "Tokenizer":
    """As transformers' BertTokenizer reads vocab.txt, a token a line, and what tokenizer_config.json beside it may say.

    Where nothing says so, a vocabulary without capitals is one of lower case. Raises UserError.
    """
    import json

    from tokenizers import normalizers

    config_path = path.with_name(_CONFIG)
    try:
        tokens = [token.removesuffix("\r") for token in path.read_bytes().decode().removesuffix("\n").split("\n")]
        config = json.loads(config_path.read_bytes()) if config_path.exists() else {}
        said = {name: config.get(name) for name in ("do_lower_case", "strip_accents", "tokenize_chinese_chars")}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot read the tokenizer in {path.parent} ({error}): give another") from None
    if wrong := [name for name, value in said.items() if not isinstance(value, bool | None)]:
        raise UserError(
            f"expected true, false or null as {wrong[0]} in {config_path}, found {said[wrong[0]]!r:.200}: mend it"
        )
    if missing := [token for token in SPECIAL_TOKENS if token not in tokens]:
        raise UserError(f"expected {' '.join(SPECIAL_TOKENS)} in {path}, found no {' '.join(missing)}: give another")
    if repeated := [token for token, count in Counter(tokens).items() if count > 1]:
        raise UserError(f"expected each token once in {path}, found {repeated[0]!r} again: give another")
    ordinary = (token for token in tokens if not (token.startswith("[") and token.endswith("]")))
    folds = (
        all(token == token.lower() for token in ordinary) if said["do_lower_case"] is None else said["do_lower_case"]
    )
    tokenizer = build_tokenizer({token: number for number, token in enumerate(tokens)}, bool(folds), bool(folds))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=bool(folds),
        strip_accents=said["strip_accents"],
        handle_chinese_chars=said["tokenize_chinese_chars"] is not False,
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
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
    return np.array([not token.startswith(CONTINUATION) for token in vocabulary_of(tokenizer)])


def normalizer_of(tokenizer: "Tokenizer") -> str:
    """The normaliser as JSON: what folding.py takes."""
    import json

    return json.dumps(json.loads(tokenizer.to_str())["normalizer"], sort_keys=True)


def vocabulary_of(tokenizer: "Tokenizer") -> list[str]:
    """The tokens in the order of their ids."""
    vocab = tokenizer.get_vocab()
    return sorted(vocab, key=vocab.__getitem__)


def _special_id(tokenizer: "Tokenizer", token: str) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise UserError(f"the tokenizer has no {token} token; BERT needs {' '.join(SPECIAL_TOKENS)}")
    return int(number)
