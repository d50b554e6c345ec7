"""Sizes as people read them."""

from __future__ import annotations


def human_size(size: int) -> str:
    """`size` bytes in binary units: "50.8 MiB"."""
    value = float(size)
    for unit in ("bytes", "KiB", "MiB"):
        if value < 1024:
            return f"{size} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
