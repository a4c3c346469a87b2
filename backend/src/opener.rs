//! Volumes opened for threads that may not open files themselves.
//!
//! An attachment's thread is confined to the files of its volume as it was when it was attached. Which files those are
//! changes: a volume that is restored to a snapshot from before it was made independent lies over its image again. So the
//! thread asks for its volume, and a thread that may open what the control side may opens it. Each request gets a thread of its
//! own, so that no volume waits for another one's device.

use std::io;
use std::sync::OnceLock;
use std::sync::mpsc;
use std::thread;

use crate::confine::{self, Role};

/// What is to be done.
type Task = Box<dyn FnOnce() + Send>;

/// Has work done by threads with the rights of the control side.
#[derive(Debug, Default)]
pub struct Opener {
    /// Where the thread that starts the others gets its tasks from; unset until there is one.
    tasks: OnceLock<mpsc::Sender<Task>>,
}

impl Opener {
    /// Starts the thread that starts the others. To be called once, by a thread with the rights of the control side and after
    /// it is known where the files lie. It ends when this is dropped.
    ///
    /// # Errors
    /// The host's refusal of a thread.
    pub fn start(&self) -> io::Result<()> {
        let (sender, tasks) = mpsc::channel::<Task>();
        thread::Builder::new()
            .name("opener".into())
            .spawn(move || {
                confine::enter(Role::Control);
                for task in tasks {
                    let opening = thread::Builder::new().name("open".into()).spawn(|| {
                        confine::enter(Role::Work);
                        task();
                    });
                    // Whoever waits is told by the task's end.
                    if let Err(error) = opening {
                        tracing::error!(%error, "no thread to open a volume");
                    }
                }
            })?;
        if self.tasks.set(sender).is_err() {
            tracing::error!("the opener was started twice");
        }
        Ok(())
    }

    /// Has `work` done and waits for it. Does it itself if there is no such thread (in tests).
    ///
    /// # Errors
    /// It was not done: the host refused a thread, or it panicked.
    pub fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        let Some(tasks) = self.tasks.get() else {
            return Ok(work());
        };
        let (done, result) = mpsc::channel();
        let task = Box::new(move || {
            // A receiver less: nobody waits any more.
            let _ = done.send(work());
        });
        let failed = |_| io::Error::other("no thread could do it; the log says why");
        tasks.send(task).map_err(|_| failed(mpsc::RecvError))?;
        result.recv().map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_done_by_another_thread_and_a_panic_is_an_error() {
        let opener = Opener::default();
        let me = thread::current().id();
        assert_eq!(opener.run(move || thread::current().id()).ok(), Some(me));
        opener.start().expect("a thread");
        let other = opener.run(move || thread::current().id());
        assert_ne!(other.expect("it is done"), me);
        assert!(opener.run(|| panic!("as planned")).is_err());
        assert_eq!(opener.run(|| 7).ok(), Some(7), "it goes on");
    }
}
