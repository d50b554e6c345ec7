"""Who a user of an image is, by its /etc/passwd and /etc/group."""

from __future__ import annotations

import pytest

from systemfiles.recipes.accounts import Account, find_account

PASSWD = (
    "root:x:0:0:root:/root:/bin/sh\n\nweb:x:1000:1001::/home/web:/bin/sh\n77:x:5:6\nodd:x:many:1::/:\nbad:x:9:-1::/:"
)
GROUP = "root:x:0:\nstaff:x:50:root,web\nweb:x:1001:\nlogs:x:2000:nobody,web\nnone:x:many:web\nweb2:x:3:webber"


@pytest.mark.parametrize(
    ("user", "account"),
    [
        ("", Account(0, 0, frozenset({0, 50}), "/root")),
        ("web", Account(1000, 1001, frozenset({1001, 50, 2000}), "/home/web")),
        ("1000", Account(1000, 1001, frozenset({1001, 50, 2000}), "/home/web")),
        ("77", Account(5, 6, frozenset({6}), "/")),
        ("web:logs", Account(1000, 2000, frozenset(), "/home/web")),
        ("web:7", Account(1000, 7, frozenset(), "/home/web")),
        ("4321", Account(4321, 0, frozenset(), "/")),
        ("4321:logs", Account(4321, 2000, frozenset(), "/")),
        ("nobody", None),
        ("web:wheel", None),
        ("web:", None),
        ("odd", None),
        ("bad", None),
        ("-1", None),
        ("4294967295", None),
        ("9" * 5000, None),
        ("\N{SUPERSCRIPT TWO}", None),
    ],
)
def test_a_user_is_found_by_name_or_number(user: str, account: Account | None) -> None:
    assert find_account(user, PASSWD, GROUP) == account


@pytest.mark.parametrize(("user", "home"), [("", "/root"), ("0", "/root"), ("7", "/")])
def test_an_image_without_these_files_has_numbers_alone(user: str, home: str) -> None:
    assert find_account(user, "", "") == Account(int(user or 0), 0, frozenset(), home)
