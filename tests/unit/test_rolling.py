"""The names that rolling versions become: one for each version of a distribution, and always a valid one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from systemfiles.foundation.paths import KERNEL, check_version
from systemfiles.provision.rolling import name_of_version

# Debian policy, section 5.6.12: what a version may hold; upper case occurs in upstream parts
VERSIONS = st.from_regex(r"[0-9A-Za-z][0-9A-Za-z.+:~-]{0,40}", fullmatch=True)


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("6.1.192-2", "6.1.192-2"),
        ("1:1.35.0-4+b7", "1_c1.35.0-4_pb7"),
        ("6.12~rc7-1~bpo12+1", "6.12_trc7-1_tbpo12_p1"),
        ("5.10.0+A", "5.10.0_p_ua"),
    ],
)
def test_a_distributions_version_becomes_part_of_a_name(version: str, name: str) -> None:
    assert name_of_version(version) == name


@given(VERSIONS)
def test_what_it_becomes_is_valid_after_the_name_of_an_entry(version: str) -> None:
    name = f"k-{name_of_version(version)}"
    if len(name) <= 96:
        assert check_version(KERNEL, name) == name


@given(VERSIONS, VERSIONS)
def test_different_versions_never_share_a_name(one: str, other: str) -> None:
    assert (name_of_version(one) == name_of_version(other)) == (one == other)


@given(st.text("+~:_Aaputc-", max_size=5).map(lambda text: text.replace("_", "")), st.data())
def test_not_even_versions_that_look_like_escapes(one: str, data: st.DataObject) -> None:
    other = data.draw(st.permutations(one).map("".join) | st.just(one.swapcase()))
    assert (name_of_version(one) == name_of_version(other)) == (one == other)


def _original(name: str) -> str:
    """The reading of a name, written from its documentation alone."""
    plain, *escaped = name.split("_")
    for part in escaped:
        kind, rest = part[0], part[1:]
        plain += rest[0].upper() + rest[1:] if kind == "u" else {"p": "+", "t": "~", "c": ":"}[kind] + rest
    return plain


@given(VERSIONS)
def test_a_name_can_be_read_back(version: str) -> None:
    assert _original(name_of_version(version)) == version
