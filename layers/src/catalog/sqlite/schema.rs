//! The tables of the catalog, as printed in `FORMAT.md`.

/// The version that this code writes.
pub const SCHEMA_VERSION: i64 = 3;
/// Says that a database is one of ours.
pub(super) const APPLICATION_ID: i64 = 0x5354_5241;

/// The tables of version 3.
pub const SCHEMA: &str = "\
CREATE TABLE store (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    uuid BLOB NOT NULL CHECK (length(uuid) = 16),
    next_job INTEGER NOT NULL CHECK (next_job >= 1)
) STRICT;
CREATE TABLE layers (
    uuid BLOB NOT NULL PRIMARY KEY CHECK (length(uuid) = 16),
    parent BLOB REFERENCES layers (uuid) DEFERRABLE INITIALLY DEFERRED CHECK (parent <> uuid),
    sectors INTEGER NOT NULL CHECK (sectors BETWEEN 1 AND 137438953472),
    state TEXT NOT NULL CHECK (state IN ('active', 'sealing', 'sealed')),
    base_path BLOB CHECK (length(base_path) BETWEEN 1 AND 3072),
    base_bytes INTEGER CHECK (base_bytes = sectors * 512),
    base_mtime_ns INTEGER,
    created_ns INTEGER NOT NULL CHECK (created_ns >= 0),
    CHECK ((base_path IS NULL) = (base_bytes IS NULL) AND (base_path IS NULL) = (base_mtime_ns IS NULL)),
    CHECK (base_path IS NULL OR (parent IS NULL AND state = 'sealed'))
) STRICT, WITHOUT ROWID;
CREATE TABLE volumes (
    name TEXT NOT NULL PRIMARY KEY CHECK (length(CAST(name AS BLOB)) BETWEEN 1 AND 64),
    active BLOB NOT NULL REFERENCES layers (uuid) DEFERRABLE INITIALLY DEFERRED,
    sectors INTEGER NOT NULL CHECK (sectors BETWEEN 1 AND 137438953472),
    created_ns INTEGER NOT NULL CHECK (created_ns >= 0),
    socket BLOB CHECK (length(socket) > 0),
    queues INTEGER CHECK (queues BETWEEN 1 AND 65535),
    read_only INTEGER CHECK (read_only IN (0, 1)),
    kind TEXT NOT NULL CHECK (kind IN ('normal', 'immutable', 'writethrough', 'multiattach', 'readonly')),
    armed INTEGER NOT NULL CHECK (armed IN (0, 1)),
    attached_from TEXT REFERENCES volumes (name) DEFERRABLE INITIALLY DEFERRED,
    failed TEXT CHECK (length(failed) > 0),
    CHECK ((socket IS NULL) = (queues IS NULL) AND (socket IS NULL) = (read_only IS NULL)),
    CHECK (armed = 0 OR kind = 'immutable'),
    CHECK (attached_from IS NULL OR kind <> 'multiattach')
) STRICT, WITHOUT ROWID;
CREATE TABLE snapshots (
    volume TEXT NOT NULL REFERENCES volumes (name) DEFERRABLE INITIALLY DEFERRED,
    name TEXT NOT NULL CHECK (length(CAST(name AS BLOB)) BETWEEN 1 AND 64),
    layer BLOB NOT NULL REFERENCES layers (uuid) DEFERRABLE INITIALLY DEFERRED,
    instant BLOB NOT NULL CHECK (length(instant) = 16),
    created_ns INTEGER NOT NULL CHECK (created_ns >= 0),
    sectors INTEGER NOT NULL CHECK (sectors BETWEEN 1 AND 137438953472),
    PRIMARY KEY (volume, name)
) STRICT, WITHOUT ROWID;
CREATE TABLE jobs (
    id INTEGER PRIMARY KEY CHECK (id >= 1),
    kind TEXT NOT NULL CHECK (kind IN ('merge', 'push-down', 'flatten', 'import', 'into-base')),
    subject TEXT NOT NULL CHECK (length(CAST(subject AS BLOB)) BETWEEN 1 AND 129),
    source BLOB NOT NULL REFERENCES layers (uuid) DEFERRABLE INITIALLY DEFERRED CHECK (source <> target),
    target BLOB NOT NULL REFERENCES layers (uuid) DEFERRABLE INITIALLY DEFERRED,
    way TEXT NOT NULL CHECK (way IN ('up', 'down', 'in-place', 'copy')),
    state TEXT NOT NULL CHECK (state IN ('queued', 'paused', 'stopped')),
    error TEXT CHECK (error IS NULL OR state = 'stopped'),
    rate INTEGER CHECK (rate >= 1),
    created_ns INTEGER NOT NULL CHECK (created_ns >= 0)
) STRICT;
CREATE TABLE doomed (
    uuid BLOB NOT NULL PRIMARY KEY CHECK (length(uuid) = 16)
) STRICT, WITHOUT ROWID;
CREATE INDEX layers_by_parent ON layers (parent);
CREATE INDEX volumes_by_active ON volumes (active);
CREATE INDEX volumes_by_attached_from ON volumes (attached_from);
CREATE INDEX snapshots_by_layer ON snapshots (layer);
CREATE INDEX jobs_by_source ON jobs (source);
CREATE INDEX jobs_by_target ON jobs (target);
";

/// How each table is read.
pub(super) struct Queries {
    /// `uuid`, `next_job`.
    pub store: &'static str,
    /// As `rows::layer`.
    pub layers: &'static str,
    /// As `rows::volume`.
    pub volumes: &'static str,
    /// As `rows::snapshot`.
    pub snapshots: &'static str,
    /// As `rows::job`.
    pub jobs: &'static str,
    /// `uuid`.
    pub doomed: &'static str,
}

/// Reads version 3.
pub(super) const QUERIES: Queries = Queries {
    store: "SELECT uuid, next_job FROM store",
    layers: "SELECT uuid, parent, sectors, state, base_path, base_bytes, base_mtime_ns, created_ns FROM layers",
    volumes: "SELECT name, active, sectors, created_ns, socket, queues, read_only, kind, armed, attached_from, failed \
              FROM volumes",
    snapshots: "SELECT volume, name, layer, instant, created_ns, sectors FROM snapshots ORDER BY created_ns, volume, name",
    jobs: "SELECT id, kind, subject, source, target, way, state, error, rate, created_ns FROM jobs",
    doomed: "SELECT uuid FROM doomed",
};

/// Reads version 2, which forgot failures.
pub(super) const QUERIES_2: Queries = Queries {
    volumes: "SELECT name, active, sectors, created_ns, socket, queues, read_only, kind, armed, attached_from, NULL \
              FROM volumes",
    ..QUERIES
};

/// Reads version 1, which had neither jobs, nor doomed layers, nor kinds of volumes.
pub(super) const QUERIES_1: Queries = Queries {
    store: "SELECT uuid, 1 FROM store",
    volumes: "SELECT name, active, sectors, created_ns, socket, queues, read_only, 'normal', 0, NULL, NULL FROM volumes",
    jobs: "SELECT 1 WHERE 0",
    doomed: "SELECT 1 WHERE 0",
    ..QUERIES
};
