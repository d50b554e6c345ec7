"""Who an image's entrypoint runs as: the user that its configuration names, by its own /etc/passwd and /etc/group.

Source: passwd(5), group(5), and `User` in image-spec, config.md. What these leave open is as the guest contract has it
(the head of the init script).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_OWNER_MAX = (1 << 32) - 2  # the largest number means nobody in particular


@dataclass(frozen=True, slots=True)
class Account:
    """`groups` are the supplementary ones."""

    uid: int
    gid: int
    groups: frozenset[int]
    home: str


def find_account(user: str, passwd: str, group: str) -> Account | None:
    """The account of `user[:group]`, each a name or a number, root without either. None when there can be none."""
    name, colon, wanted = (user or "0").partition(":")
    account = _of_user(name, passwd, group)
    if account is None or not colon:
        return account
    gid = _of_group(wanted, group)
    return None if gid is None else Account(account.uid, gid, frozenset(), account.home)


def _of_user(user: str, passwd: str, group: str) -> Account | None:
    for name, _, uid, gid, _, home, *_ in _entries(passwd, 6):
        if user in (name, uid):
            if _number(uid) is None or (own := _number(gid)) is None:
                return None
            listed = (_number(entry[2]) for entry in _entries(group, 4) if name in entry[3].split(","))
            return Account(int(uid), own, frozenset({own, *(gid for gid in listed if gid is not None)}), home or "/")
    number = _number(user)
    return None if number is None else Account(number, 0, frozenset(), "/" if number else "/root")


def _of_group(wanted: str, group: str) -> int | None:
    for name, _, gid, *_ in _entries(group, 3):
        if wanted in (name, gid):
            return _number(gid)
    return _number(wanted)


def _entries(text: str, fields: int) -> Iterator[list[str]]:
    """The lines of such a file, each with at least so many fields."""
    for line in text.split("\n"):
        entry = line.split(":")
        if line:
            yield entry + [""] * (fields - len(entry))


def _number(text: str) -> int | None:
    """That of an owner."""
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(_OWNER_MAX))):
        return None
    return int(text) if int(text) <= _OWNER_MAX else None
