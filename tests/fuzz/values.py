"""JSON that is almost right: a sound text's values, changed as values, written by a writer that knows no rules."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from tests.fuzz.mutations import edited

_MOST_EDITS = 3
_HEX = "ab" * 32
# around where parsers give up: 200 for pydantic's, the interpreter's limit of 1000 frames for Python's
_DEPTHS = (3, 60, 190, 201, 900, *range(940, 1000, 5), 100_000)
_VALUES: tuple[object, ...] = (
    *(None, True, False, [], {}, [[]], [None], {"": None}, [{}], ["a", 1], [["a", "b"]], {"a": {"a": {}}}),
    *(0, 1, 2, -1, 1.5, 1e308, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400, 10**4000),
    *(math.nan, math.inf, -0.0),
    *("", " ", ".", "..", "../../etc/passwd", "/", "a/b", "a\0b", "\ud800", "\udcff", "ü", "\x1b[2J", "a" * 5000),
    *(_HEX, f"sha256:{_HEX}", f"sha512:{_HEX}{_HEX}", f"sha256:{'AB' * 32}", "sha256:../../x", f"sha256:{_HEX}\n"),
)
_TEXTS = (
    *("1e999", "-", "01", "1" * 5000, "-" + "9" * 4300, "nul", "'a'", '"\t"', '"\\ud800"', '"\\u0000"', '"\\', '"'),
    *("{", "}", "[1,]", '{"a":1,}', "/**/1", "", "\ufeff1", '"\\ud83d\\ude00"', "-Infinity", '"\ud800"'),
)


@dataclass(slots=True)
class Text:
    """Put in as it is, whether it is JSON or not."""

    text: str


@dataclass(slots=True)
class Array:
    items: list[Node]


@dataclass(slots=True)
class Object:
    """Keys may be there twice."""

    items: list[tuple[str, Node]]


Node = Text | Array | Object


def json_texts(samples: Sequence[object], *, words: Sequence[str] = ()) -> st.SearchStrategy[bytes]:
    """The JSON text of one of `samples` with values of wrong types and sizes, with keys gone, twice, or other ones.

    `words` are keys and values that mean something to the parser.
    """
    return _json_texts(tuple(samples), tuple(words))


@st.composite
def _json_texts(draw: st.DrawFn, samples: tuple[object, ...], words: tuple[str, ...]) -> bytes:
    root = Array([_node(draw(st.sampled_from(samples)))])  # so that the whole value is a part, too
    for _ in range(draw(st.integers(0, _MOST_EDITS))):
        _change(draw, root, samples, words)
    data = ",".join(map(_written, root.items)).encode("utf-8", "surrogatepass")
    return edited(draw, data) if draw(st.integers(0, 9)) == 0 else data


def _node(value: object) -> Node:
    if isinstance(value, dict):
        return Object([(key, _node(item)) for key, item in value.items()])
    if isinstance(value, list | tuple):
        return Array([_node(item) for item in value])
    try:
        return Text(json.dumps(value))
    except ValueError:  # more digits than Python writes
        return Text("9" * 4301)


def _written(node: Node) -> str:
    match node:
        case Text(text):
            return text
        case Array(items):
            return f"[{','.join(map(_written, items))}]"
        case Object(pairs):
            return "{" + ",".join(f"{json.dumps(key)}:{_written(item)}" for key, item in pairs) + "}"


def _parts(node: Node) -> Iterator[tuple[Array | Object, int]]:
    """Every place inside `node`: what it is in, and at which index."""
    if isinstance(node, Text):
        return
    for index, item in enumerate(node.items):
        yield node, index
        yield from _parts(item if isinstance(item, Text | Array | Object) else item[1])


def _change(draw: st.DrawFn, root: Array, samples: tuple[object, ...], words: tuple[str, ...]) -> None:
    places = [*_parts(root)]
    if not places:
        return
    owner, index = draw(st.sampled_from(places))
    operation = draw(st.integers(0, 9))
    if operation == 0:
        del owner.items[index]
    elif operation == 1:
        owner.items.insert(index, owner.items[index])  # type: ignore[arg-type]
    elif operation == 2 and isinstance(owner, Object):
        keys = [key for place, n in places if isinstance(place, Object) for key in (place.items[n][0],)]
        owner.items[index] = (draw(st.sampled_from((*keys, *words, *_KEYS))), owner.items[index][1])
    elif operation == 3 and isinstance(owner, Object):
        owner.items.append((draw(st.sampled_from((*words, *_KEYS))), _junk(draw, samples, words)))
    elif isinstance(owner, Object):
        owner.items[index] = (owner.items[index][0], _junk(draw, samples, words))
    else:
        owner.items[index] = _junk(draw, samples, words)


_KEYS = ("", "a", "\ud800", "a\0", "__proto__", "schema", "\n", "a" * 300)


def _junk(draw: st.DrawFn, samples: tuple[object, ...], words: tuple[str, ...]) -> Node:
    """A value out of place."""
    match draw(st.integers(0, 5)):
        case 0:
            return Text(draw(st.sampled_from(_TEXTS)))
        case 1:
            depth = draw(st.sampled_from(_DEPTHS))
            start, end = draw(st.sampled_from((("[", "]"), ('{"a":', "}"), ('[{"":', "}]"))))
            return Text(start * depth + "1" + end * depth)
        case 2 if words:
            return Text(json.dumps(draw(st.sampled_from(words))))
        case 3:  # another part of a sample, where it does not belong
            parts = [*_parts(Array([_node(draw(st.sampled_from(samples)))]))]
            owner, index = draw(st.sampled_from(parts))
            return owner.items[index] if isinstance(owner, Array) else owner.items[index][1]
        case _:
            return _node(draw(st.sampled_from(_VALUES)))
