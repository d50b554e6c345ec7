"""What must hold of a data directory after a run that was struck, after a collection, and after the next run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tests.crash import checker
from tests.crash.calls import Call
from tests.crash.checker import Problem, State
from tests.crash.inject import ACTIONS, Outcome
from tests.crash.ledger import DATABASE, Ledger
from tests.crash.running import INTERRUPTED, Scenario

_FULL_DISK = ("ENOSPC", "EDQUOT", "full")
_CLEANING = {"unlink", "rmdir", "open", "list"}
_PUT_OFF = ("the next collection will let the registry know", "SHA256SUMS and index.json are not up to date")
"""What is told where a run ends well although something was not written that others bring up to date."""
_LISTS = ("SHA256SUMS", "index.json")


@dataclass(frozen=True)
class Measure:
    """A scenario that nothing disturbs: before and after, how it ended, and how many calls each action could strike."""

    before: State
    after: State
    status: int | None
    counts: dict[str, int]
    problems: tuple[Problem, ...]


def at_first(outcome: Outcome, scenario: Scenario, action: str, measured: Measure, state: State) -> Iterator[str]:
    """What is wrong as it lies there after a run that was struck, and with how that ended."""
    yield from invariants(scenario, measured, state)
    yield from _promises(outcome, state.ledger)
    if outcome.status is None:
        yield "it hangs"
    if ACTIONS[action].kills or not outcome.struck:
        return
    refused = INTERRUPTED if action == "SIGINT" else 1
    if "Traceback" in outcome.stderr or outcome.status not in (measured.status, refused):
        yield f"ended with status {outcome.status} and no typed error"
    elif outcome.status != measured.status:
        if not any(word in outcome.stderr for word in ("error: ", "interrupted")):
            yield "failed and does not say why"
        if action in _FULL_DISK and not (_tells_of_space(outcome.stderr) or _is_databases(outcome)):
            yield "a full disk, and it does not say where, what was needed, and what is free"
    elif not outcome.stderr or not (action == "EIO" or any(told in outcome.stderr for told in _PUT_OFF)):
        yield from _same_answers(measured, state)  # what cannot be read may be left out, with a warning
    left = sorted({*state.left} - {*measured.before.left})
    if left and not any(map(_is_cleaning, outcome.struck)):
        yield f"left {', '.join(left)}"


def _is_cleaning(call: Call) -> bool:
    """Whether it was the removal of something temporary that failed."""
    parts = call.paths[0].split("/")
    return call.verb in _CLEANING and (checker.JOURNAL in parts or any(map(checker.TEMPORARY.fullmatch, parts)))


def _is_databases(outcome: Outcome) -> bool:
    """Whether calls of SQLite's failed, which tells a full disk from other faults at one of its calls only."""
    struck = any(DATABASE in path for call in outcome.struck for path in call.paths)
    return struck and f"{DATABASE} cannot be used" in outcome.stderr


def _promises(outcome: Outcome, ledger: Ledger) -> Iterator[str]:
    """What the run was told by a call that had returned, and is not so."""
    said = dict[str, str]()
    for line in outcome.stdout.splitlines():
        if line.startswith("promised "):
            kind, _, name = line.removeprefix("promised ").partition(" ")
            said[name] = kind
    for name, kind in said.items():
        kept = {
            "store": bool(ledger.store) and ledger.store in ledger.stores,
            "version": ledger.version == name,
            "lease": name in ledger.leases,
            "ended": name not in ledger.leases,
            "holder": bool(ledger.held_by(name)),
            "pin": name in ledger.pins,
            "unpinned": name not in ledger.pins,
            "collected": not ledger.doomed,
        }
        if not kept[kind]:
            yield f"promised {kind} {name}, and it is not so: {ledger.leases} {[*ledger.pins]} {ledger.doomed}"


def _tells_of_space(stderr: str) -> bool:
    return all(word in stderr for word in ("no space left for /", "needed", "free"))


def invariants(scenario: Scenario, measured: Measure, state: State) -> Iterator[str]:
    """What must never be, whatever happened."""
    for problem in new(measured.before, state):
        if not scenario.goes.may(problem.subject.removesuffix(checker.LISTED)):  # that list is the last to be written
            yield str(problem)
    for problem in checker.losses(measured.before, state, scenario.goes):
        yield str(problem)


def new(before: State, after: State) -> Iterator[Problem]:
    """What is wrong and was not."""
    return (problem for problem in after.problems if problem.subject not in before.broken)


def collected(outcome: Outcome, before: Outcome, scenario: Scenario, measured: Measure, state: State) -> Iterator[str]:
    """What is wrong after a collection on what a run left: it takes what nothing holds, all of it and that alone."""
    assert scenario.unheld is not None
    if outcome.status:
        yield f"a collection ends with {outcome.status}: {outcome.stderr[-2000:]}"
    for problem in (*state.problems, *checker.losses(measured.before, state, scenario.goes | scenario.unheld)):
        if problem.subject not in measured.before.broken:
            yield f"after a collection, {problem}"
    yield from _promises(before, state.ledger)
    yield from _promises(outcome, state.ledger)
    known = {path for path in state.ledger.rows.values() if path.startswith("system/")}
    there = {path.rpartition("/")[0] for path in state.artifacts}
    for what, names in (
        ("left", [what for what in state.needs if what in measured.before.needs and scenario.unheld.may(what)]),
        ("left", state.left),
        ("did not list", state.unlisted),
        ("left the registry out of step with", (known ^ there) - measured.before.broken),
        ("left the registry out of step with pins", state.ledger.unlike_pins()),
    ):
        if names:
            yield f"a collection {what} {', '.join(sorted(names))}"


def at_last(outcome: Outcome, scenario: Scenario, measured: Measure, state: State) -> Iterator[str]:
    """What is wrong after an undisturbed run on what was left."""
    if outcome.status != measured.status:
        yield f"afterwards it ends with {outcome.status} instead of {measured.status}: {outcome.stderr[-2000:]}"
    for problem in (*new(measured.before, state), *checker.losses(measured.before, state, scenario.goes)):
        yield f"afterwards, {problem}"
    yield from _promises(outcome, state.ledger)
    yield from _same_answers(measured, state, but=() if scenario.lists else _LISTS)
    if scenario.sweeps and state.left:
        yield f"afterwards, {', '.join(state.left)} is left"


def _same_answers(measured: Measure, state: State, *, but: Iterable[str] = ()) -> Iterator[str]:
    for name in sorted({*measured.after.answers, *state.answers} - {*but}):
        expected, got = measured.after.answers.get(name), state.answers.get(name)
        if expected != got:
            yield f"{name} is another than without the disturbance: {_difference(got, expected)}"


def _difference(got: object, expected: object) -> str:
    """Where they differ, not how much they have in common."""
    if isinstance(got, dict) and isinstance(expected, dict):
        keys = [key for key in {**expected, **got} if got.get(key) != expected.get(key)]
        return "; ".join(f"{key}: {_difference(got.get(key), expected.get(key))}" for key in keys)
    if isinstance(got, list) and isinstance(expected, list):
        return f"{[item for item in got if item not in expected]} for {[item for item in expected if item not in got]}"
    return f"{got!r:.200} for {expected!r:.200}"
