//! How commands get from the control thread to a thread that may block: a bounded number at once, a bounded number that waits,
//! none after closing, and each to its end even if its client leaves.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};

use super::commands::Commands;
use super::error::{ApiError, Result};
use super::events::LISTENERS_MAX;
use super::server::CONNECTIONS_MAX;

/// Commands that run at once; more wait for their turn. Each has a thread while it runs.
pub const COMMANDS_MAX: u32 = 32;
/// The most that wait for their turn. Each has a connection that no newcomer gets: together with those that run and with
/// listeners they are fewer than there may be.
pub const WAITING_MAX: usize = 96;

const _: () = assert!(COMMANDS_MAX as usize + WAITING_MAX + LISTENERS_MAX < CONNECTIONS_MAX);

/// The way to the commands.
#[derive(Debug)]
pub struct Gate {
    /// What passes goes to these.
    commands: Arc<Commands>,
    /// One permit a running command.
    permits: Arc<Semaphore>,
    /// One permit a client whose command runs or waits.
    places: Semaphore,
    /// Whether the daemon is about to exit.
    closing: AtomicBool,
}

impl Gate {
    /// An open gate before the commands.
    pub fn new(commands: Arc<Commands>) -> Self {
        let permits = Arc::new(Semaphore::new(COMMANDS_MAX as usize));
        Self {
            commands,
            permits,
            places: Semaphore::new(COMMANDS_MAX as usize + WAITING_MAX),
            closing: AtomicBool::new(false),
        }
    }

    /// The commands themselves, for what does not block.
    pub const fn commands(&self) -> &Arc<Commands> {
        &self.commands
    }

    /// Runs a command on a thread that may block, and waits for it. Dropping the future does not stop the command.
    ///
    /// # Errors
    /// Those of the command; `Unavailable` if too many wait already, or once the gate is closed; `Internal` if the command
    /// panicked.
    pub async fn run<T, F>(&self, command: F) -> Result<T>
    where
        F: FnOnce(&Commands) -> Result<T> + Send + 'static,
        T: Send + 'static,
    {
        let leaving = || ApiError::unavailable("the daemon is about to exit");
        // ORDERING: Relaxed; only a short cut for newcomers, the closed semaphore is what counts.
        if self.closing.load(Ordering::Relaxed) {
            return Err(leaving());
        }
        let _place = self.places.try_acquire().map_err(|_| {
            ApiError::unavailable(format!(
                "{COMMANDS_MAX} commands run and {WAITING_MAX} wait for their turn; try again when some of them have ended"
            ))
        })?;
        let permit = Arc::clone(&self.permits)
            .acquire_owned()
            .await
            .map_err(|_| leaving())?;
        let commands = Arc::clone(&self.commands);
        let task = tokio::task::spawn_blocking(move || {
            // Held by the thread, not by the client's future: it ends with the command.
            let _permit = permit;
            command(&commands)
        });
        task.await.unwrap_or_else(|error| {
            tracing::error!("a control command panicked: {error}");
            Err(ApiError::internal(
                "the command failed inside the daemon; see its log",
            ))
        })
    }

    /// Lets no new command in until what is returned is dropped, and waits for those inside, at most `patience`. `None` if
    /// they have not ended.
    pub async fn hold(&self, patience: Duration) -> Option<SemaphorePermit<'_>> {
        let all = self.permits.acquire_many(COMMANDS_MAX);
        tokio::time::timeout(patience, all).await.ok()?.ok()
    }

    /// Lets no new command in, ever. Those that wait are told so.
    pub fn shut(&self) {
        // ORDERING: Relaxed; see `run`.
        self.closing.store(true, Ordering::Relaxed);
        self.permits.close();
    }

    /// Lets no new command in and waits for those inside, at most `patience`. Says whether all have ended.
    pub async fn close(&self, patience: Duration) -> bool {
        // ORDERING: Relaxed; see `run`.
        self.closing.store(true, Ordering::Relaxed);
        let all = tokio::time::timeout(patience, self.permits.acquire_many(COMMANDS_MAX)).await;
        self.permits.close();
        all.is_ok()
    }
}
