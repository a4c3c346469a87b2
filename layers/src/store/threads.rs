//! The threads that go with the cache of a store.

use std::sync::Arc;
use std::thread::JoinHandle;

use crate::cache::Cache;
use crate::cache::writeback::WriteBack;
use crate::error::{Error, Result};
use crate::sync::{AtomicBool, Ordering};

/// Those of one store. Dropping it ends them.
#[derive(Debug)]
pub(super) struct CacheThreads {
    /// Whose bell ends the thread that writes back.
    cache: Arc<Cache>,
    /// Ends the thread that asks for huge pages.
    stop: Arc<AtomicBool>,
    /// To be joined.
    threads: Vec<JoinHandle<()>>,
    /// Called first by each of them.
    on_thread: Option<fn()>,
}

impl CacheThreads {
    /// Starts them.
    pub(super) fn start(
        cache: &Arc<Cache>,
        write_back: &Arc<WriteBack>,
        on_thread: Option<fn()>,
    ) -> Result<Self> {
        let mut started = Self {
            cache: Arc::clone(cache),
            stop: Arc::new(AtomicBool::new(false)),
            threads: Vec::new(),
            on_thread,
        };
        let work = Arc::clone(write_back);
        started.spawn("write-back", move || work.run())?;
        if cache.options().huge_pages && cache.options().place.is_some() {
            let (cache, stop) = (Arc::clone(cache), Arc::clone(&started.stop));
            started.spawn("huge-pages", move || {
                cache.arena().huge_pages(&stop);
            })?;
        }
        Ok(started)
    }

    /// Starts one.
    fn spawn(&mut self, name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
        let on_thread = self.on_thread;
        let thread = std::thread::Builder::new()
            .name(name.into())
            .spawn(move || {
                if let Some(begin) = on_thread {
                    begin();
                }
                work();
            })
            .map_err(|source| Error::Io {
                op: "start a thread for",
                path: "the cache".into(),
                source,
            })?;
        self.threads.push(thread);
        Ok(())
    }
}

impl Drop for CacheThreads {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.cache.bell().close();
        for thread in self.threads.drain(..) {
            // A panic has said what it had to say.
            let _ = thread.join();
        }
    }
}
