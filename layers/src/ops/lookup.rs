//! Finding things in the catalog by name.

use crate::catalog::{CatalogState, LayerRow, VolumeRow};
use crate::error::{Error, Result};
use crate::units::LayerId;

impl CatalogState {
    /// The volume of this name.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn volume(&self, name: &str) -> Result<&VolumeRow> {
        self.volumes.get(name).ok_or_else(|| Error::NotFound {
            kind: "volume",
            name: name.to_owned(),
        })
    }

    /// A layer and all those below it, from the base up.
    pub fn chain_of(&self, top: LayerId) -> Vec<&LayerRow> {
        let mut chain = self.chain(top);
        chain.reverse();
        chain
    }
}
