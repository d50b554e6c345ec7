"""Provenance: which inputs an artifact was made from, how, by whom and when, as a statement to be signed.

::

    {"_type": "https://in-toto.io/Statement/v1",
     "subject": [{"name": "kernel/<version>/<arch>/vmlinux", "digest": {"sha256": …}}, …],
     "predicateType": "https://slsa.dev/provenance/v1",
     "predicate": {
       "buildDefinition": {
         "buildType": "urn:systemfiles:build:kernel:v1",
         "externalParameters": {"kind": …, "version": …, "arch": …},      what was asked for
         "internalParameters": {"compressor": …, "init": …, …},           of an initrd, what that stands for
         "resolvedDependencies": [{"name": …, "uri": …, "digest": {…}, "downloadLocation": …}, …]},
       "runDetails": {
         "builder": {"id": …, "version": {"systemfiles": …}},
         "metadata": {"startedOn": …, "finishedOn": …}}}}

It says nothing of the run but what the caller says, so that every run from the same inputs gives the same bytes: keys
are sorted, nothing is put between tokens, and text outside of ASCII is escaped.

A `kernel` build unpacks the package or download to the form a VMM boots and collects its modules. An `initrd` build
takes the root of a busybox package or image, the init script, and the modules named by `load` and `carry` with what
they depend on. `tree` is the version of what the recipe adds to that.

Sources: in-toto Attestation Framework, spec/v1 (statement.md, resource_descriptor.md, digest_set.md); SLSA,
"Build: Provenance", predicate v1; RFC 3339 for times.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any, Final

from systemfiles.content.artifacts import MODULES, Artifact
from systemfiles.content.descriptors import canonical
from systemfiles.foundation.errors import UsageError
from systemfiles.foundation.paths import INITRD, KERNEL
from systemfiles.foundation.units import public_url
from systemfiles.release.origins import Origin, origins, told
from systemfiles.version import __version__

STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://slsa.dev/provenance/v1"
BUILD_TYPES: Final = {kind: f"urn:systemfiles:build:{kind}:v1" for kind in (KERNEL, INITRD)}

_COMMIT = re.compile(r"git\+(?P<repository>[^\s@]+://.+)@(?P<commit>[0-9a-f]{40}|[0-9a-f]{64})")
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:[!-~]+")


def provenance(artifact: Artifact, *, builder: str, when: int, source: str | None) -> bytes:
    """The statement of how `artifact` was made by `builder`, a URI; its files are on record and are not read.

    `when` is in seconds since 1970 (UTC). `source` is the commit of this package's repository that made it, as
    `git+https://host/path@<commit>`. Raises UsageError for another builder or source, IntegrityError when the record
    does not tell what it was made from.
    """
    dependencies = [*_source(source), *_dependencies(artifact)]
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [
            {"name": subject_name(artifact, name), "digest": {"sha256": facts.sha256}}
            for name, facts in sorted(artifact.files.items())
        ],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPES[artifact.kind],
                "externalParameters": {
                    "kind": artifact.kind,
                    "version": artifact.version,
                    "arch": artifact.arch.value,
                },
                "internalParameters": _internal(artifact),
                "resolvedDependencies": dependencies,
            },
            "runDetails": {
                "builder": {"id": _checked_builder(builder), "version": {"systemfiles": __version__}},
                "metadata": dict.fromkeys(("startedOn", "finishedOn"), _time(when)),
            },
        },
    }
    return canonical(statement)


def subject_name(artifact: Artifact, file: str) -> str:
    """What a statement calls one file of an artifact; SHA256SUMS calls it the same."""
    return f"{artifact.kind}/{artifact.version}/{artifact.arch}/{file}"


def _internal(artifact: Artifact) -> dict[str, Any]:
    if artifact.kind == KERNEL:
        return {}
    texts = {
        "compressor": told(artifact, "compressor"),
        "init": told(artifact, "inputs", "init", "version"),
        "kernel": told(artifact, "requires_kernel"),
        "tree": told(artifact, "inputs", "tree"),
    }
    lists = {key: artifact.inputs.get(key, ()) for key in ("load", "carry")}  # looked at with the origins
    found = {**texts, **{key: [*names] for key, names in lists.items() if names}}
    return {key: value for key, value in found.items() if value is not None}


def _dependencies(artifact: Artifact) -> list[dict[str, Any]]:
    found = []
    for role, origin in sorted(origins(artifact).items()):
        name = f"{KERNEL}/{origin.version}/{artifact.arch}/{MODULES}" if role == MODULES else origin.name
        found.append(_descriptor(name, origin))
    return found


def _descriptor(name: str, origin: Origin) -> dict[str, Any]:
    return {
        "name": name,
        "digest": {"sha256": origin.sha256},
        **({"uri": origin.purl.to_string()} if origin.purl else {}),
        **({"downloadLocation": origin.url} if origin.url else {}),
    }


def _source(source: str | None) -> list[dict[str, Any]]:
    if source is None:
        return []
    match = _COMMIT.fullmatch(source)
    if match is None:
        msg = f"{source[:200]!r} does not name a commit"
        raise UsageError(msg, hint="write it as git+https://host/path@<commit>, with all digits of the commit")
    url = public_url(match["repository"])
    uri = {"uri": f"git+{url}@{match['commit']}"} if url else {}
    return [{"name": "systemfiles", "digest": {"gitCommit": match["commit"]}, **uri}]


def check_origin(*, builder: str, when: int, source: str | None) -> None:
    """Raises UsageError for what no provenance can say."""
    _checked_builder(builder)
    _source(source)
    _time(when)


def _checked_builder(builder: str) -> str:
    if not _URI.fullmatch(builder):
        msg = f"{builder[:200]!r} is not the URI of a builder"
        raise UsageError(msg, hint="name who builds with a URI, such as https://ci.example.com/systemfiles")
    return builder


def _time(when: int) -> str:
    try:
        return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError) as error:
        msg = f"{when} seconds since 1970 is no time that can be told"
        raise UsageError(msg, hint="set SOURCE_DATE_EPOCH to the seconds since 1970 (UTC)") from error
