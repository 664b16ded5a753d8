"""Small files that people write: recipes in YAML 1.2, DeepSpeed's JSON. What two readers could take for two things is
refused: a key that stands twice, numbers that are none.

PyYAML finds the structure. Its own reading of plain words is YAML 1.1's, for which `10:00` is 600, `0100` is 64 and
`on` is true. Here it is YAML 1.2's core schema, without tags.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from dsbert.base.errors import UserError
from dsbert.config.complaints import shown

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NO_NUMBER = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]")
_NO_TEXT = re.compile("[\\0\ud800-\udfff]")
# Far beyond any recipe; within these bounds reading takes a second at most, whatever is in it.
_MAX_BYTES = 64_000
_MAX_VALUES = 5_000  # with what aliases repeat
_MAX_DEPTH = 32
_MAX_DIGITS = 40

Lines = dict[tuple[str, ...], int]


class DocumentError(ValueError):
    """What was found instead, in one line. line: where, from 1; None if that is not known."""

    def __init__(self, found: str, line: int | None = None) -> None:
        super().__init__(found if line is None else f"line {line}: {found}")
        self.found = found


def read_document(path: Path) -> str:
    """The text of a small regular file, without waiting for a pipe or a device.

    Raises FileNotFoundError where nothing is, DocumentError for all else.
    """
    try:
        if not path.is_file():
            raise DocumentError("something that is no regular file") if path.exists() else FileNotFoundError
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise DocumentError(f"{size} bytes, which is no file of this kind")
        content = path.read_bytes()
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DocumentError(error.strerror or str(error)) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DocumentError(f"the byte {error.object[error.start]:#04x}, which is not UTF-8", line) from None


def read_mapping(path: Path, what: str) -> tuple[dict[str, Any], Lines]:
    """The keys of a YAML file, with the line of each. what: the file is to be, for people, as "a recipe".

    Raises FileNotFoundError where nothing is, UserError, one line, for all else.
    """
    try:
        values, lines = load_yaml(read_document(path))
    except DocumentError as error:
        raise UserError(f"expected {what} in YAML in {path}, found {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"expected {what}, a mapping of keys, in {path}, found {shown(values)}")
    return values, lines


def load_json(text: str) -> Any:
    """Strict JSON: every key once, and finite numbers. Raises DocumentError."""
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_finite, parse_float=_finite, parse_int=_whole)
    except json.JSONDecodeError as error:
        hint = " (JSON has no comments)" if text[error.pos : error.pos + 1] in ("/", "#") else ""
        raise DocumentError(f"{error.msg}{hint}", error.lineno) from None
    except RecursionError:
        raise DocumentError("too many levels") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise DocumentError(f"the key {key!r} twice: keep one")
        values[key] = value
    return values


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise DocumentError(f"the number {text}, which is not finite")
    return number


def _whole(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise DocumentError(f"a number of {len(text)} digits")
    return int(text)


def load_yaml(text: str) -> tuple[Any, Lines]:
    """The value of a document, and the line of every key by its path. Raises DocumentError."""
    try:
        node = _Composer(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise DocumentError(" ".join(problem.split()), mark.line + 1 if mark else None) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise DocumentError(f"a character that YAML does not allow, U+{ord(text[error.position]):04X}", line) from None
    except DocumentError:
        raise
    except (ValueError, OverflowError):  # an escape such as "\UFFFFFFFF"
        raise DocumentError("an escape that is no character", None) from None
    if node is None:
        return None, {}
    reader = _Reader()
    return reader.value(node, ()), reader.lines


class _Composer(yaml.SafeLoader):
    """Nodes of a document of bounded size. Their tags, which YAML 1.1 would give to plain words, are not looked at."""

    depth = count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if getattr(event, "tag", None) is not None:
            raise DocumentError(f"the tag {event.tag!r}: leave it out", line)
        if self.depth >= _MAX_DEPTH:
            raise DocumentError(f"more than {_MAX_DEPTH} levels", line)
        if self.count >= _MAX_VALUES:
            raise DocumentError(f"more than {_MAX_VALUES} values", line)
        self.count += 1
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Reader:
    """Nodes to values. An alias is read again wherever it stands, within the same bounds as what is written out."""

    def __init__(self) -> None:
        self.lines: Lines = {}
        self._left = _MAX_VALUES

    def value(self, node: yaml.Node, path: tuple[str, ...]) -> Any:
        self._left -= 1
        if self._left < 0 or len(path) > _MAX_DEPTH:
            raise DocumentError(f"more than {_MAX_VALUES} values, with what aliases repeat", _line(node))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, str(index))) for index, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return _scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: tuple[str, ...]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = _line(key_node)
            key = _scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                raise DocumentError("a key that is no name", line)
            if key == "<<":
                raise DocumentError("a merge key '<<', which YAML 1.2 does not know: write the keys out", line)
            place = (*path, key)
            if key in values:
                raise DocumentError(f"{'.'.join(place)!r} again, after line {self.lines[place]}: keep one", line)
            self.lines[place] = line
            values[key] = self.value(value_node, place)
        return values


def _scalar(node: yaml.ScalarNode) -> Any:
    text: str = node.value
    if node.style is not None:  # quoted, or a block of text
        if _NO_TEXT.search(text):
            raise DocumentError("an escape that is no character of a text", _line(node))
        return text
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _NO_NUMBER.fullmatch(text):
        raise DocumentError(f"the number {text}, which is not finite", _line(node))
    whole = _INT.fullmatch(text)
    if not whole and not _FLOAT.fullmatch(text):
        return text
    if _LEADING_ZERO.match(text):
        raise DocumentError(
            f"the number {text}, octal to some readers and decimal to others: leave out leading zeros, or put text in "
            "quotes",
            _line(node),
        )
    if len(text) > _MAX_DIGITS:
        raise DocumentError(f"a number of {len(text)} digits", _line(node))
    if whole:
        return int(text, 0) if text[1:2] in ("o", "x") else int(text)
    number = float(text)
    if not math.isfinite(number):
        raise DocumentError(f"the number {text}, which is not finite", _line(node))
    return number


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
