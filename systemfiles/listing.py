"""What is on disk and what the catalog offers, as rows: a table for people, plain values for JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from systemfiles.content.artifacts import Artifact
from systemfiles.foundation.catalog import Catalog
from systemfiles.foundation.units import human_size

Row = dict[str, str | int]


def provided(artifacts: Iterable[Artifact]) -> list[Row]:
    """One row for each artifact on disk: `size` in bytes."""
    return [
        {
            "kind": artifact.kind,
            "version": artifact.version,
            "arch": artifact.arch.value,
            "size": artifact.files[artifact.file].size,
            "created": str(artifact.record["created_at"]),
            "path": str(artifact.path),
        }
        for artifact in artifacts
    ]


def offered(catalog: Catalog) -> list[Row]:
    """One row for each profile, kernel and initrd of the catalog."""
    rows: list[Row] = []
    for name, profile in catalog.profile.items():
        default = " (default)" if name == catalog.default_profile else ""
        rows.append({"kind": "profile", "name": name, "about": f"{profile.summary}{default}"})
    for name, kernel in catalog.kernel.items():
        rows.append({"kind": "kernel", "name": name, "about": kernel.summary})
    for name, initrd in catalog.initrd.items():
        rows.append({"kind": "initrd", "name": name, "about": initrd.summary})
    return rows


def table(rows: Sequence[Mapping[str, str | int]], *, empty: str = "nothing is provisioned here") -> str:
    """Rows under upper-case headings, in columns as wide as their longest value."""
    if not rows:
        return empty
    shown = [[heading.upper() for heading in rows[0]]]
    shown += [[human_size(value) if isinstance(value, int) else value for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown
    )
