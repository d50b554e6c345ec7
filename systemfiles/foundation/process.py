"""The one gateway to programs of the host."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from systemfiles.foundation.errors import ToolFailed, ToolMissing


def run(command: Sequence[str | Path], *, missing: str, timeout: float = 300, cwd: Path | None = None) -> str:
    """What `command` prints on its standard output, in the C locale, at most `timeout` seconds long.

    `missing` is the hint for when the program is not installed. Raises ToolMissing, ToolFailed.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "LC_ALL": "C.UTF-8", "LANGUAGE": ""},
            timeout=timeout,
            cwd=cwd,
        )
    except FileNotFoundError:
        raise ToolMissing(words[0], hint=missing) from None
    except subprocess.TimeoutExpired as error:
        output = error.stderr or b""
        text = output.decode(errors="replace") if isinstance(output, bytes) else output
        raise ToolFailed(shlex.join(words), status=f"none after {timeout:g} s", output=text) from None
    if done.returncode:
        raise ToolFailed(shlex.join(words), status=done.returncode, output=done.stderr or done.stdout)
    return done.stdout
