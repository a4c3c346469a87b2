//! What the engine of the jobs gives to the commands on the tree, until it does.

use crate::catalog::{Change, JobId, JobKind, JobRow, JobState, LayerState, Way};
use crate::error::Result;
use crate::lifecycle::WayCost;
use crate::store::{Store, now_ns};
use crate::units::LayerId;

use std::time::Duration;

impl Store {
    /// The change that adds a job, the `nth` (from 0) that a transaction adds.
    pub(crate) fn job_change(
        &self,
        nth: u64,
        kind: JobKind,
        subject: String,
        source: LayerId,
        target: LayerId,
        way: Way,
    ) -> Change {
        Change::AddJob(JobRow {
            id: JobId(self.inner().catalog.state().next_job.saturating_add(nth)),
            kind,
            subject,
            source,
            target,
            way,
            state: JobState::Queued,
            error: None,
            rate: None,
            created_ns: now_ns(),
        })
    }

    /// What it costs to join two layers, each way that there is.
    pub(crate) fn way_costs(&self, lower: LayerId, upper: LayerId) -> Result<Vec<WayCost>> {
        let active = {
            let inner = self.inner();
            let row = inner.catalog.state().layers.get(&upper);
            row.is_some_and(|row| row.state == LayerState::Active)
        };
        let (up, down) = (self.allocated(lower), self.allocated(upper));
        let other = if active { Way::InPlace } else { Way::Down };
        let cost = |way, bytes, chosen| WayCost {
            way,
            bytes,
            space: bytes.min(64 << 20),
            estimate: Duration::from_millis(bytes >> 18),
            chosen,
        };
        Ok(vec![
            cost(Way::Up, up, up <= down),
            cost(other, down, down < up),
        ])
    }
}
