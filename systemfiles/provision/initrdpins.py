"""What an initrd is made from: its pin in versions.lock or on record, its inputs, and what its record tells of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from systemfiles.content.artifacts import MODULES, Artifact, fits
from systemfiles.foundation.errors import IncompatiblePair
from systemfiles.foundation.lockfile import InitrdPin, PackagePin
from systemfiles.recipes.initrd import InitrdBuild, initrd_inputs


def pin_on_record(record: Mapping[str, Any]) -> InitrdPin | None:
    """What an initrd was made from by its own record; None when that is not told."""
    try:
        inputs = record["inputs"]
        return InitrdPin.model_validate(
            {
                "init": inputs["init"]["version"],
                "busybox": record["source"]["busybox"],
                "kernel": record.get("requires_kernel"),
                "load": inputs.get("load", ()),
                "carry": inputs.get("carry", ()),
                "inputs": inputs,
            }
        )
    except (KeyError, TypeError, AttributeError, ValidationError):
        return None


def is_named_by_content(version: str, pin: InitrdPin) -> bool:
    """Whether a version is called as one is that has its content in its name."""
    return re.fullmatch(rf"{re.escape(pin.init)}-[0-9a-f]{{12}}", version) is not None


def inputs_of(pin: InitrdPin, kernel: Artifact) -> dict[str, Any]:
    """The preimage of what this release makes of `pin` with `kernel`."""
    return initrd_inputs(
        init=pin.init,
        busybox=_busybox_inputs(pin.busybox),
        kernel={"modules": kernel.files[MODULES].sha256} if pin.kernel else None,
        load=pin.load,
        carry=pin.carry,
    )


def require_fit(version: str, inputs: Mapping[str, Any], kernel: Artifact, requires: str | None) -> None:
    """Raises IncompatiblePair when an initrd of these inputs carries the modules of another kernel."""
    if not fits(inputs, kernel):
        raise IncompatiblePair(kernel.version, version, requires=str(requires))


def readable(pin: InitrdPin) -> dict[str, Any]:
    """The inputs under the names people know them by: packages and kernels instead of their digests."""
    init = {"sha256": pin.inputs["init"]["sha256"], "version": pin.init}
    return {**pin.model_dump(mode="json", exclude={"inputs"}), "init": init, "tree": pin.inputs["tree"]}


def facts_of(build: InitrdBuild, pin: InitrdPin) -> dict[str, Any]:
    """What the record of an initrd has beside what every record begins with."""
    return {
        "content_sha256": build.content_sha256,
        "content_size": build.content_size,
        "requires_kernel": pin.kernel,
        "entries": build.entries,
        "modules": list(build.modules),
        "compressor": build.compressor,
        "source": pin.model_dump(mode="json", include={"busybox"}),
    }


def _busybox_inputs(source: PackagePin | str) -> dict[str, Any]:
    if isinstance(source, PackagePin):
        return source.inputs
    return {"image": source.rpartition("@")[2]}
