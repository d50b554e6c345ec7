"""Layers: what is in them is not what an initrd may hold."""

from __future__ import annotations

import lzma
import tarfile

import pytest

from systemfiles.foundation.errors import InvalidArchive
from tests.contract.hostile.bombs import gzip_bomb, zstd_bomb
from tests.contract.hostile.images import registry_has
from tests.contract.hostile.world import BUSYBOX, HTML, ROOT, TAG, Check, Row, World, an_initrd, run_row
from tests.unit.test_layers import directory, file, hardlink, symlink, tar
from tests.unit.test_layers import member as tar_member


def layers(*archives: bytes) -> Check:
    """An image of a good root and these layers over it."""
    return registry_has(lambda registry: registry.add_image(ROOT, *archives, tags=[TAG]))


def with_path(name: str) -> bytes:
    """A layer with a name that only an extended header can hold."""
    info, data = file("a", b"x")
    info.pax_headers = {"path": name}
    return tar((info, data))


def nothing_outside(world: World) -> None:
    assert {path.name for path in world.base.iterdir()} <= {"data", "versions.toml", "certificate.pem", "key.pem"}


def made(names: dict[str, str], *others: str) -> Check:
    """That the initrd has these names and types (what a listing begins with: d, -, l, c, p), and none of `others`."""

    def check(world: World) -> None:
        nothing_outside(world)
        assert {name: world.made.get(name, "")[:1] for name in names} == names
        assert not set(others) & set(world.made)
        assert not [name for name in world.made if name.startswith("/") or ".." in name.split("/")]
        assert not [name for name, mode in world.made.items() if mode.startswith("b")]

    return check


LAYERS = [
    *(
        Row(f"a layer with {what}", an_initrd, layers(archive), InvalidArchive, says, {}, nothing_outside)
        for what, archive, says in (
            ("a name with ..", tar(file("../../evil", b"x")), ["escapes"]),
            ("a name that ends with ..", tar(directory("a/..")), ["escapes"]),
            ("a hard link out of it", tar(hardlink("a", "../../etc/passwd")), ["escapes"]),
            ("a hard link to nothing", tar(hardlink("a", "etc/passwd")), ["hard link"]),
            ("a file in a file", tar(file("bin/busybox/x")), ["no directory"]),
            ("links in a circle", tar(symlink("a", "b"), symlink("b", "a"), file("a/x")), ["too many"]),
            ("a whiteout of nothing", tar(file("a/.wh..")), ["whiteout"]),
            ("files in a whiteout", tar(file(".wh.bin/busybox")), ["whiteout"]),
            ("a NUL in a name", with_path("a\0b"), ["escapes"]),
            ("a sparse file", tar(tar_member("a", tarfile.GNUTYPE_SPARSE)), []),
            ("a bomb in gzip", gzip_bomb(24 << 20), ["200 times"]),
            ("a bomb in zstd", zstd_bomb(24 << 20), ["200 times"]),
            ("an archive in xz", lzma.compress(tar(file("a"))), []),
            ("a page", HTML * 100, []),
            ("nothing", b"", []),
        )
    ),
    *(
        Row(f"a layer with {what}", an_initrd, layers(archive), then=then)
        for what, archive, then in (
            ("absolute names", tar(file("/etc/evil", b"x")), made({"etc": "d", "etc/evil": "-", "bin/busybox": "-"})),
            (
                "a directory that is a link out of it",
                tar(symlink("out", "/../../.."), file("out/evil", b"x")),
                made({"out": "l", "evil": "-"}, "out/evil"),
            ),
            (
                "device nodes",
                tar(tar_member("dev/sda", tarfile.BLKTYPE), tar_member("p", tarfile.FIFOTYPE), file("z")),
                made({"z": "-", "dev/null": "c"}, "dev/sda", "p"),
            ),
            (
                "a name twice",
                tar(file("a", b"1"), symlink("a", "/etc"), file("a", b"2"), symlink("b", "a")),
                made({"a": "-", "b": "l", "etc": "d"}),
            ),
            ("a newline in a name", tar(file("a\nb", b"x")), made({"a\nb": "-"}, "a")),
            (
                "a whiteout of what is not there",
                tar(file("no/such/.wh.x"), file(".wh.y"), file("z")),
                made({"z": "-", "bin/busybox": "-"}, "no/such/.wh.x", ".wh.y", "y"),
            ),
            (
                "a whiteout of what is there",
                tar(file("bin/.wh.sh"), file(".wh.etc"), file("z")),
                made({"z": "-", "bin/busybox": "-"}, "bin/.wh.sh", ".wh.etc"),
            ),
            (
                "an opaque directory",
                tar(file("bin/.wh..wh..opq"), file("bin/busybox", BUSYBOX, mode=0o755)),
                made({"bin/busybox": "-"}, "bin/.wh..wh..opq"),
            ),
        )
    ),
    Row("a layer that removes busybox", an_initrd, layers(tar(file("bin/.wh.busybox"))), InvalidArchive, ["busybox"]),
    Row("a layer that hides everything", an_initrd, layers(tar(file(".wh..wh..opq"))), InvalidArchive, ["busybox"]),
]


@pytest.mark.parametrize("row", LAYERS, ids=str)
def test_an_origin_may_do_what_it_wants(row: Row, world: World) -> None:
    run_row(row, world)
