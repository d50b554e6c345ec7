"""Hostile values: kept exactly, or refused by one typed error, and the same in every database."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest

from systemfiles.foundation.errors import AssetNotFound, LeaseNotFound, UsageError
from systemfiles.registry.query import list_assets
from tests.contract.registry.support import STORE, World, asset

KEPT = [
    "",
    " ",
    "'",
    '"',
    "''; DROP TABLE assets; --",
    "%",
    "%s",
    "%(a)s",
    "100%%",
    "?",
    "$1",
    ":a",
    "\\",
    "\\x41",
    "line\nbreak\r\n\ttab",
    "\x01\x1b[31m\x7f\x85",
    "\ufeff\u200b\u202e",
    "\ufffe\uffff\U0010ffff",
    "😀",
    unicodedata.normalize("NFC", "éﬁÅ"),
    unicodedata.normalize("NFD", "éﬁÅ"),
    unicodedata.normalize("NFKC", "éﬁÅ"),
    "NULL",
    "null",
    "{}",
    "0",
    "1e5",
    "0x10",
    " 5 ",
    "t",
]
REFUSED = ["\0", "a\0b", "\ud800", "a\udfff", "\ud83d", "\udcff"]
TEXTS = ("name", "location", "checksum", "created_by", "build_id", "source_image", "version", "tag", "public_url")


@pytest.mark.parametrize("text", KEPT, ids=ascii)
def test_a_text_is_kept_exactly_wherever_it_stands(world: World, text: str) -> None:
    facts: dict[str, Any] = dict.fromkeys((*TEXTS, "assets_db_id"), text)
    stored = asset(
        "a", **facts, tags=(text, text), metadata={text: [text]}, file_info={text: {text: None}}, labels={text: text}
    )
    world.assets.register(stored)
    assert world.assets.get("a", now=1000) == stored
    assert [found.id for found in list_assets(world.database, now=1, labels={text: text}).assets] == ["a"]


@pytest.mark.parametrize("text", [text for text in KEPT if text and text.isprintable()], ids=ascii)
def test_a_text_is_found_again_wherever_it_names_something(world: World, text: str) -> None:
    world.assets.register(asset(text), store_id=text, path=text)
    world.assets.register(asset("other"))
    lease = world.leases.acquire([text], text, now=1000, store_id=text, lease_id=text)
    assert world.assets.get(text, now=1).id == text
    for asked in ({"holder": text}, {"prefix": text}, {"asset_id": text}, {"lease_id": text}, {"store_id": text}):
        assert world.leases.list(now=1000, **asked) == (lease,)
    assert world.leases.renew(text, now=1000, ttl=5).id == text
    world.leases.release(text, now=1000)
    assert world.assets.update(text, now=1, name=text).name == text


def test_a_megabyte_is_kept_where_nothing_is_looked_up_by_it(world: World) -> None:
    big = "ä" * 500_000
    stored = asset("a", name=big, metadata={"big": big}, tags=(big,), source_image=big)
    world.assets.register(stored)
    assert world.assets.get("a", now=1000) == stored


@pytest.mark.parametrize("labels", [{"x": "y" * 1025}, {"x": "ä" * 513}, {"y" * 256: "x"}, {"x": "y" * (1 << 20)}])
def test_labels_that_no_index_could_hold_are_refused(world: World, labels: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        world.assets.register(asset("a", labels=labels))
    assert world.ids() == []


def test_the_largest_names_fit_together(world: World) -> None:
    # numbers of 4 bytes each that no compression makes shorter
    wide = [chr(0x10000 + 7919 * number % 60_000) for number in range(256)]
    id, label, value = "".join(wide[:255]), "".join(wide[:63]), "".join(wide[:256])
    world.assets.register(asset(id, labels={label: value}), store_id="s" * 64, path="p")
    holder = "".join(letter for letter in map(chr, range(0x20000, 0x20100)) if letter.isprintable())[:255]
    lease = world.leases.acquire([id], holder, now=1000, lease_id=holder)
    assert world.leases.list(now=1000, prefix=holder) == (lease,)
    assert [found.id for found in list_assets(world.database, now=1, labels={label: value}).assets] == [id]
    assert len(world.tombstones.delete(id, now=1, force=True)) == 0  # another store has it


@pytest.mark.parametrize("id", ["", "x" * 256, "a\nb", "\x7f", *REFUSED], ids=ascii)
def test_an_id_that_cannot_be_is_refused(world: World, id: str) -> None:
    with pytest.raises(UsageError):
        world.assets.register(asset(id))
    assert world.ids() == []


@pytest.mark.parametrize("text", REFUSED, ids=ascii)
def test_a_text_that_not_every_database_can_keep_is_refused(world: World, text: str) -> None:
    for field in (*TEXTS, "assets_db_id"):
        with pytest.raises(UsageError):
            world.assets.register(asset("a", **{field: text}))
    assert world.ids() == []


@pytest.mark.parametrize("text", REFUSED, ids=ascii)
def test_labels_and_places_are_refused_as_well(world: World, text: str) -> None:
    for labels in ({text: "x"}, {"x": text}):
        with pytest.raises(UsageError):
            world.assets.register(asset("a", labels=labels))
    for store, path in ((text, "x"), ("x", text)):
        with pytest.raises(UsageError):
            world.assets.register(asset("a"), store_id=store, path=path)
    assert world.ids() == []


@pytest.mark.parametrize("text", REFUSED, ids=ascii)
def test_asking_for_what_cannot_be_is_answered_and_harms_nothing(world: World, text: str) -> None:
    world.add("a")
    calls: list[Callable[[], object]] = [
        lambda: world.assets.get(text, now=1),
        lambda: world.assets.get(text, now=1, access=False),
        lambda: world.assets.update(text, now=1, name="x"),
        lambda: world.leases.acquire([text], "vm", now=1),
        lambda: world.leases.acquire(["a"], "vm", now=1, store_id=text),
        lambda: world.leases.renew(text, now=1),
        lambda: world.leases.release(text, now=1),
        lambda: world.leases.list(now=1, holder=text),
        lambda: world.leases.list(now=1, prefix=text),
        lambda: world.tombstones.delete(text, now=1),
        lambda: world.tombstones.condemn([text], reason="", now=1),
        lambda: world.tombstones.condemn(["a"], reason=text, now=1),
        lambda: world.tombstones.drop([text]),
        lambda: list_assets(world.database, now=1, labels={text: "x"}),
        lambda: list_assets(world.database, now=1, labels={"a": text, "b": "x"}),
    ]
    for call in calls:
        with pytest.raises((UsageError, AssetNotFound, LeaseNotFound)):
            call()
    assert world.ids() == ["a"]
    world.leases.release(world.leases.acquire(["a"], "vm", now=1).id, now=1)


@pytest.mark.parametrize("name", ["size_bytes", "created_at", "last_accessed_at"])
def test_a_number_that_is_none_or_too_big_is_refused(world: World, name: str) -> None:
    for value in (1 << 63, -(1 << 64), 10**5000, 1.5, True, None, "1", b"1"):
        with pytest.raises(UsageError):
            world.assets.register(asset("a", **{name: value}))
    assert world.ids() == []


def test_a_negative_size_is_refused_and_the_biggest_is_kept(world: World) -> None:
    with pytest.raises(UsageError):
        world.assets.register(asset("a", size_bytes=-1))
    world.assets.register(asset("a", size_bytes=(1 << 63) - 1))
    assert world.assets.get("a", now=1).size_bytes == (1 << 63) - 1
    with pytest.raises(UsageError):
        world.assets.update("a", now=1, size_bytes=-1)


def test_times_before_1970_are_kept(world: World) -> None:
    world.assets.register(asset("a", at=-5))
    assert world.assets.get("a", now=-10).created_at == -5


def circular() -> dict[str, Any]:
    loop: dict[str, Any] = {}
    loop["self"] = loop
    return loop


def deep() -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for _ in range(100_000):
        nested = {"a": nested}
    return nested


def test_what_json_would_not_give_back_is_refused(world: World) -> None:
    values = (
        *({1: "a"}, {None: 1}, {"a": 1, 2: 3}, {"a": (1, 2)}, {"a": {1, 2}}, {"a": b"x"}, {"a": object()}),
        *({"a": float("nan")}, {"a": [float("inf")]}, {"a": 10**5000}, circular(), deep(), {"a": "\ud800"}),
        *("text", ["list"], None, 5),
    )
    for name in ("metadata", "file_info"):
        for value in values:
            with pytest.raises(UsageError):
                world.assets.register(asset("a", **{name: value}))
    assert world.ids() == []


@pytest.mark.parametrize("tags", ["text", [1], [None], [["a"]], 5, None, ["\ud800"], {"a": "b"}], ids=repr)
def test_tags_are_texts(world: World, tags: object) -> None:
    if tags == {"a": "b"}:  # its keys are
        world.assets.register(asset("a", tags=tags))
        assert world.assets.get("a", now=1).tags == ("a",)
        return
    with pytest.raises(UsageError):
        world.assets.register(asset("a", tags=tags))


def test_json_is_kept_as_it_was(world: World) -> None:
    value: dict[str, Any] = {
        "b": [1, 1.0, -0.0, 1e300, 10**30, True, None, "\0", "ä😀", {}],
        "a": {"z": 1, "a": [[]]},
        "": "",
    }
    world.assets.register(asset("a", metadata=value))
    kept = world.assets.get("a", now=1).metadata
    assert json.dumps(kept, sort_keys=True) == json.dumps(value, sort_keys=True)


@pytest.mark.parametrize(("name", "value"), [("type", "potato"), ("status", ""), ("backend", None), ("type", "KERNEL")])
def test_a_kind_that_does_not_exist_is_refused(world: World, name: str, value: object) -> None:
    with pytest.raises(UsageError):
        world.assets.register(asset("a", **{name: value}))
    world.assets.register(asset("b"))
    with pytest.raises(UsageError):
        world.assets.update("b", now=1, **{name: value})


@pytest.mark.parametrize("value", [None, 5, b"x", ["a"]], ids=repr)
def test_what_is_no_text_is_refused(world: World, value: object) -> None:
    for field in (*TEXTS, "assets_db_id"):
        with pytest.raises(UsageError):
            world.assets.register(asset("a", **{field: value}))
    assert world.ids() == []


@pytest.mark.parametrize("labels", [{"a": 1}, {1: "a"}, {"a": None}, {"a": b"x"}], ids=repr)
def test_labels_are_texts(world: World, labels: Any) -> None:
    with pytest.raises(UsageError):
        world.assets.register(asset("a", labels=labels))
    assert world.ids() == []


def test_asking_with_hostile_times_is_refused_or_answered(world: World) -> None:
    world.add("a")
    with pytest.raises(UsageError):
        world.leases.acquire(["a"], "vm", now=1e30)
    with pytest.raises(UsageError):
        world.assets.get("a", now=1 << 64)
    assert world.leases.list(now=-1e9) == ()
    assert world.tombstones.condemn(["a"], reason="", now=1, unused_since=-(1 << 62)) == ()
    assert world.assets.register(asset("b"), store_id=STORE, path="p").id == "b"
