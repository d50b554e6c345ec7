"""Which kernel modules an initrd needs, and the indexes that find them: depmod's text files, made and read here.

::

    modules.dep      kernel/fs/erofs/erofs.ko: kernel/lib/libcrc32c.ko      (all it needs; the last is loaded first)
    modules.softdep  softdep libcrc32c pre: crc32c                          (wishes: names or aliases)
    modules.alias    alias fs-erofs erofs
    modules.builtin  kernel/fs/ext4/ext4.ko                                 (the kernel's own, as its package has it)

Sources: modules.dep(5), depmod.d(5), modprobe.d(5) "softdep".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import NoReturn

from systemfiles.foundation.errors import InvalidArchive, UnknownModule
from systemfiles.recipes.modinfo import Modinfo, module_name, normal_name, parse_softdep

_CIRCLES_MAX = 100
_NEEDS_MAX = 2_000_000  # modules needed by modules, counted along every way; distributions have some 10,000
_LOOKS_MAX = 30_000_000  # aliases looked at; distributions have 30,000 of them and a hundred softdeps
_MATCH = 20  # looks that take as long as matching a character, when the pattern is a new one
_PATH = re.compile(r"(?!/)[^\s:#\x00]+")
_WILD = re.compile(r"[][*?]")

DEP, SOFTDEP, ALIAS, BUILTIN = "modules.dep", "modules.softdep", "modules.alias", "modules.builtin"


@dataclass(frozen=True, slots=True)
class ModuleIndex:
    """The modules of one kernel.

    `dependencies` maps each module's path to the paths of all it needs, the last to be loaded first; `softdeps` a
    module's name to what should be loaded (before, after) it, by name or alias; `aliases` are (pattern, name) pairs.
    """

    dependencies: Mapping[str, tuple[str, ...]]
    softdeps: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]
    aliases: tuple[tuple[str, str], ...]
    builtin: tuple[str, ...]

    @classmethod
    def parse(cls, files: Mapping[str, str]) -> ModuleIndex:
        """The index in depmod's text files, by file name; only modules.dep must be there. Raises InvalidArchive."""
        if DEP not in files:
            _refuse(DEP, "it is missing")
        dependencies: dict[str, tuple[str, ...]] = {}
        for line in _lines(files[DEP]):
            path, colon, needs = line.partition(":")
            if not colon or path in dependencies:
                _refuse(DEP, f"{line[:200]!r} is no new module and what it needs")
            dependencies[path] = tuple(needs.split())
        softdeps: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
        for line in _lines(files.get(SOFTDEP, "")):
            words = line.split()
            if len(words) < 2 or words[0] != "softdep":
                _refuse(SOFTDEP, f"{line[:200]!r} is no softdep")
            pre, post = parse_softdep(words[2:])
            before, after = softdeps.get(words[1], ((), ()))
            softdeps[words[1]] = (before + pre, after + post)
        aliases = []
        for line in _lines(files.get(ALIAS, "")):
            command, _, rest = line.partition(" ")
            pattern, _, name = rest.rpartition(" ")
            if command != "alias" or not pattern or not name:
                _refuse(ALIAS, f"{line[:200]!r} is no alias")
            aliases.append((pattern, name))
        return cls(dependencies, softdeps, tuple(aliases), _lines(files.get(BUILTIN, "")))._checked()

    def files(self) -> dict[str, str]:
        """The same as text files by name, to lie in lib/modules/<release>/."""
        softdeps = [
            " ".join(["softdep", name, *(("pre:", *pre) if pre else ()), *(("post:", *post) if post else ())])
            for name, (pre, post) in self.softdeps.items()
        ]
        aliases = [f"alias {pattern} {name}" for pattern, name in self.aliases]
        return {
            DEP: _text([" ".join([f"{path}:", *needs]) for path, needs in self.dependencies.items()]),
            SOFTDEP: _text(["# Soft dependencies extracted from modules themselves.", *softdeps]),
            ALIAS: _text(["# Aliases extracted from modules themselves.", *aliases]),
            BUILTIN: _text(self.builtin),
        }

    def _checked(self) -> ModuleIndex:
        """Itself, when its paths are plain and unique by name and all that is needed is there."""
        names: dict[str, str] = {}
        for path in (*self.dependencies, *self.builtin):
            if not _PATH.fullmatch(path) or ".." in path.split("/"):
                _refuse(DEP, f"{path[:200]!r} is no path of a module")
        for path, needs in self.dependencies.items():
            if (other := names.setdefault(module_name(path), path)) != path:
                _refuse(DEP, f"{path} and {other} are modules of one name")
            for need in needs:
                if need not in self.dependencies:
                    _refuse(DEP, f"{path} needs {need[:200]}, which is not there")
        return self


def build_index(release: str, modules: Mapping[str, Modinfo], builtin: str) -> ModuleIndex:
    """The index of a kernel's modules by path (relative to lib/modules/<release>) and its modules.builtin text.

    Raises InvalidArchive when a needed module is neither there nor built in, two have one name, one was built for
    another kernel, or modules need each other in a circle.
    """
    subject = f"modules of {release}"
    paths = {module_name(path): path for path in sorted(modules)}
    built = {module_name(path) for path in _lines(builtin)}
    direct: dict[str, set[str]] = {}
    for path, info in sorted(modules.items()):
        if info.release not in ("", release):
            _refuse(subject, f"{path} was built for {info.release}")
        names = [normal_name(need) for need in info.depends]
        if missing := [name for name in names if name not in paths and name not in built]:
            _refuse(subject, f"{path} needs {', '.join(missing)}, which is not there")
        direct[path] = {paths[name] for name in names if name in paths}
    order = _load_order(direct, {}, subject=subject)
    place = {path: number for number, path in enumerate(order)}
    needs: dict[str, set[str]] = {}
    total = 0
    for path in order:
        total += len(direct[path]) + sum(len(needs[need]) for need in direct[path])
        if total > _NEEDS_MAX:
            _refuse(subject, f"they need each other in more than {_NEEDS_MAX} ways")
        needs[path] = direct[path].union(*(needs[need] for need in direct[path]))
    return ModuleIndex(
        dependencies={path: tuple(sorted(needs[path], key=place.__getitem__, reverse=True)) for path in direct},
        softdeps={
            module_name(path): (info.softdeps_pre, info.softdeps_post)
            for path, info in sorted(modules.items())
            if info.softdeps_pre or info.softdeps_post
        },
        aliases=tuple((alias, module_name(path)) for path, info in sorted(modules.items()) for alias in info.aliases),
        builtin=_lines(builtin),
    )._checked()


def closure(index: ModuleIndex, wanted: Sequence[str]) -> tuple[str, ...]:
    """Paths of the modules `wanted` (names or aliases) and of all they need, in the order to load them.

    What a module needs comes before it. Soft dependencies are taken along where they exist, and stand on their side
    of the module unless that would make a circle. An alias stands for every module that has it. What is built in
    needs nothing. Raises UnknownModule with all that is unknown, InvalidArchive for a circle of hard needs.
    """
    finder = _Finder(index)
    found = {name: finder.find(name) for name in wanted}
    if unknown := [name for name, paths in found.items() if paths is None]:
        raise UnknownModule(unknown)
    hard: dict[str, set[str]] = {}
    soft: dict[str, set[str]] = {}
    todo = [path for name in reversed(wanted) for path in reversed(found[name] or ())]
    while todo:
        path = todo.pop()
        if path in hard:
            continue
        hard[path] = set(index.dependencies[path])
        pre, post = finder.softdeps(path)
        soft.setdefault(path, set()).update(pre)
        for follower in post:
            soft.setdefault(follower, set()).add(path)
        todo += [*post, *pre, *index.dependencies[path]]
    return _load_order(hard, soft, subject=DEP)


def subset(index: ModuleIndex, paths: Iterable[str]) -> dict[str, str]:
    """The index files for these modules alone, so that modprobe finds them, by alias too, and no others.

    modules.builtin stays whole: the kernel is the same. Raises UnknownModule for a path that the index does not have,
    and for a module without one that it needs.
    """
    chosen = set(paths)
    for path in sorted(chosen):
        if missing := {path} - index.dependencies.keys() or set(index.dependencies[path]) - chosen:
            raise UnknownModule(sorted(missing))
    finder = _Finder(index)
    names = {module_name(path) for path in chosen}

    def kept(words: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(word for word in words if not chosen.isdisjoint(finder.find(word) or ()))

    softdeps = {name: (kept(pre), kept(post)) for name, (pre, post) in index.softdeps.items() if name in names}
    return ModuleIndex(
        dependencies={path: needs for path, needs in index.dependencies.items() if path in chosen},
        softdeps={name: words for name, words in softdeps.items() if any(words)},
        aliases=tuple(pair for pair in index.aliases if pair[1] in names),
        builtin=index.builtin,
    ).files()


class _Finder:
    """Finds modules by name and alias."""

    def __init__(self, index: ModuleIndex) -> None:
        self._index = index
        self._paths = {module_name(path): path for path in index.dependencies}
        self._built = {module_name(path) for path in index.builtin}
        # most patterns are told apart by how they begin; matching is 100 times slower
        self._aliases = [
            (_WILD.split(pattern, maxsplit=1)[0], pattern, self._paths[name])
            for pattern, name in ((normal_name(pattern), normal_name(name)) for pattern, name in index.aliases)
            if name in self._paths
        ]
        self._looks = 0

    def find(self, name: str) -> tuple[str, ...] | None:
        """The paths that a name or alias stands for, none of them when it is built in. None: unknown.

        Raises InvalidArchive when all that was asked for took too long.
        """
        name = normal_name(name)
        if name in self._paths:
            return (self._paths[name],)
        if name in self._built:
            return ()
        likely = [(pattern, path) for start, pattern, path in self._aliases if name.startswith(start)]
        self._looks += len(self._aliases) + _MATCH * sum(len(pattern) + len(name) for pattern, _ in likely)
        if self._looks > _LOOKS_MAX:
            _refuse(ALIAS, "its aliases take too long to match")
        return tuple(dict.fromkeys(path for pattern, path in likely if fnmatchcase(name, pattern))) or None

    def softdeps(self, path: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What exists of the modules that should be loaded before and after the one at `path`."""
        pre, post = self._index.softdeps.get(module_name(path), ((), ()))
        return (
            tuple(found for word in pre for found in self.find(word) or () if found != path),
            tuple(found for word in post for found in self.find(word) or () if found != path),
        )


def _load_order(hard: Mapping[str, set[str]], soft: Mapping[str, set[str]], *, subject: str) -> tuple[str, ...]:
    """The keys of `hard`, each after those it maps to, and after those in `soft` except in a circle."""
    wishes = {path: soft.get(path, set()) - needs for path, needs in hard.items()}
    for _ in range(_CIRCLES_MAX):
        try:
            return tuple(TopologicalSorter({path: sorted(hard[path] | wishes[path]) for path in hard}).static_order())
        except CycleError as error:
            circle: list[str] = error.args[1]  # each is needed by the next; the last is the first again
        dropped = [(first, then) for first, then in pairwise(circle) if first in wishes[then]]
        if not dropped:
            _refuse(subject, f"modules need each other in a circle: {' '.join(circle)}")
        for first, then in dropped:
            wishes[then].remove(first)
    _refuse(subject, f"its soft dependencies form more than {_CIRCLES_MAX} circles")


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line for line in text.split("\n") if line.strip() and not line.startswith("#"))


def _text(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _refuse(subject: str, problem: str) -> NoReturn:
    raise InvalidArchive(subject, problem)
