"""Death of a process at any point: it is killed just before its n-th call that changes something."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType

_CHANGING = frozenset(
    ("execute", "fsync", "write", "rename", "replace", "unlink", "rmdir", "mkdir", "link", "flock", "open", "ftruncate")
)


def killed_at(n: int, body: Callable[[], object]) -> bool:
    """Runs `body` in a child that is killed before its n-th such call; False when it came to its end before.

    Must be called where no other thread runs, as it forks. An error of ours ends the child quietly.
    """
    child = os.fork()
    if not child:
        _run(n, body)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.waitstatus_to_exitcode(status) == 0, "the child failed; what it said is on stderr"
    return False


def _run(n: int, body: Callable[[], object]) -> None:
    from systemfiles.foundation.errors import SystemFilesError

    left = n

    def hook(frame: FrameType, event: str, called: object) -> None:
        nonlocal left
        if event == "c_call" and getattr(called, "__name__", "") in _CHANGING:
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    status = 0
    try:
        sys.setprofile(hook)
        body()
    except SystemFilesError:
        pass
    except BaseException:
        sys.setprofile(None)
        traceback.print_exc()
        status = 1
    finally:
        os._exit(status)
