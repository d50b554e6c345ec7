"""Pages of assets: newest first, each asset once, whatever comes and goes meanwhile."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from systemfiles.foundation.errors import UsageError
from systemfiles.registry.assets import AssetStatus, AssetType
from systemfiles.registry.query import LARGEST_PAGE, Page, list_assets
from tests.contract.registry.support import World, asset


def pages(world: World, *, size: int, **asked: Any) -> Iterator[Page]:
    token = ""
    while True:
        page = list_assets(world.database, now=1, size=size, token=token, **asked)
        yield page
        if not (token := page.next_token):
            return


def listed(world: World, *, size: int = 3, **asked: Any) -> list[str]:
    return [found.id for page in pages(world, size=size, **asked) for found in page.assets]


@pytest.fixture
def many(world: World) -> World:
    """Assets of three seconds, most of them of one, with ids that collations disagree about."""
    ids = ["a", "B", "b", "A", "ä", "z", "Z", "a-b", "ab", "a_b", "\uff41", "é", "e\u0301", "10", "9", "x/y", "x:y"]
    order = random.Random(1)
    order.shuffle(ids)
    for number, id in enumerate(ids):
        labels = {"arch": "x86_64" if number % 2 else "aarch64", "all": "yes"}
        kind = AssetType.KERNEL if number % 3 else AssetType.INITRD
        world.assets.register(asset(id, at=1000 + number // 14, labels=labels, type=kind))
    return world


def in_order(world: World) -> list[str]:
    rows = world.base.sql("SELECT created_at, id FROM assets")
    return [row[1] for row in sorted(rows, reverse=True)]


@pytest.mark.parametrize("size", [1, 2, 5, 16, 17, 18, LARGEST_PAGE])
def test_every_asset_is_on_one_page_newest_first_and_ties_by_id(many: World, size: int) -> None:
    assert listed(many, size=size) == in_order(many)
    assert listed(many, size=size, labels={"all": "yes"}) == in_order(many)


def test_the_last_page_has_no_token_even_when_it_is_full(many: World) -> None:
    assert [len(page.assets) for page in pages(many, size=17)] == [17]
    assert [(len(page.assets), bool(page.next_token)) for page in pages(many, size=16)] == [(16, True), (1, False)]


def test_no_assets_are_one_empty_page(world: World) -> None:
    assert list_assets(world.database, now=1) == Page((), "")


def test_filters_all_must_hold(many: World) -> None:
    every = {found.id: found for page in pages(many, size=5) for found in page.assets}
    order = in_order(many)
    assert listed(many, type=AssetType.INITRD) == [id for id in order if every[id].type is AssetType.INITRD]
    assert listed(many, status=AssetStatus.ERROR) == []
    labels = {"arch": "x86_64", "all": "yes"}
    assert listed(many, labels=labels) == [id for id in order if every[id].labels == labels]
    both = [id for id in order if every[id].labels == labels and every[id].type is AssetType.KERNEL]
    assert listed(many, labels=labels, type=AssetType.KERNEL, status=AssetStatus.AVAILABLE) == both
    assert both


@pytest.mark.parametrize("labels", [{"arch": "no"}, {"no": "x86_64"}, {"arch": ""}, {"": ""}, {"arch": "X86_64"}])
def test_a_label_that_nothing_has_finds_nothing(many: World, labels: dict[str, str]) -> None:
    assert listed(many, labels=labels) == []
    assert listed(many, labels=labels | {"all": "yes"}) == []


def test_what_comes_and_goes_between_pages_hides_and_repeats_nothing_else(many: World) -> None:
    before = in_order(many)
    seen: list[str] = []
    token, number = "", 0
    while True:
        page = list_assets(many.database, now=1, size=2, token=token)
        seen += [found.id for found in page.assets]
        # the one the token was made from goes, and others come in front of it, behind it and beside it
        many.base.sql("DELETE FROM assets WHERE id = ?", page.assets[-1].id)
        for at in (999, 1000, 1001, 2000):
            many.assets.register(asset(f"new-{at}-{number}", at=at))
        number += 1
        token = page.next_token
        if not token or number > 40:
            break
    assert [id for id in seen if not id.startswith("new")] == before
    assert len(seen) == len({*seen})


@pytest.mark.parametrize("size", [0, -1, LARGEST_PAGE + 1, 10**30])
def test_a_page_of_an_impossible_size_is_refused(world: World, size: int) -> None:
    with pytest.raises(UsageError):
        list_assets(world.database, now=1, size=size)


def made(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    "token",
    [
        "x",
        "!!!!",
        "1",
        " ",
        "\n",
        "é",
        "\0",
        "\ud800",
        "A" * 1_000_000,
        made(None),
        made(1),
        made("ab"),
        made([]),
        made([1]),
        made([1, "a", "b"]),
        made(["1", "a"]),
        made([1.5, "a"]),
        made([True, "a"]),
        made([1, None]),
        made([1 << 63, "a"]),
        made([-(1 << 63) - 1, "a"]),
        made({"0": 1, "1": 2}),
        made([1, "\0"]),
        made([1, "\ud800"]),
        base64.urlsafe_b64encode(b"[1" + b"0" * 5000 + b', "a"]').decode(),
        base64.urlsafe_b64encode(b"[" * 100_000).decode(),
        base64.urlsafe_b64encode(b"\xff\xfe[1,2]").decode(),
        "==",
    ],
)
def test_a_token_that_no_page_came_with_is_refused(many: World, token: str) -> None:
    with pytest.raises(UsageError):
        list_assets(many.database, now=1, token=token)


@pytest.mark.parametrize("token", [made([(1 << 63) - 1, "\U0010fffd"]), made([-(1 << 63) + 1, ""]), made([0, "'--%?"])])
def test_a_token_that_somebody_made_up_reveals_nothing_more(many: World, token: str) -> None:
    found = [found.id for found in list_assets(many.database, now=1, token=token).assets]
    assert found in ([], in_order(many))
