"""How the entrypoint starts, what reaches it while it runs, and what is told of its end."""

from __future__ import annotations

import pytest

from systemfiles.recipes.guestconfig import GuestConfig

from .guest import Host, shell
from .qemu import Q35, VIRT, Machine

pytestmark = pytest.mark.boot

WHO = """
grep -E '^(Uid|Gid|Groups)' /proc/$$/status | while read -r name first _; do echo "$name $first"; done
echo "groups: $(grep ^Groups /proc/$$/status | cut -f2)"
echo "home: $HOME"
"""


@pytest.mark.parametrize("machine", [Q35, VIRT], ids=str)
@pytest.mark.parametrize(("script", "status"), [("exit 1", 1), ("kill -KILL $$", 137)])
def test_its_status_is_told(host: Host, machine: Machine, script: str, status: int) -> None:
    outcome = host.run(machine, shell(script))
    assert outcome.exit == status, outcome.console
    assert outcome.errors == ()
    assert outcome.clean


@pytest.mark.parametrize(
    ("user", "uid", "gid", "groups", "home"),
    [
        pytest.param("", 0, 0, {0, 50}, "/root", id="none"),
        pytest.param("root", 0, 0, {0, 50}, "/root", id="root"),
        pytest.param("1000", 1000, 1001, {1001, 50, 2000}, "/home/web", id="by-number"),
        pytest.param("web:logs", 1000, 2000, set(), "/home/web", id="with-a-group"),
        pytest.param("1000:7", 1000, 7, set(), "/home/web", id="with-a-group-by-number"),
        pytest.param("4321", 4321, 0, set(), "/", id="unknown-by-number"),
        pytest.param("4321:logs", 4321, 2000, set(), "/", id="unknown-with-a-group"),
    ],
)
def test_it_runs_as_who_was_named(host: Host, user: str, uid: int, gid: int, groups: set[int], home: str) -> None:
    outcome = host.run(Q35, shell(WHO, user=user))
    assert f"Uid: {uid}" in outcome.lines, outcome.console
    assert f"Gid: {gid}" in outcome.lines
    assert f"home: {home}" in outcome.lines
    (told,) = (line.removeprefix("groups:") for line in outcome.lines if line.startswith("groups:"))
    assert set(map(int, told.split())) == groups
    assert outcome.clean


def test_the_last_user_and_group_need_no_newline(host: Host) -> None:
    tree = host.tree(Q35) | {"etc/passwd": (b"web:x:7:8::/srv:/bin/sh", 0o644), "etc/group": (b"logs:x:9:web", 0o644)}
    outcome = host.run(Q35, shell(WHO, user="web:logs"), tree)
    assert {"Uid: 7", "Gid: 9", "home: /srv"} <= {*outcome.lines}, outcome.console
    assert outcome.clean


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


@pytest.mark.parametrize("machine", [Q35, VIRT], ids=str)
def test_a_signal_to_init_reaches_it(host: Host, machine: Machine) -> None:
    script = "trap 'exit 7' TERM; trap 'echo got INT; kill -TERM 1' INT; kill -INT 1; while :; do sleep 0.1; done"
    outcome = host.run(machine, shell(script))
    assert "got INT" in outcome.lines
    assert outcome.exit == 7
    assert outcome.clean


@pytest.mark.parametrize(("signal", "number"), [("SIGQUIT", 3), ("RTMIN+3", 37)])
def test_it_gets_the_signal_it_asks_for_in_place_of_term(host: Host, signal: str, number: int) -> None:
    script = f"trap 'exit 1' TERM; trap 'exit 9' {number}; kill -TERM 1; while :; do sleep 0.1; done"
    outcome = host.run(Q35, shell(script, stop_signal=signal))
    assert outcome.exit == 9, outcome.console
    assert outcome.clean


def test_orphans_are_reaped_and_do_not_keep_the_machine_running(host: Host) -> None:
    script = """
for i in 1 2 3 4 5; do (sh -c 'sleep 0.1 & exec true' &); done
setsid sh -c 'trap "" TERM HUP INT; while :; do echo >>/busy; sleep 0.05; done' &
sleep 1
echo "zombies: $(grep -l '^State:.Z' /proc/[0-9]*/status)"
"""
    outcome = host.run(Q35, shell(script))
    assert "zombies: " in outcome.lines, outcome.console
    assert outcome.exit == 0
    assert outcome.clean


def test_it_may_end_everything_it_can_reach(host: Host) -> None:
    outcome = host.run(Q35, shell("kill -TERM -1; echo survived; kill -KILL -1; sleep 1; exit 4"))
    assert "survived" in outcome.lines, outcome.console
    assert outcome.exit in {4, 125}
    assert outcome.clean
