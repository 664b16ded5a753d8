"""A small prepared corpus: 60 documents of made-up sentences, in train and validation."""

import random
from pathlib import Path

import pytest

from dsbert.data.preparing.prepare import prepare

VOCAB_SIZE = 300
_SYLLABLES = ["ba", "ko", "lim", "tor", "en", "sha", "vi", "dru", "mo", "pel", "qua", "zi"]


def make_text(documents: int, seed: int = 0, longest: int = 30) -> str:
    """Documents of 1 to 12 sentences of 3 to `longest` words; some sentences exceed a sample of 32 tokens."""
    rng = random.Random(seed)

    def word() -> str:
        return "".join(rng.choices(_SYLLABLES, k=rng.randint(1, 3)))

    def sentence() -> str:
        return " ".join(word() for _ in range(rng.randint(3, longest))).capitalize() + "."

    return "\n\n".join("\n".join(sentence() for _ in range(rng.randint(1, 12))) for _ in range(documents)) + "\n"


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(make_text(60))
    return path


@pytest.fixture(scope="session")
def data_dir(corpus_file: Path) -> Path:
    """Shared by all tests: read it, never change it."""
    target = corpus_file.parent / "data"
    prepare([str(corpus_file)], target, VOCAB_SIZE, validation=0.2)
    return target
