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
CREATE UNIQUE INDEX asset_locations_at ON asset_locations (store_id, path);
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
CREATE INDEX tombstones_at ON tombstones (store_id, path);
CREATE TABLE content_use (
    store_id TEXT NOT NULL,
    digest TEXT NOT NULL,
    last_used_at BIGINT NOT NULL,
    PRIMARY KEY (store_id, digest)
);
