//! What serving needs of the host besides what the front-ends have.

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use super::succession::Candidates;
use super::{Daemon, DaemonError};
use crate::confine::{self, Role};

/// Descriptors and threads, as far as they could be had.
#[derive(Debug, Default)]
pub(super) struct Means {
    /// Where clients come.
    pub clients: Option<tokio::net::UnixListener>,
    /// Looks after the store.
    pub upkeep: Option<JoinHandle<()>>,
    /// Carries out jobs.
    pub jobs: Option<JoinHandle<()>>,
}

impl Means {
    /// Takes what there is not yet; `candidates`, where processes come that take over, outlast one life of the daemon. May be
    /// done again when it has failed.
    ///
    /// # Errors
    /// The host's answer.
    pub fn take(
        &mut self,
        daemon: &Daemon,
        listener: &UnixListener,
        candidates: &mut Option<Candidates>,
    ) -> Result<(), DaemonError> {
        let host = |op| move |source| DaemonError::Host { op, source };
        if self.clients.is_none() {
            let socket = host("set up the control socket");
            listener.set_nonblocking(true).map_err(socket)?;
            // The other one is for who takes over.
            let same = listener.try_clone().map_err(socket)?;
            self.clients = Some(tokio::net::UnixListener::from_std(same).map_err(socket)?);
        }
        if self.upkeep.is_none() {
            let commands = Arc::clone(&daemon.commands);
            let work = move || {
                confine::enter(Role::Work);
                commands.maintain();
            };
            let thread = thread::Builder::new().name("upkeep".into()).spawn(work);
            self.upkeep = Some(thread.map_err(host("start a thread"))?);
        }
        if self.jobs.is_none() {
            let commands = Arc::clone(&daemon.commands);
            let work = move || {
                confine::enter(Role::Work);
                commands.run_jobs();
            };
            let thread = thread::Builder::new().name("jobs".into()).spawn(work);
            self.jobs = Some(thread.map_err(host("start a thread"))?);
        }
        if candidates.is_none() {
            let found = daemon.successors().map_err(host("start a thread"))?;
            *candidates = Some(found);
        }
        Ok(())
    }

    /// The threads that there are.
    pub fn threads(self) -> impl Iterator<Item = JoinHandle<()>> {
        self.upkeep.into_iter().chain(self.jobs)
    }
}
