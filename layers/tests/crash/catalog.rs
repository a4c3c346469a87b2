//! A catalog in memory whose commits are crash points. What SQLite promises: a commit is there whole, and durable, or not
//! at all.

use std::sync::{Arc, Mutex};

use stratablk_layers::Result;
use stratablk_layers::catalog::{Catalog, CatalogState, Change};
use stratablk_layers::file::sim::SimMedia;

/// The catalog of a simulated store; clones share what is durable.
#[derive(Clone, Debug)]
pub struct SimCatalog {
    /// What this daemon believes.
    state: CatalogState,
    /// What a restart finds.
    durable: Arc<Mutex<CatalogState>>,
    /// Where crash points are counted.
    media: SimMedia,
}

impl SimCatalog {
    /// A catalog that holds this.
    pub fn new(state: CatalogState, media: SimMedia) -> Self {
        Self { durable: Arc::new(Mutex::new(state.clone())), state, media }
    }

    /// What a restart would find now.
    pub fn state_now(&self) -> CatalogState {
        self.durable.lock().unwrap().clone()
    }

    /// The durable state, shared.
    pub fn durable(&self) -> Arc<Mutex<CatalogState>> {
        Arc::clone(&self.durable)
    }
}

impl Catalog for SimCatalog {
    fn state(&self) -> &CatalogState {
        &self.state
    }

    fn commit(&mut self, changes: &[Change]) -> Result<()> {
        let mut next = self.state.clone();
        next.apply(changes)?;
        self.media.mark("before a catalog commit");
        *self.durable.lock().unwrap() = next.clone();
        self.state = next;
        self.media.mark("after a catalog commit");
        Ok(())
    }
}
