//! A guest that works and verifies on a thread of its own, while a test does something else to the daemon.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use super::client::{Client, Counts, Fault};

/// Requests after which the guest lets all of them end, and forgets what was there before.
const PART: u64 = 2_000;

/// The guest at work. Ended when dropped.
#[derive(Debug)]
pub struct Background {
    /// Tells it to come to an end.
    stop: Arc<AtomicBool>,
    /// Its thread; `None` once it was waited for.
    thread: Option<JoinHandle<Result<Counts, Fault>>>,
}

impl Background {
    /// Starts the load of a guest.
    pub fn start(mut client: Client, socket: PathBuf) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        let work = move || {
            let mut link = client.connect(&socket)?;
            while !flag.load(Ordering::Relaxed) {
                client.load_part(&mut link, PART)?;
            }
            client.verify(&mut link, &AtomicBool::new(false))?;
            client.leave(link);
            Ok(client.counts)
        };
        Self {
            stop,
            thread: Some(thread::spawn(work)),
        }
    }

    /// Lets it end its requests, read its whole disk, and go.
    ///
    /// # Panics
    /// A request failed or hung, or the disk did not hold what it must.
    #[track_caller]
    pub fn finish(mut self) -> Counts {
        match self.halt() {
            Some(Ok(Ok(counts))) => counts,
            Some(Ok(Err(fault))) => panic!("the guest: {fault}"),
            Some(Err(_)) | None => panic!("the guest panicked"),
        }
    }

    /// Tells it to end, and waits for that.
    fn halt(&mut self) -> Option<thread::Result<Result<Counts, Fault>>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().map(JoinHandle::join)
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(Ok(Err(fault))) = self.halt() {
            eprintln!("the guest: {fault}");
        }
    }
}
