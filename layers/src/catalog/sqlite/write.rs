//! Rows, as they are written.

use std::os::unix::ffi::OsStrExt;

use rusqlite::{CachedStatement, Connection, params};

use super::rows::{job_kind, job_state, layer_state, volume_kind, way};
use crate::catalog::change::Touched;
use crate::catalog::{CatalogState, JobRow, LayerRow, Rows, SnapshotRow, VolumeRow};
use crate::units::LayerId;

/// Fills empty tables.
pub(super) fn fill(db: &Connection, rows: &Rows) -> rusqlite::Result<()> {
    db.prepare_cached("INSERT INTO store (id, uuid, next_job) VALUES (1, ?1, ?2)")?
        .execute(params![rows.store.0.as_bytes(), integer(rows.next_job)?])?;
    for row in rows.layers.values() {
        write(db, None, Some(row))?;
    }
    for row in rows.volumes.values() {
        write(db, None, Some(row))?;
    }
    for row in &rows.snapshots {
        write(db, None, Some(row))?;
    }
    for row in rows.jobs.values() {
        write(db, None, Some(row))?;
    }
    for layer in &rows.doomed {
        write(db, None, Some(layer))?;
    }
    Ok(())
}

/// Writes what a commit made of the rows that it touched: each once. The database does not see what they were between two
/// changes, which may break its checks.
pub(super) fn write_touched(
    db: &Connection,
    touched: &Touched<'_>,
    state: &CatalogState,
) -> rusqlite::Result<()> {
    for (id, was) in &touched.layers {
        write(db, *was, state.layers.get(id))?;
    }
    for (name, was) in &touched.volumes {
        write(db, *was, state.volumes.get(*name))?;
    }
    for ((volume, name), was) in &touched.snapshots {
        write(db, *was, state.snapshot(volume, name))?;
    }
    for (id, was) in &touched.jobs {
        write(db, *was, state.jobs.get(id))?;
    }
    for (layer, was) in &touched.doomed {
        write(db, was.then_some(layer), state.doomed.get(layer))?;
    }
    if let Some(was) = touched.next_job {
        let changed = db
            .prepare_cached("UPDATE store SET next_job = ?2 WHERE next_job = ?1")?
            .execute(params![integer(was)?, integer(state.next_job)?])?;
        one(changed)?;
    }
    Ok(())
}

/// Makes one row of another, or of none.
fn write<R: Stored>(db: &Connection, was: Option<&R>, now: Option<&R>) -> rusqlite::Result<()> {
    let changed = match (was, now) {
        (None, None) => return Ok(()),
        (Some(was), Some(now)) if was == now => return Ok(()),
        (Some(_), Some(now)) => now.put(&mut db.prepare_cached(R::UPDATE)?)?,
        (None, Some(now)) => now.put(&mut db.prepare_cached(R::INSERT)?)?,
        (Some(was), None) => was.remove(&mut db.prepare_cached(R::DELETE)?)?,
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

/// A row of a table. The first parameters of its statements are the key, and the same in all of them.
trait Stored: PartialEq {
    /// Adds it.
    const INSERT: &'static str;
    /// Replaces the one with its key.
    const UPDATE: &'static str;
    /// Removes the one with its key.
    const DELETE: &'static str;

    /// Carries out `INSERT` or `UPDATE`.
    fn put(&self, statement: &mut CachedStatement<'_>) -> rusqlite::Result<usize>;

    /// Carries out `DELETE`.
    fn remove(&self, statement: &mut CachedStatement<'_>) -> rusqlite::Result<usize>;
}

impl Stored for LayerRow {
    const INSERT: &'static str = "INSERT INTO layers \
        (uuid, parent, sectors, state, base_path, base_bytes, base_mtime_ns, created_ns) \
        VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
    const UPDATE: &'static str = "UPDATE layers SET parent = ?2, sectors = ?3, state = ?4, \
        base_path = ?5, base_bytes = ?6, base_mtime_ns = ?7, created_ns = ?8 WHERE uuid = ?1";
    const DELETE: &'static str = "DELETE FROM layers WHERE uuid = ?1";

    fn put(&self, statement: &mut CachedStatement<'_>) -> rusqlite::Result<usize> {
        let base = self.base.as_ref();
        statement.execute(params![
            self.id.0.as_bytes(),
            self.parent.as_ref().map(|parent| parent.0.as_bytes()),
            integer(self.size.0)?,
            layer_state::text(self.state),
            base.map(|base| base.path.as_os_str().as_bytes()),
            base.map(|base| integer(base.len)).transpose()?,
            base.map(|base| base.mtime_ns),
            integer(self.created_ns)?,
        ])
    }

    fn remove(&self, statement: &mut CachedStatement<'_>) -> rusqlite::Result<usize> {
        statement.execute(params![self.id.0.as_bytes()])
    }
}

impl Stored for VolumeRow {
    const INSERT: &'static str = "INSERT INTO volumes \
        (name, active, sectors, created_ns, socket, queues, read_only, kind, armed, attached_from, failed) \
        VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)";
    const UPDATE: &'static str = "UPDATE volumes SET active = ?2, sectors = ?3, created_ns = ?4, \
        socket = ?5, queues = ?6, read_only = ?7, kind = ?8, armed = ?9, attached_from = ?10, \
        failed = ?11 WHERE name = ?1";
    const DELETE: &'static str = "DELETE FROM volumes WHERE name = ?1";

    fn put(&self, statement: &mut CachedStatement<'_>) -> rusqlite::Result<usize> {
        let attachment = self.attachment.as_ref();
        statement.execute(params![
            self.name,
            self.active.0.as_bytes(),
            integer(self.size.0)?,
            integer(self.created_ns)?,
            attachment.map(|attachment| attachment.socket.as_os_str().as_bytes()),
            attachment.map(|attachment| attachment.queues),
            attachment.map(|attachment| attachment.read_only),
            volume_kind::text(self.kind),
            self.armed,
            self.attached_from,
            self.failed,
        ])
    }

    fn remove(&self, statement: &mut CachedStatement<'_>) -> rusqlite::Result<usize> {
        statement.execute(params![self.name])
    }
}

impl Stored for SnapshotRow {
    const INSERT: &'static str = "INSERT INTO snapshots \
        (volume, name, layer, instant, created_ns, sectors) VALUES (?1, ?2, ?3, ?4, ?5, ?6)";
    const UPDATE: &'static str = "UPDATE snapshots SET layer = ?3, instant = ?4, created_ns = ?5, \
        sectors = ?6 WHERE volume = ?1 AND name = ?2";
    const DELETE: &'static str = "DELETE FROM snapshots WHERE volume = ?1 AND name = ?2";

    fn put(&self, statement: &mut CachedStatement<'_>) -> rusqlite::Result<usize> {
        statement.execute(params![
            self.volume,
            self.name,
            self.layer.0.as_bytes(),
            self.group.as_bytes(),
            integer(self.created_ns)?,
            integer(self.size.0)?,
        ])
    }

    fn remove(&self, statement: &mut CachedStatement<'_>) -> rusqlite::Result<usize> {
        statement.execute(params![self.volume, self.name])
    }
}

impl Stored for JobRow {
    const INSERT: &'static str = "INSERT INTO jobs \
        (id, kind, subject, source, target, way, state, error, rate, created_ns) \
        VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)";
    const UPDATE: &'static str = "UPDATE jobs SET kind = ?2, subject = ?3, source = ?4, target = ?5, \
        way = ?6, state = ?7, error = ?8, rate = ?9, created_ns = ?10 WHERE id = ?1";
    const DELETE: &'static str = "DELETE FROM jobs WHERE id = ?1";

    fn put(&self, statement: &mut CachedStatement<'_>) -> rusqlite::Result<usize> {
        statement.execute(params![
            integer(self.id.0)?,
            job_kind::text(self.kind),
            self.subject,
            self.source.0.as_bytes(),
            self.target.0.as_bytes(),
            way::text(self.way),
            job_state::text(self.state),
            self.error,
            self.rate.map(integer).transpose()?,
            integer(self.created_ns)?,
        ])
    }

    fn remove(&self, statement: &mut CachedStatement<'_>) -> rusqlite::Result<usize> {
        statement.execute(params![integer(self.id.0)?])
    }
}

/// A layer whose files are to be removed.
impl Stored for LayerId {
    const INSERT: &'static str = "INSERT INTO doomed (uuid) VALUES (?1)";
    const UPDATE: &'static str = "UPDATE doomed SET uuid = ?1 WHERE uuid = ?1";
    const DELETE: &'static str = "DELETE FROM doomed WHERE uuid = ?1";

    fn put(&self, statement: &mut CachedStatement<'_>) -> rusqlite::Result<usize> {
        statement.execute(params![self.0.as_bytes()])
    }

    fn remove(&self, statement: &mut CachedStatement<'_>) -> rusqlite::Result<usize> {
        statement.execute(params![self.0.as_bytes()])
    }
}

/// The database has signed integers only. The rules of the state exclude what does not fit.
fn integer(value: u64) -> rusqlite::Result<i64> {
    i64::try_from(value).map_err(|error| rusqlite::Error::ToSqlConversionFailure(error.into()))
}
