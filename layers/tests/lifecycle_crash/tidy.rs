//! Nothing is left behind: no files that no layer has, no layer that nobody needs.

use std::collections::BTreeSet;
use std::path::Path;

use stratablk_layers::catalog::{CatalogState, LayerState, VolumeKind};
use stratablk_layers::file::Media;
use stratablk_layers::file::sim::SimMedia;
use stratablk_layers::units::LayerId;

/// After a start: what was doomed is gone, and there are files of all layers and no others.
pub fn after_start(media: &SimMedia, state: &CatalogState) -> Result<(), String> {
    if !state.doomed.is_empty() {
        return Err(format!("doomed layers remain: {:?}", state.doomed));
    }
    let there: BTreeSet<String> = media
        .list(Path::new("layers"))
        .map_err(|error| error.to_string())?
        .into_iter()
        .collect();
    let wanted: BTreeSet<String> = state.layers.keys().map(LayerId::to_string).collect();
    let orphans: Vec<_> = there.difference(&wanted).collect();
    let missing: Vec<_> = wanted.difference(&there).collect();
    if orphans.is_empty() && missing.is_empty() {
        Ok(())
    } else {
        Err(format!(
            "directories that no layer has: {orphans:?}; layers without one: {missing:?}"
        ))
    }
}

/// After all jobs have ended: moreover each layer is needed, and stands for itself.
pub fn after_jobs(media: &SimMedia, state: &CatalogState) -> Result<(), String> {
    after_start(media, state)?;
    let content = |active: LayerId| state.layers.get(&active).and_then(|row| row.parent);
    let mut held: BTreeSet<LayerId> = state.snapshots.iter().map(|row| row.layer).collect();
    for row in state.volumes.values() {
        held.insert(row.active);
        if matches!(row.kind, VolumeKind::Immutable | VolumeKind::Multiattach) {
            held.extend(content(row.active));
        }
    }
    for job in state.jobs.values() {
        held.extend([job.source, job.target]);
    }
    for row in state.layers.values() {
        let children = state
            .layers
            .values()
            .filter(|child| child.parent == Some(row.id));
        let children = children.count();
        let needed =
            held.contains(&row.id) || children > 1 || (row.base.is_some() && children == 1);
        if !needed {
            return Err(format!(
                "layer {} has {children} children and no name, and is still there",
                row.id
            ));
        }
        let sealed = row.state == LayerState::Sealed;
        if children > 0 && !sealed {
            return Err(format!("layer {} is under others and not sealed", row.id));
        }
    }
    Ok(())
}
