"""The tasks of this checkout: `doit list` shows them, README.md explains them."""

from pathlib import Path

from systemfiles import graph

globals().update(graph.bind(checkout=Path(__file__).parent))
