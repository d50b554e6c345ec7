"""How the entrypoint starts, what reaches it while it runs, and what is told of its end."""

from __future__ import annotations

from dataclasses import replace

import pytest

from systemfiles.recipes.guestconfig import GuestConfig

from .guest import Host, shell
from .qemu import MACHINES, MICROVM_WITHOUT_ACPI, Q35, VIRT_MMIO, Machine, Outcome

pytestmark = pytest.mark.boot

WHO = """
grep -E '^(Uid|Gid|Groups)' /proc/$$/status | while read -r name first _; do echo "$name $first"; done
echo "groups: $(grep ^Groups /proc/$$/status | cut -f2)"
echo "home: $HOME"
"""
BUSY = """
for i in 1 2 3 4 5; do (sh -c 'sleep 0.1 & exec true' &); done
setsid sh -c 'trap "" TERM HUP INT; while :; do echo >>/busy; sleep 0.05; done' &
trap 'echo got INT' INT
trap 'echo got TERM' TERM
kill -INT 1
kill -TERM 1
sleep 1
left=50 # looks, as children of the busy one are dead for an instant, too
until zombies=$(grep -ls '^State:.Z' /proc/[0-9]*/status); [ -z "$zombies" ] || [ $((left -= 1)) -eq 0 ]; do
    sleep 0.1
done
echo "zombies: $zombies"
kill -KILL $$
"""
TOGETHER = """
round=0 int=0 term=0 left=1
trap 'int=$((int + 1))' INT
trap 'term=$((term + 1))' TERM
while [ $round -lt 60 ] && [ $left -gt 0 ]; do
    round=$((round + 1)) left=100
    kill -INT 1
    kill -TERM 1
    until [ $int -ge $round ] && [ $term -ge $round ] || [ $((left -= 1)) -eq 0 ]; do sleep 0.02; done
done
echo "rounds $round, INT $int, TERM $term"
"""


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_it_runs_as_the_user_of_a_number_and_its_status_is_told(host: Host, machine: Machine) -> None:
    """From a squashfs."""
    outcome = replace(host, root_format="squashfs").run(machine, shell(f"{WHO}exit 1", user="1000"))
    expect_user(outcome, 1000, 1001, {1001, 50, 2000}, "/home/web")
    assert outcome.exit == 1, outcome.console
    assert outcome.errors == ()


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_signals_to_init_reach_it_orphans_are_reaped_and_it_is_told_what_killed_it(
    host: Host, machine: Machine
) -> None:
    """What it leaves running, and busy, does not keep the machine running."""
    outcome = host.run(machine, shell(BUSY))
    assert "zombies: " in outcome.lines, outcome.console
    assert "got INT" in outcome.lines
    assert "got TERM" in outcome.lines
    assert outcome.exit == 137
    assert outcome.errors == ()
    assert outcome.clean


@pytest.mark.parametrize(
    ("user", "uid", "gid", "groups", "home"),
    [
        pytest.param("", 0, 0, {0, 50}, "/root", id="none"),
        pytest.param("root", 0, 0, {0, 50}, "/root", id="root"),
        pytest.param("web:logs", 1000, 2000, set(), "/home/web", id="with-a-group"),
        pytest.param("1000:7", 1000, 7, set(), "/home/web", id="with-a-group-by-number"),
        pytest.param("4321", 4321, 0, set(), "/", id="unknown-by-number"),
        pytest.param("4321:logs", 4321, 2000, set(), "/", id="unknown-with-a-group"),
    ],
)
def test_it_runs_as_who_was_named(host: Host, user: str, uid: int, gid: int, groups: set[int], home: str) -> None:
    expect_user(host.run(MICROVM_WITHOUT_ACPI, shell(WHO, user=user)), uid, gid, groups, home)


def expect_user(outcome: Outcome, uid: int, gid: int, groups: set[int], home: str) -> None:
    assert f"Uid: {uid}" in outcome.lines, outcome.console
    assert f"Gid: {gid}" in outcome.lines
    assert f"home: {home}" in outcome.lines
    (told,) = (line.removeprefix("groups:") for line in outcome.lines if line.startswith("groups:"))
    assert set(map(int, told.split())) == groups
    assert outcome.clean


def test_the_last_user_and_group_need_no_newline(host: Host) -> None:
    machine = MICROVM_WITHOUT_ACPI
    tree = host.tree(machine) | {
        "etc/passwd": (b"web:x:7:8::/srv:/bin/sh", 0o644),
        "etc/group": (b"logs:x:9:web", 0o644),
    }
    expect_user(host.run(machine, shell(WHO, user="web:logs"), tree), 7, 9, set(), "/srv")


def test_ctrl_alt_del_asks_it_to_end_and_resets_nothing(host: Host) -> None:
    outcome = host.run(Q35, shell("cat /proc/sys/kernel/ctrl-alt-del"))
    assert "0" in outcome.lines, outcome.console


def test_a_home_that_is_said_wins_over_the_users(host: Host) -> None:
    outcome = host.run(Q35, shell('echo "$HOME $PATH"', user="web", environment={"PATH": "/bin:/x", "HOME": "/there"}))
    assert "/there /bin:/x" in outcome.lines, outcome.console


def test_its_first_word_is_looked_for_in_the_path_and_left_as_it_is(host: Host) -> None:
    config = GuestConfig(entrypoint=["tool", "x"], environment={"PATH": "/none::/opt/a=b:/bin"}, workdir="/srv")
    tree = host.tree(Q35) | {
        "opt/a=b/tool": b"#! /bin/sh -e\ntr '\\0' '|' </proc/$$/cmdline; echo; readlink /proc/$$/cwd\n"
    }
    outcome = host.run(Q35, config, tree)
    assert "/bin/sh|-e|/opt/a=b/tool|x|" in outcome.lines, outcome.console
    assert "/srv" in outcome.lines
    assert outcome.exit == 0


def test_it_may_end_when_it_is_asked_to(host: Host) -> None:
    outcome = host.run(Q35, shell("trap 'exit 7' TERM; kill -TERM 1; while :; do sleep 0.1; done"))
    assert outcome.exit == 7, outcome.console
    assert outcome.clean


def test_signals_that_come_at_the_same_time_all_reach_it(host: Host) -> None:
    """Again and again, on the machine where init takes longest to look after one of them."""
    outcome = host.run(VIRT_MMIO, shell(TOGETHER))
    assert "rounds 60, INT 60, TERM 60" in outcome.lines, outcome.console
    assert outcome.exit == 0


@pytest.mark.parametrize(("signal", "number"), [("SIGQUIT", 3), ("RTMIN+3", 37)])
def test_it_gets_the_signal_it_asks_for_in_place_of_term(host: Host, signal: str, number: int) -> None:
    script = f"trap 'exit 1' TERM; trap 'exit 9' {number}; kill -TERM 1; while :; do sleep 0.1; done"
    outcome = host.run(Q35, shell(script, stop_signal=signal))
    assert outcome.exit == 9, outcome.console
    assert outcome.clean


def test_it_may_end_everything_it_can_reach(host: Host) -> None:
    outcome = host.run(Q35, shell("kill -TERM -1; echo survived; kill -KILL -1; sleep 1; exit 4"))
    assert "survived" in outcome.lines, outcome.console
    assert outcome.exit in {4, 125}
    assert outcome.clean
