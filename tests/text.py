"""Made-up English for tests: sentences of a small grammar, documents apart by an empty line."""

import random
from pathlib import Path

_SUBJECTS = ["the cat", "a dog", "my sister", "the old king", "every president", "no house", "the river", "a bird"]
_VERBS = ["sees", "has", "wants", "remembers", "builds", "follows", "forgets", "keeps"]
_OBJECTS = ["a big tree", "the open road", "two letters", "its shadow", "an answer", "winter", "bread and salt"]
_ENDS = ["", " in the morning", " after the war", " without a word", " again and again"]


def write_corpus(path: Path, num_documents: int, seed: int = 0) -> None:
    """Documents of 6 to 14 sentences, one per line."""
    rng = random.Random(seed)
    documents = []
    for _ in range(num_documents):
        pick = [rng.choice(_SUBJECTS) for _ in range(2)]  # a document has two heroes, so that NSP can be learnt
        documents.append(
            "\n".join(
                f"{rng.choice(pick)} {rng.choice(_VERBS)} {rng.choice(_OBJECTS)}{rng.choice(_ENDS)}."
                for _ in range(rng.randint(6, 14))
            )
        )
    path.write_text("\n\n".join(documents) + "\n")
