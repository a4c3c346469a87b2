//! What happens in the daemon, told to everybody who listens: one bounded channel to all event streams.
//!
//! Nobody waits for a listener. One that is too slow loses the oldest events and is told how many.

use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;
use utoipa::ToSchema;

use super::timestamp::Timestamp;
use super::types::{Job, VolumeType};

/// Events kept for a listener that lags.
const BACKLOG: usize = 256;
/// The most listeners at once, well below the limit of connections, so that they cannot keep commands out.
pub const LISTENERS_MAX: usize = 64;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Happening {
    /// A volume was created.
    VolumeCreated {
        /// Its name.
        volume: String,
    },
    /// A volume was deleted.
    VolumeDeleted {
        /// Its name.
        volume: String,
    },
    /// A volume takes no more writes since a write or sync failed.
    VolumeFailed {
        /// Its name.
        volume: String,
        /// The first failure, in words.
        message: String,
    },
    /// A volume that had failed was recovered.
    VolumeRecovered {
        /// Its name.
        volume: String,
    },
    /// The host has no space for what a volume has to write.
    VolumeNoSpace {
        /// Its name.
        volume: String,
    },
    /// The host has space again for what a volume had to write.
    VolumeHasSpace {
        /// Its name.
        volume: String,
    },
    /// A volume is served on a socket from now on.
    VolumeAttached {
        /// Its name.
        volume: String,
        /// The path of the socket.
        socket: String,
    },
    /// A volume is no longer served.
    VolumeDetached {
        /// Its name.
        volume: String,
    },
    /// A remembered attachment could not be set up.
    AttachFailed {
        /// The volume's name.
        volume: String,
        /// Why.
        message: String,
    },
    /// A front-end has connected to a volume's socket.
    FrontendConnected {
        /// The volume's name.
        volume: String,
    },
    /// The front-end of a volume has gone.
    FrontendDisconnected {
        /// The volume's name.
        volume: String,
    },
    /// A snapshot was taken, of all these volumes at one instant.
    SnapshotCreated {
        /// The snapshot's name.
        snapshot: String,
        /// The volumes.
        volumes: Vec<String>,
    },
    /// A snapshot's name is gone; what is to be done with its data is done by jobs.
    SnapshotDeleted {
        /// The volume's name.
        volume: String,
        /// The snapshot's name.
        snapshot: String,
    },
    /// Volumes hold again what a snapshot holds.
    VolumesRestored {
        /// The volumes.
        volumes: Vec<String>,
        /// The snapshot's name.
        snapshot: String,
        /// The name of the snapshot that keeps what was written since; `null` if it was thrown away.
        kept: Option<String>,
    },
    /// A volume has another size.
    VolumeResized {
        /// Its name.
        volume: String,
        /// Its size in bytes from now on.
        size_bytes: u64,
    },
    /// A volume has another type.
    VolumeTypeChanged {
        /// Its name.
        volume: String,
        /// Its type from now on.
        #[serde(rename = "type")]
        kind: VolumeType,
    },
    /// A job is there, or goes on after it had ended.
    JobBegan {
        /// The job.
        job: Job,
    },
    /// A job has got on, rests, or goes on. Told at most once a second for what it has copied.
    JobProgress {
        /// The job.
        job: Job,
    },
    /// A job is done, was cancelled, or has failed.
    JobEnded {
        /// The job.
        job: Job,
    },
    /// This listener was too slow and lost events.
    Missed {
        /// How many.
        count: u64,
    },
}

impl Happening {
    /// The name of the event in a stream of server-sent events; equal to the tag in its JSON.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::VolumeCreated { .. } => "volume-created",
            Self::VolumeDeleted { .. } => "volume-deleted",
            Self::VolumeFailed { .. } => "volume-failed",
            Self::VolumeRecovered { .. } => "volume-recovered",
            Self::VolumeNoSpace { .. } => "volume-no-space",
            Self::VolumeHasSpace { .. } => "volume-has-space",
            Self::VolumeAttached { .. } => "volume-attached",
            Self::VolumeDetached { .. } => "volume-detached",
            Self::AttachFailed { .. } => "attach-failed",
            Self::FrontendConnected { .. } => "frontend-connected",
            Self::FrontendDisconnected { .. } => "frontend-disconnected",
            Self::SnapshotCreated { .. } => "snapshot-created",
            Self::SnapshotDeleted { .. } => "snapshot-deleted",
            Self::VolumesRestored { .. } => "volumes-restored",
            Self::VolumeResized { .. } => "volume-resized",
            Self::VolumeTypeChanged { .. } => "volume-type-changed",
            Self::JobBegan { .. } => "job-began",
            Self::JobProgress { .. } => "job-progress",
            Self::JobEnded { .. } => "job-ended",
            Self::Missed { .. } => "missed",
        }
    }
}

/// An event as it is sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Counts the events of this daemon from 1.
    pub id: u64,
    /// When it happened.
    #[schema(value_type = String, format = DateTime)]
    pub time: Timestamp,
    /// What happened.
    #[serde(flatten)]
    pub what: Happening,
}

/// The sending side. Shared by everything that has something to tell.
#[derive(Debug)]
pub struct Events {
    /// Held for the moment of sending, so that events arrive in the order of their ids.
    state: Mutex<State>,
}

/// What the lock guards.
#[derive(Debug)]
struct State {
    /// The channel; `None` once the daemon is about to exit.
    sender: Option<broadcast::Sender<Event>>,
    /// The id of the last event.
    last: u64,
}

impl Default for Events {
    fn default() -> Self {
        let (sender, _) = broadcast::channel(BACKLOG);
        Self {
            state: Mutex::new(State {
                sender: Some(sender),
                last: 0,
            }),
        }
    }
}

impl Events {
    /// The state, also after a panic elsewhere: it is never left half changed.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells everybody who listens now. Never waits.
    pub fn tell(&self, what: Happening) {
        let mut state = self.state();
        state.last += 1;
        let event = Event {
            id: state.last,
            time: Timestamp::now(),
            what,
        };
        if let Some(sender) = &state.sender {
            // An error only says that nobody listens.
            let _ = sender.send(event);
        }
    }

    /// A listener for all later events; `None` if there are too many already, or the daemon is about to exit.
    pub fn listen(&self) -> Option<broadcast::Receiver<Event>> {
        let state = self.state();
        let sender = state
            .sender
            .as_ref()
            .filter(|s| s.receiver_count() < LISTENERS_MAX)?;
        Some(sender.subscribe())
    }

    /// Ends all streams once they have sent what is left.
    pub fn close(&self) {
        self.state().sender.take();
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn listeners_hear_in_order_and_the_stream_ends_on_close() {
        let events = Events::default();
        events.tell(Happening::VolumeCreated {
            volume: "unheard".into(),
        });
        let mut listener = events.listen().unwrap();
        events.tell(Happening::VolumeCreated { volume: "a".into() });
        events.tell(Happening::VolumeDeleted { volume: "a".into() });
        let first = listener.try_recv().unwrap();
        assert_eq!((first.id, first.what.name()), (2, "volume-created"));
        assert_eq!(listener.try_recv().unwrap().id, 3);
        events.close();
        assert_eq!(
            listener.try_recv(),
            Err(broadcast::error::TryRecvError::Closed)
        );
        assert!(events.listen().is_none());
    }

    #[test]
    fn listeners_are_bounded() {
        let events = Events::default();
        let held: Vec<_> = (0..LISTENERS_MAX)
            .map(|_| events.listen().unwrap())
            .collect();
        assert!(events.listen().is_none());
        drop(held);
        assert!(events.listen().is_some());
    }

    #[test]
    fn the_name_is_the_tag() {
        let what = Happening::FrontendConnected {
            volume: "web".into(),
        };
        let json = serde_json::to_value(Event {
            id: 1,
            time: Timestamp(0),
            what: what.clone(),
        });
        let json = json.unwrap();
        assert_eq!(json["event"], what.name());
        assert_eq!(json["volume"], "web");
    }
}
