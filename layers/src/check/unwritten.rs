//! What a daemon that was killed has left in the cache: written, acknowledged, and in no file yet. That is no damage, since
//! the next daemon takes it over; but whoever looks at the files alone, or copies them, must know of it.

use std::path::{Path, PathBuf};

use super::{Finding, Severity, lock_store};
use crate::cache::arena::look::look;
use crate::cache::arena::{Place, last};
use crate::catalog::LayerState;
use crate::catalog::sqlite::SqliteCatalog;
use crate::error::{Error, Result};
use crate::ops::boot::last_boot;

/// How many clusters of a store are in the cache in `cache_dir` and not in the files yet, with a finding if there are any.
/// A store whose catalog cannot be read has nothing that could be told apart: for that, see `check`.
///
/// # Errors
/// `Busy` while the store is in use; `Invalid` if there is no store; `Io`.
pub fn unwritten(dir: &Path, cache_dir: PathBuf) -> Result<(u64, Option<Finding>)> {
    let _lock = lock_store(dir)?;
    let Ok(state) = SqliteCatalog::look(dir) else {
        return Ok((0, None));
    };
    let wanted = Place::new(dir, state.store, Some(cache_dir))?;
    let recorded = last::read(dir)?;
    if let Some(loss) = last::loss(recorded.as_deref(), last_boot(dir)?, &wanted) {
        return Ok((0, Some(gone(loss))));
    }
    // Where the last daemon had it, wherever the next one is to have it.
    let place = match last::elsewhere(recorded.as_deref(), &wanted) {
        Some(elsewhere) => elsewhere,
        None if recorded.as_deref() == Some(&wanted.path()) => wanted,
        None => return Ok((0, None)),
    };
    let left = match look(&place) {
        Ok(Some(left)) => left,
        Ok(None) => return Ok((0, None)),
        Err(error) => return Ok((0, Some(unreadable(&place, &error)))),
    };
    let layers = &state.layers;
    let clusters = left
        .dirty
        .iter()
        // A sealed layer's data was written before it was sealed.
        .filter(|(layer, _)| {
            layers
                .get(layer)
                .is_some_and(|row| row.state != LayerState::Sealed)
        })
        .map(|(_, clusters)| clusters)
        .sum();
    let finding = (clusters > 0).then(|| Finding {
        severity: Severity::Note,
        layer: None,
        what: format!(
            "{clusters} clusters were written and are not in the files yet; they are in the cache that a daemon left \
             behind, {}",
            left.path.display()
        ),
        fix: "start the daemon to take them over; until then keep that file, and do not copy the store".into(),
    });
    Ok((clusters, finding))
}

/// A cache that somebody has removed.
fn gone(what: String) -> Finding {
    Finding {
        severity: Severity::Warning,
        layer: None,
        what,
        fix: "if it was moved, put it back before the daemon starts; else check the guests' file systems".into(),
    }
}

/// A cache that cannot be looked at.
fn unreadable(place: &Place, error: &Error) -> Finding {
    // A daemon would refuse these as well; the rest may be for want of permission.
    let severity = match error {
        Error::Corrupt { .. } | Error::Unsupported { .. } => Severity::Error,
        _ => Severity::Warning,
    };
    Finding {
        severity,
        layer: None,
        what: format!("the cache that a daemon left behind cannot be used: {error}"),
        fix: format!(
            "it may hold writes that are in no file yet: check again as the daemon's user, or see what is wrong with {}",
            place.path().display()
        ),
    }
}
