"""The commands around leases, pins and collection: what they print, what `--json` says, and how they refuse."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest

from systemfiles import cli
from systemfiles.commands.common import say
from tests.retention.conftest import Host
from tests.retention.plain import listing
from tests.retention.world import DAY, put_foreign_image

NAMES = ("--kernel", "k-1", "--initrd", "i-1", "--arch", "x86_64")


class Commands:
    """The command line on one data directory, at the host's own time."""

    def __init__(self, host: Host, capsys: pytest.CaptureFixture[str]) -> None:
        self.host = host
        self._capsys = capsys

    def __call__(self, *words: str, status: int = 0) -> str:
        """What a command prints; on stderr, when it is refused."""
        name, *rest = words
        place = ["--data-dir", str(self.host.data), "--catalog-file", str(self.host.world.catalog)]
        self._capsys.readouterr()
        got = cli.main([name, *place, *rest])
        said = self._capsys.readouterr()
        assert (got, said.err == "") == (status, status == 0), said.err
        return said.out if status == 0 else said.err

    def json(self, *words: str) -> Any:
        return json.loads(self(*words, "--json"))


@pytest.fixture
def run(host: Host, capsys: pytest.CaptureFixture[str]) -> Commands:
    host.system.ensure("k-1", "i-1")
    return Commands(host, capsys)


def backdate(host: Host, days: float) -> None:
    """Lets everything be that much older, for commands that know no other clock than the host's."""
    host.system.holdings.registry.close()
    then = time.time() - days * DAY
    with host.system.holdings.registry.database.writing() as transaction:
        for table, column in (("assets", "last_accessed_at"), ("content_use", "last_used_at")):
            transaction.execute(f"UPDATE {table} SET {column} = {column} - ?", (int(days * DAY),))
    for path in host.data.rglob("*"):
        if "blobs" in path.parts and path.is_file():
            os.utime(path, (then, then))
    for path in host.data.glob("system/*/*/*/artifact.json"):
        record = json.loads(path.read_text())
        record["created_at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(then))
        path.unlink()
        path.write_text(json.dumps(record))
    for path in host.data.glob("system/*/*/*/*"):
        if path.name in ("vmlinux", "initrd"):
            os.utime(path, (then, then))


# --- leases ---


def test_acquiring_prints_the_lease_and_the_paths(run: Commands) -> None:
    lines = run("lease", "acquire", "--holder", "vm-7", *NAMES).splitlines()
    (lease,) = run.host.system.leases("vm-7")
    files = run.host.system.resolve("k-1", "i-1")
    assert lines == [f"lease   {lease.id}", f"kernel  {files.kernel.path}", f"initrd  {files.initrd.path}"]


def test_acquiring_as_json_is_the_lease_and_all_that_is_known_of_the_files(run: Commands) -> None:
    told = run.json("lease", "acquire", "--holder", "vm-7", "--ttl", "3600", *NAMES)
    (lease,) = run.host.system.leases("vm-7")
    files = run.host.system.resolve("k-1", "i-1")
    assert told == {"lease": lease.id, "expires_at": lease.expires_at, **files.to_dict()}
    assert lease.expires_at
    assert 3590 < lease.expires_at - time.time() < 3610


def test_the_list_of_leases_says_who_holds_what_until_when(run: Commands) -> None:
    assert run("lease", "list") == "there are no live leases\n"
    run("lease", "acquire", "--holder", "vm-7", *NAMES)
    run("lease", "acquire", "--holder", "vm-8", "--ttl", "60", *NAMES)
    listed = run("lease", "list")
    assert [
        word for word in ("vm-7", "never", "vm-8", "initrd-i-1-x86_64, kernel-k-1-x86_64") if word not in listed
    ] == []
    told = run.json("lease", "list", "--holder", "vm-8")
    assert [(each["holder"], each["assets"]) for each in told] == [("vm-8", ["initrd-i-1-x86_64", "kernel-k-1-x86_64"])]
    assert told[0]["expires_at"] - told[0]["acquired_at"] in (60, 61)  # the end of a second that has begun
    assert run("lease", "list", "--holder", "vm-9") == "there are no live leases\n"


def test_a_lease_is_renewed_and_released_by_its_id(run: Commands) -> None:
    lease = run.json("lease", "acquire", "--holder", "vm-7", "--ttl", "60", *NAMES)["lease"]
    assert run.json("lease", "renew", lease, "--ttl", "60")["expires_at"] > time.time()
    assert run("lease", "release", lease) == f"lease {lease} is released\n"
    for action in (["renew", "--ttl", "60"], ["release"]):
        assert run("lease", *action, lease, status=1) == f"error: there is no lease '{lease}'\n"


def test_all_leases_of_a_holder_are_released_at_once(run: Commands) -> None:
    for _ in range(2):
        run("lease", "acquire", "--holder", "vm-7", *NAMES)
    assert run("lease", "release", "--holder", "vm-7") == "2 leases of vm-7 released\n"
    assert run("lease", "release", "--holder", "vm-7") == "0 leases of vm-7 released\n"


def test_where_leases_were_lost_no_list_of_them_and_no_forecast_is_taken_for_the_truth(
    run: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    run("lease", "acquire", "--holder", "vm-7", *NAMES)
    run.host.system.holdings.registry.close()
    for path in run.host.data.glob("registry.sqlite*"):
        path.unlink()
    place = ["--data-dir", str(run.host.data)]
    limits = ["--grace", "0", "--keep-last", "0"]
    for words in (["gc", "--explain", "k-1", *limits], ["du"]):
        run.host.clock.advance(60)
        assert cli.main([words[0], *place, "--catalog-file", str(run.host.world.catalog), *words[1:]]) == 0
        assert "nothing is collected until that is accepted" in capsys.readouterr().err
    for words in (["list"], ["list", "--json"], ["release", "--holder", "vm-7"]):
        assert cli.main(["lease", *place, *words]) == 0
        said = capsys.readouterr()
        assert said.out in ("there are no live leases\n", "[]\n", "0 leases of vm-7 released\n")
        assert said.err.startswith("warning: the registry ")
        assert "the leases it had are lost" in said.err
    run("gc", "--accept-lost-leases")
    assert run("lease", "list") == "there are no live leases\n"


def test_where_everything_is_can_be_said_before_the_action_and_behind_it(
    run: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--data-dir", str(run.host.data), "--catalog-file", str(run.host.world.catalog)]
    nowhere = ["--data-dir", str(tmp_path / "nowhere")]
    actions = [["acquire", "--holder", "vm-7", *NAMES], ["list"], ["release", "--holder", "vm-7"]]
    for words in actions:
        assert cli.main(["lease", *words, *place]) == 0
    assert capsys.readouterr().out.endswith("1 lease of vm-7 released\n")
    assert cli.main(["lease", *place, "list"]) == 0
    assert cli.main(["lease", *nowhere, "list", *place]) == 0
    assert cli.main(["lease", *place, "list", *nowhere]) == 1


REFUSED_LEASES: dict[str, tuple[tuple[str, ...], str]] = {
    "what is not here": (
        ("acquire", "--holder", "vm-7", "--kernel", "k-2", "--initrd", "i-1", "--arch", "x86_64"),
        "error: kernel k-2 (x86_64) is not provisioned",
    ),
    "for nobody": (("acquire", "--holder", "", *NAMES), "error: '' cannot be the holder of a lease"),
    "for what looks like a pin": (("acquire", "--holder", "pin:x", *NAMES), "cannot be the holder of a lease"),
    "for less than no time": (("acquire", "--holder", "vm-7", "--ttl", "-5", *NAMES), "error: no lease can be"),
    "of a pin": (("release", "--holder", "pin:x"), "error: pin:x is a pin"),
}


@pytest.mark.parametrize("name", REFUSED_LEASES)
def test_no_lease_is_had(run: Commands, name: str) -> None:
    words, said = REFUSED_LEASES[name]
    assert said in run("lease", *words, status=1)
    assert run.host.system.leases() == ()


# --- pins ---


def test_pinning_and_unpinning_say_what_they_did(run: Commands) -> None:
    pin = ("pin", "snapshot-42", *NAMES, "--hypervisor", "v49.0", "--label", "a=b", "--label", "c=d=e")
    for _ in range(2):
        assert run(*pin) == "snapshot-42 holds kernel k-1 and initrd i-1 (x86_64)\n"
    told = run.json(*pin)
    assert told.keys() == {"schema", "name", "created_at", "hypervisor", "labels", "kernel", "initrd"}
    assert (told["hypervisor"], told["labels"]) == ("v49.0", {"a": "b", "c": "d=e"})
    assert "record" not in told["kernel"]
    assert run.json("pins") == [told]
    listed = run("pins")
    assert [word for word in ("snapshot-42", "k-1", "i-1", "v49.0", told["created_at"]) if word not in listed] == []
    assert run("unpin", "snapshot-42") == "snapshot-42 holds nothing any more\n"
    assert run("pins") == "nothing is pinned\n"


REFUSED_PINS: dict[str, tuple[tuple[str, ...], str]] = {
    "another hypervisor": (("pin", "taken", *NAMES, "--hypervisor", "v50.0"), "error: pin taken names other files"),
    "another kernel": (
        ("pin", "taken", "--kernel", "k-2", "--initrd", "i-1", "--arch", "x86_64", "--hypervisor", "v49.0"),
        "k-1 (x86_64) is recorded, k-2 (x86_64) was given",
    ),
    "a bad name": (("pin", "../x", *NAMES), "error: '../x' cannot be the name of a pin"),
    "a bad label": (("pin", "new", *NAMES, "--label", "x"), "error: --label 'x' is no KEY=VALUE"),
    "what is not here": (
        ("pin", "new", "--kernel", "k-3", "--initrd", "i-1", "--arch", "x86_64"),
        "is not provisioned",
    ),
    "unpin of nothing": (("unpin", "nothing"), "error: there is no pin 'nothing'"),
    "restore of nothing": (("restore", "nothing"), "error: there is no pin 'nothing'"),
    "restore for another hypervisor": (
        ("restore", "taken", "--hypervisor", "v50.0"),
        "v49.0 is recorded, v50.0 was given",
    ),
}


@pytest.mark.parametrize("name", REFUSED_PINS)
def test_a_pin_is_refused_that_is_another_or_none(run: Commands, name: str) -> None:
    run.host.system.ensure("k-2", "i-1")
    run("pin", "taken", *NAMES, "--hypervisor", "v49.0")
    words, said = REFUSED_PINS[name]
    assert said in run(*words, status=1)
    assert [pin["name"] for pin in run.json("pins")] == ["taken"]


def test_restoring_prints_the_paths_and_brings_back_what_is_gone(run: Commands) -> None:
    files = run.host.system.resolve("k-1", "i-1")
    run("pin", "snapshot-42", *NAMES)
    shutil.rmtree(run.host.data / "system" / "kernel")
    assert run("restore", "snapshot-42", "--full") == f"kernel  {files.kernel.path}\ninitrd  {files.initrd.path}\n"
    assert run.json("restore", "snapshot-42") == files.to_dict()


def test_a_damaged_pin_is_told_of_by_all_who_need_it(run: Commands) -> None:
    run("pin", "snapshot-42", *NAMES)
    (run.host.system.paths.pins / "snapshot-42.json").write_text("{")
    for words in (("pins",), ("restore", "snapshot-42"), ("gc",), ("gc", "--dry-run"), ("du",)):
        said = run(*words, status=1)
        assert said.startswith("error: the pin /")
        assert "is damaged\n  hint  restore it from a backup" in said


def test_one_damaged_pin_hides_no_other_and_can_be_ended(run: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "bad", "c"):
        run("pin", name, *NAMES)
    sound = [pin for pin in run.json("pins") if pin["name"] != "bad"]
    (run.host.system.paths.pins / "bad.json").write_text("{")
    (run.host.system.paths.pins / "no pin.json").write_text("{}")
    place = ["--data-dir", str(run.host.data), "--catalog-file", str(run.host.world.catalog)]
    assert cli.main(["pins", *place]) == 1
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines()[-2:]] == ["a", "c"]
    assert said.err.count("error: ") == 2
    assert "or end it: systemfiles unpin bad;" in said.err
    assert "no pin.json is no pin" in said.err
    assert cli.main(["pins", "--json", *place]) == 1
    assert json.loads(capsys.readouterr().out) == sound
    run("unpin", "bad")
    (run.host.system.paths.pins / "no pin.json").unlink()
    assert run.json("pins") == sound


# --- collection ---


def test_a_collection_says_what_went_why_and_who_last_held_it(run: Commands) -> None:
    run.host.system.acquire(run.host.system.resolve("k-1", "i-1"), holder="vm-7").release()
    backdate(run.host, 10)
    foretold = run("gc", "--dry-run", "--keep-last", "0")
    assert "would go: kernel-k-1-x86_64 (held by nothing; last held by vm-7)\n" in foretold
    assert foretold.endswith(" would be freed\n")
    done = run("gc", "--keep-last", "0").replace("removed", "would go").replace("freed", "would be freed")
    assert sorted(done.splitlines()) == sorted(foretold.splitlines())
    assert run("gc", "--keep-last", "0") == "nothing to collect\n"
    assert run.json("gc", "--dry-run") == {"gone": [], "count": 0, "bytes_freed": 0, "problems": []}


def test_a_collection_as_json_says_the_same(run: Commands) -> None:
    backdate(run.host, 10)
    foretold, told = run.json("gc", "--dry-run", "--keep-last", "0"), run.json("gc", "--keep-last", "0")
    by_name = [sorted(each.pop("gone"), key=lambda gone: str(gone["what"])) for each in (foretold, told)]
    assert by_name[0] == by_name[1]
    assert foretold == told
    assert by_name[0][-1] == {"what": "kernel-k-1-x86_64", "why": "held by nothing", "last_held_by": "", "size": 9352}


LIMITS: dict[str, tuple[tuple[str, ...], bool]] = {
    "by default the newest two stay": ((), False),
    "the newest": (("--keep-last", "1"), False),
    "none": (("--keep-last", "0"), True),
    "what is younger than a month": (("--keep-last", "0", "--grace", "30d"), False),
    "what is younger than a week": (("--keep-last", "0", "--grace", "7d"), True),
    "what is younger than some hours": (("--keep-last", "0", "--grace", "200h"), True),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits_are_given_on_the_command_line(run: Commands, name: str) -> None:
    words, goes = LIMITS[name]
    backdate(run.host, 10)
    assert ("kernel-k-1-x86_64" in run("gc", "--dry-run", *words)) is goes
    said = run("gc", "--explain", "k-1", *words)
    assert ("would go: held by nothing" in said) is goes


def test_limits_are_in_the_catalog(run: Commands, tmp_path: Path) -> None:
    backdate(run.host, 10)
    catalog = tmp_path / "limits.toml"
    catalog.write_text(run.host.world.catalog.read_text() + "[retention]\ngrace = 864000000\nkeep_last = 0\n")
    place = ["--data-dir", str(run.host.data), "--catalog-file", str(catalog)]
    assert cli.main(["gc", *place]) == 0
    assert run.host.plain.things().keys() == {"kernel-k-1-x86_64", "initrd-i-1-x86_64"}
    assert cli.main(["gc", *place, "--grace", "1d"]) == 0
    assert run.host.plain.things().keys() == set()


MISTYPED = (
    *(("gc",), ("gc", "--accept-lost-leases"), ("unpin", "x"), ("lease", "list")),
    *(("lease", "release", "x"), ("lease", "release", "--holder", "x"), ("lease", "renew", "x", "--ttl", "5")),
)


@pytest.mark.parametrize("words", MISTYPED, ids=" ".join)
def test_a_mistyped_data_directory_is_told_and_not_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    place = tmp_path / "mistyped"
    name, *rest = words
    assert cli.main([name, "--data-dir", str(place), *rest]) == 1
    assert f"nothing was ever provisioned in {place}" in capsys.readouterr().err
    assert not place.exists()


def test_images_go_when_there_is_too_much_of_them(run: Commands) -> None:
    run.host.system.image(run.host.world.images[0])
    backdate(run.host, 10)
    assert "guest-0" not in run("gc", "--dry-run", "--max-cache-bytes", "1M")
    assert "guest-0" in run("gc", "--max-cache-bytes", "10K")
    assert [path for path in run.host.plain.blobs.iterdir() if path.stat().st_size >= 20_000] == []


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "a time": (("--grace", "soon"), "error: 'soon' is no time"),
    "a size": (("--max-cache-bytes", "much"), "error: 'much' is no size"),
    "a number": (("--keep-last", "-1"), "error: keep_last: Input should be greater than or equal to 0"),
    "a dry run of an explanation": (("--explain", "k-1", "--dry-run"), "error: --dry-run means nothing to --explain"),
    "a size for an explanation": (
        ("--explain", "k-1", "--max-cache-bytes", "0"),
        "error: --max-cache-bytes means nothing to --explain",
    ),
    "lost leases of an explanation": (
        ("--explain", "k-1", "--accept-lost-leases"),
        "error: --accept-lost-leases means nothing to --explain",
    ),
    "a name": (("--explain", "nobody"), "error: nothing here is called 'nobody'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_before_anything_is_done(run: Commands, name: str) -> None:
    words, said = REFUSED[name]
    run.host.system.holdings.registry.close()
    before = listing(run.host.data)
    assert run("gc", *words, status=1).startswith(said)
    assert listing(run.host.data) == before


def test_why_something_is_kept_is_told(run: Commands) -> None:
    run("pin", "snapshot-42", *NAMES, "--hypervisor", "v49.0")
    put_foreign_image(run.host.data, "theirs", b"a layer")
    day = run.json("pins")[0]["created_at"][:10]
    why = f"kept: pinned by snapshot-42 since {day} (hypervisor v49.0)"
    limits = ("--grace", "0", "--keep-last", "0")
    for subject in ("k-1", "kernel-k-1-x86_64"):
        assert run("gc", "--explain", subject, *limits).startswith(f"kernel-k-1-x86_64\n  {why}\n")
        assert run("gc", "--explain", subject).startswith(f"kernel-k-1-x86_64\n  {why}; one of the 2 newest ")
    assert run("gc", "--explain", "snapshot-42", *limits) == f"kernel-k-1-x86_64\n  {why}\ninitrd-i-1-x86_64\n  {why}\n"
    assert run("gc", "--explain", "theirs") == "theirs in the content store\n  kept: a name that another tool gave\n"
    told = run.json("gc", "--explain", "snapshot-42", *limits)
    assert told[0] == {"what": "kernel-k-1-x86_64", "kept": True, "why": why.removeprefix("kept: ")}


def test_a_lost_registry_is_told_of_with_what_to_do(run: Commands) -> None:
    run("lease", "acquire", "--holder", "vm-7", *NAMES)
    run.host.system.holdings.registry.close()
    for path in run.host.data.glob("registry.sqlite*"):
        path.unlink()
    for words in (("gc", "--dry-run"), ("gc",), ("gc",)):
        said = run(*words, status=1)
        assert "was built again, and the leases it had are lost\n" in said
        assert "then collect once with --accept-lost-leases" in said
    assert run("gc", "--accept-lost-leases", "--grace", "1d") == "nothing to collect\n"
    assert run("gc", "--grace", "1d") == "nothing to collect\n"


def test_a_problem_is_an_error_although_the_rest_is_done(run: Commands) -> None:
    backdate(run.host, 10)
    registry = run.host.system.holdings.registry
    with registry.database.writing() as transaction:
        transaction.execute("UPDATE asset_locations SET path = '../x' WHERE asset_id LIKE 'initrd%'")
    shutil.rmtree(run.host.data / "system" / "initrd")
    said = run("gc", "--keep-last", "0", status=1)
    assert "error: asset 'initrd-i-1-x86_64' is forgotten, and no file removed: '../x' is no path of an asset" in said
    assert run.host.plain.things() == {}


def test_disk_usage_is_a_row_for_each_thing_and_its_reason(run: Commands) -> None:
    run("pin", "snapshot-42", *NAMES)
    put_foreign_image(run.host.data, "theirs", b"a layer")
    said = run("du")
    for words in ("kernel-k-1-x86_64", "pinned by snapshot-42", "theirs", "another tool's name in the content store"):
        assert words in said
    assert said.splitlines()[-1].endswith(" in all, what is shared counted once")
    told = run.json("du")
    assert told["bytes"] == sum(path.stat().st_size for path in run.host.plain.blobs.iterdir())
    assert {each["what"]: each["size"] for each in told["uses"]}["kernel-k-1-x86_64"] == 9352


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_stdout_cannot_encode_is_written_as_an_escape(
    run: Commands, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    say("one \udcff two")
    sys.stdout.flush()
    assert cast("io.BytesIO", sys.stdout.buffer).getvalue() == b"one \\udcff two\n"


@pytest.mark.parametrize("words", [("gc", "--dry-run"), ("du",), ("pins",)], ids=" ".join)
def test_what_only_tells_makes_nothing_where_nothing_is(
    host: Host, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    assert Commands(host, capsys)(*words) in (
        "nothing to collect\n",
        "nothing is here\n0 bytes in all, what is shared counted once\n",
        "nothing is pinned\n",
    )
    assert not host.data.exists()


@pytest.mark.parametrize("words", [("gc", "--dry-run"), ("du",), ("pins",), ("gc", "--explain", "k-1")], ids=" ".join)
def test_what_only_tells_changes_nothing(run: Commands, words: tuple[str, ...]) -> None:
    run("pin", "snapshot-42", *NAMES)
    run.host.system.holdings.registry.close()
    before = listing(run.host.data)
    run(*words)
    assert listing(run.host.data) == before
