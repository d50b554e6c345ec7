"""Assets, who holds them, where their bytes are, and what is on its way out.

Times are integers: seconds since 1970, UTC. What is JSON is text, so that both databases keep it as it was written.
Texts are ordered by their bytes in both, which no upgrade of a host's collations changes.

    stores            the data directories that use this registry, and where each was when it was added; leases_lost:
                      its leases are gone
    assets            one row for each asset; location is relative to the backend's root
    asset_labels      with the asset's created_at, so that a page of a label's assets is one range of an index
    asset_leases      expires_at NULL: without end; one lease may hold several assets, asset_count of them; store_id:
                      only that store's copy is held, or every one when it is empty
    asset_locations   which store has the asset's bytes, and under which path
    tombstones        what has lost its row and will lose its bytes, in which store
    content_use       when a store's content (an image) was last asked for
"""

from alembic import op

revision = "0001"
down_revision = None

_TABLES = """
CREATE TABLE stores (
    id TEXT PRIMARY KEY,
    place TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    leases_lost INTEGER NOT NULL
);
CREATE INDEX stores_at ON stores (place);
CREATE TABLE assets (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    type TEXT NOT NULL,
    status TEXT NOT NULL,
    backend TEXT NOT NULL,
    location TEXT NOT NULL,
    size_bytes BIGINT NOT NULL,
    checksum TEXT NOT NULL,
    created_by TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    last_accessed_at BIGINT NOT NULL,
    last_held_by TEXT NOT NULL,
    build_id TEXT NOT NULL,
    source_image TEXT NOT NULL,
    version TEXT NOT NULL,
    tag TEXT NOT NULL,
    tags TEXT NOT NULL,
    metadata TEXT NOT NULL,
    public_url TEXT NOT NULL,
    file_info TEXT NOT NULL,
    assets_db_id TEXT NOT NULL
);
CREATE INDEX assets_newest ON assets (created_at, id);
CREATE INDEX assets_of_type ON assets (type, created_at, id);
CREATE INDEX assets_of_status ON assets (status, created_at, id);
CREATE INDEX assets_unused ON assets (last_accessed_at, id);
CREATE TABLE asset_labels (
    asset_id TEXT NOT NULL REFERENCES assets (id) ON DELETE CASCADE,
    label TEXT NOT NULL,
    value TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    PRIMARY KEY (asset_id, label)
);
CREATE INDEX asset_labels_newest ON asset_labels (label, value, created_at, asset_id);
CREATE TABLE asset_leases (
    id TEXT NOT NULL,
    asset_id TEXT NOT NULL REFERENCES assets (id),
    store_id TEXT NOT NULL,
    acquired_by TEXT NOT NULL,
    acquired_at BIGINT NOT NULL,
    expires_at BIGINT,
    asset_count INTEGER NOT NULL,
    PRIMARY KEY (id, asset_id)
);
CREATE INDEX asset_leases_of_asset ON asset_leases (asset_id, expires_at);
CREATE INDEX asset_leases_by_holder ON asset_leases (acquired_by, id);
CREATE TABLE asset_locations (
    asset_id TEXT NOT NULL REFERENCES assets (id) ON DELETE CASCADE,
    store_id TEXT NOT NULL,
    path TEXT NOT NULL,
    state TEXT NOT NULL,
    PRIMARY KEY (asset_id, store_id)
);
CREATE INDEX asset_locations_of_store ON asset_locations (store_id, asset_id);
CREATE TABLE tombstones (
    id TEXT PRIMARY KEY,
    store_id TEXT NOT NULL,
    asset_id TEXT NOT NULL,
    name TEXT NOT NULL,
    path TEXT NOT NULL,
    size_bytes BIGINT NOT NULL,
    reason TEXT NOT NULL,
    last_held_by TEXT NOT NULL,
    created_at BIGINT NOT NULL
);
CREATE INDEX tombstones_of_store ON tombstones (store_id, id);
CREATE TABLE content_use (
    store_id TEXT NOT NULL,
    digest TEXT NOT NULL,
    last_used_at BIGINT NOT NULL,
    PRIMARY KEY (store_id, digest)
)
"""


def upgrade() -> None:
    tables = _TABLES
    if op.get_bind().dialect.name == "postgresql":
        tables = tables.replace(" TEXT", ' TEXT COLLATE "C"')
    for statement in tables.split(";"):
        op.execute(statement)
