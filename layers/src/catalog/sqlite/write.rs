//! Changes, as statements.

use std::os::unix::ffi::OsStrExt;

use rusqlite::{Connection, params};

use super::rows::{job_kind, job_state, layer_state, volume_kind, way};
use crate::catalog::{Change, JobRow, LayerRow, Rows, SnapshotRow, VolumeRow};
use crate::units::LayerId;

/// Fills empty tables.
pub(super) fn fill(db: &Connection, rows: &Rows) -> rusqlite::Result<()> {
    db.prepare_cached("INSERT INTO store (id, uuid, next_job) VALUES (1, ?1, ?2)")?
        .execute(params![rows.store.0.as_bytes(), integer(rows.next_job)?])?;
    for row in rows.layers.values() {
        add_layer(db, row)?;
    }
    for row in rows.volumes.values() {
        add_volume(db, row)?;
    }
    for row in &rows.snapshots {
        add_snapshot(db, row)?;
    }
    for row in rows.jobs.values() {
        add_job(db, row)?;
    }
    for layer in &rows.doomed {
        doom(db, *layer)?;
    }
    Ok(())
}

/// Carries out one change.
pub(super) fn execute(db: &Connection, change: &Change) -> rusqlite::Result<()> {
    let changed = match change {
        Change::AddLayer(row) => add_layer(db, row)?,
        Change::SetLayerState { layer, state } => db
            .prepare_cached("UPDATE layers SET state = ?2 WHERE uuid = ?1")?
            .execute(params![layer.0.as_bytes(), layer_state::text(*state)])?,
        Change::SetParent { layer, parent } => db
            .prepare_cached("UPDATE layers SET parent = ?2 WHERE uuid = ?1")?
            .execute(params![
                layer.0.as_bytes(),
                parent.as_ref().map(|parent| parent.0.as_bytes())
            ])?,
        Change::SetBase { layer, base } => db
            .prepare_cached(
                "UPDATE layers SET base_path = ?2, base_bytes = ?3, base_mtime_ns = ?4 WHERE uuid = ?1",
            )?
            .execute(params![
                layer.0.as_bytes(),
                base.path.as_os_str().as_bytes(),
                integer(base.len)?,
                base.mtime_ns,
            ])?,
        Change::RemoveLayer(layer) => {
            one(doom(db, *layer)?)?;
            db.prepare_cached("DELETE FROM layers WHERE uuid = ?1")?
                .execute(params![layer.0.as_bytes()])?
        }
        Change::Removed(layer) => db
            .prepare_cached("DELETE FROM doomed WHERE uuid = ?1")?
            .execute(params![layer.0.as_bytes()])?,
        Change::AddVolume(row) => add_volume(db, row)?,
        Change::SetActive { volume, layer } => db
            .prepare_cached("UPDATE volumes SET active = ?2 WHERE name = ?1")?
            .execute(params![volume, layer.0.as_bytes()])?,
        Change::SetSize { volume, size } => {
            let layer = db
                .prepare_cached(
                    "UPDATE layers SET sectors = ?2 WHERE uuid = (SELECT active FROM volumes WHERE name = ?1)",
                )?
                .execute(params![volume, integer(size.0)?])?;
            one(layer)?;
            db.prepare_cached("UPDATE volumes SET sectors = ?2 WHERE name = ?1")?
                .execute(params![volume, integer(size.0)?])?
        }
        Change::SetKind { volume, kind } => db
            .prepare_cached("UPDATE volumes SET kind = ?2 WHERE name = ?1")?
            .execute(params![volume, volume_kind::text(*kind)])?,
        Change::SetArmed { volume, armed } => db
            .prepare_cached("UPDATE volumes SET armed = ?2 WHERE name = ?1")?
            .execute(params![volume, armed])?,
        Change::SetAttachedFrom { volume, from } => db
            .prepare_cached("UPDATE volumes SET attached_from = ?2 WHERE name = ?1")?
            .execute(params![volume, from])?,
        Change::SetAttachment { volume, attachment } => {
            let attachment = attachment.as_ref();
            db.prepare_cached(
                "UPDATE volumes SET socket = ?2, queues = ?3, read_only = ?4 WHERE name = ?1",
            )?
            .execute(params![
                volume,
                attachment.map(|attachment| attachment.socket.as_os_str().as_bytes()),
                attachment.map(|attachment| attachment.queues),
                attachment.map(|attachment| attachment.read_only),
            ])?
        }
        Change::RemoveVolume(name) => db
            .prepare_cached("DELETE FROM volumes WHERE name = ?1")?
            .execute(params![name])?,
        Change::AddSnapshot(row) => add_snapshot(db, row)?,
        Change::RemoveSnapshot { volume, name } => db
            .prepare_cached("DELETE FROM snapshots WHERE volume = ?1 AND name = ?2")?
            .execute(params![volume, name])?,
        Change::AddJob(row) => {
            let next = db
                .prepare_cached("UPDATE store SET next_job = next_job + 1 WHERE next_job = ?1")?
                .execute(params![integer(row.id.0)?])?;
            one(next)?;
            add_job(db, row)?
        }
        Change::SetJob {
            id,
            state,
            error,
            rate,
        } => db
            .prepare_cached("UPDATE jobs SET state = ?2, error = ?3, rate = ?4 WHERE id = ?1")?
            .execute(params![
                integer(id.0)?,
                job_state::text(*state),
                error,
                rate.map(integer).transpose()?,
            ])?,
        Change::MoveJob { id, source, target } => db
            .prepare_cached("UPDATE jobs SET source = ?2, target = ?3 WHERE id = ?1")?
            .execute(params![
                integer(id.0)?,
                source.0.as_bytes(),
                target.0.as_bytes(),
            ])?,
        Change::RemoveJob(id) => db
            .prepare_cached("DELETE FROM jobs WHERE id = ?1")?
            .execute(params![integer(id.0)?])?,
    };
    one(changed)
}

/// The state in memory said that there is such a row; a database that disagrees was changed behind our back.
fn one(changed: usize) -> rusqlite::Result<()> {
    if changed == 1 {
        Ok(())
    } else {
        Err(rusqlite::Error::StatementChangedRows(changed))
    }
}

/// A new layer.
fn add_layer(db: &Connection, row: &LayerRow) -> rusqlite::Result<usize> {
    let base = row.base.as_ref();
    db.prepare_cached(
        "INSERT INTO layers (uuid, parent, sectors, state, base_path, base_bytes, base_mtime_ns, created_ns) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
    )?
    .execute(params![
        row.id.0.as_bytes(),
        row.parent.as_ref().map(|parent| parent.0.as_bytes()),
        integer(row.size.0)?,
        layer_state::text(row.state),
        base.map(|base| base.path.as_os_str().as_bytes()),
        base.map(|base| integer(base.len)).transpose()?,
        base.map(|base| base.mtime_ns),
        integer(row.created_ns)?,
    ])
}

/// A new volume.
fn add_volume(db: &Connection, row: &VolumeRow) -> rusqlite::Result<usize> {
    let attachment = row.attachment.as_ref();
    db.prepare_cached(
        "INSERT INTO volumes \
         (name, active, sectors, created_ns, socket, queues, read_only, kind, armed, attached_from) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
    )?
    .execute(params![
        row.name,
        row.active.0.as_bytes(),
        integer(row.size.0)?,
        integer(row.created_ns)?,
        attachment.map(|attachment| attachment.socket.as_os_str().as_bytes()),
        attachment.map(|attachment| attachment.queues),
        attachment.map(|attachment| attachment.read_only),
        volume_kind::text(row.kind),
        row.armed,
        row.attached_from,
    ])
}

/// A new snapshot.
fn add_snapshot(db: &Connection, row: &SnapshotRow) -> rusqlite::Result<usize> {
    db.prepare_cached(
        "INSERT INTO snapshots (volume, name, layer, instant, created_ns, sectors) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
    )?
    .execute(params![
        row.volume,
        row.name,
        row.layer.0.as_bytes(),
        row.group.as_bytes(),
        integer(row.created_ns)?,
        integer(row.size.0)?,
    ])
}

/// A new job.
fn add_job(db: &Connection, row: &JobRow) -> rusqlite::Result<usize> {
    db.prepare_cached(
        "INSERT INTO jobs (id, kind, subject, source, target, way, state, error, rate, created_ns) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
    )?
    .execute(params![
        integer(row.id.0)?,
        job_kind::text(row.kind),
        row.subject,
        row.source.0.as_bytes(),
        row.target.0.as_bytes(),
        way::text(row.way),
        job_state::text(row.state),
        row.error,
        row.rate.map(integer).transpose()?,
        integer(row.created_ns)?,
    ])
}

/// A layer whose files are to be removed.
fn doom(db: &Connection, layer: LayerId) -> rusqlite::Result<usize> {
    db.prepare_cached("INSERT INTO doomed (uuid) VALUES (?1)")?
        .execute(params![layer.0.as_bytes()])
}

/// The database has signed integers only. The rules of the state exclude what does not fit.
fn integer(value: u64) -> rusqlite::Result<i64> {
    i64::try_from(value).map_err(|error| rusqlite::Error::ToSqlConversionFailure(error.into()))
}
