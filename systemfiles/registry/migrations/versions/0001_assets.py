"""Assets, who holds them, where their bytes are, and what is on its way out.

Times are integers: seconds since 1970, UTC. What is JSON is text, so that both databases keep it as it was written.
Texts are ordered by their bytes in both, which no upgrade of a host's collations changes.

    stores            the data directories that use this registry, and where each was when it was added; leases_lost:
                      its leases are gone
    assets            one row for each asset; location is relative to the backend's root
    asset_labels      with the asset's created_at, so that a page of a label's assets is one range of an index
    asset_leases      expires_at NULL: without end; one lease may hold several assets, asset_count of them; store_id:
                      only that store's copy is held, or every one when it is empty
    asset_locations   which store has the asset's bytes, and under which path, which is no other's
    tombstones        what has lost its row and will lose its bytes, in which store
    content_use       when a store's content (an image) was last asked for
"""

from pathlib import Path

from alembic import op

revision = "0001"
down_revision = None

_TABLES = Path(__file__).with_suffix(".sql")


def upgrade() -> None:
    tables = _TABLES.read_text()
    if op.get_bind().dialect.name == "postgresql":
        tables = tables.replace(" TEXT", ' TEXT COLLATE "C"')
    for statement in tables.rstrip(";\n").split(";"):
        op.execute(statement)
