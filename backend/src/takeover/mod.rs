//! A new process, perhaps of a newer program, goes on where the running daemon is: with its store, its sockets and its
//! connections, so that guests notice no more than a pause.
//!
//! ```text
//! running daemon                                  new process (`serve --takeover`)
//! listens on STORE/takeover.sock     <- Hello --  all that can fail without the store has been done
//! lets no command in, flushes, sees what is under way come to an end, ends jobs -- guests are served meanwhile
//! ends rings, closes the store (as a crash would, but for the lock)          } guests wait
//!                                    -- Head, volumes, sessions, messages -> }
//!                                    <- Received --                          }
//!                                    -- Open ->                              } opens the store, tells sessions what was said
//!                                    <- Ready --                             } everything is there
//!                                    -- Yours ->                             } rings run
//! ends                                            says that it is ready, closes the connection
//! ```
//!
//! # Whose it is
//! `Yours` decides. Before it the new process takes nothing from a ring, accepts nobody and answers no command; after it the
//! running daemon does nothing any more. It keeps a handle of all that it has handed over until then, and if the new process
//! ends, or is not ready in time, takes it over itself, in the same way: there is one way to take over, whoever does it.
//!
//! Before `Open` the new process has touched nothing, and the running daemon goes on whenever it likes: one that is stopped, or
//! hangs, is not waited for. After `Open` it has the store, so the running daemon may go on only when it has ended. Neither
//! closes the connection while it lives and the matter is not decided, so its end says that. The new process ends itself if
//! it cannot be ready in time ([`taker`]). If the running daemon goes after `Open`, everything is the new one's.

pub mod giver;
pub mod package;
pub mod taker;
mod wire;

use std::path::{Path, PathBuf};
use std::time::Duration;

/// The version of what is said; a process that speaks another one is refused, with the running daemon as it was.
pub const VERSION: u32 = 1;
/// How long a new process may take from the moment it has been handed everything until it is ready.
pub const READY_LIMIT: Duration = Duration::from_secs(10);

/// The socket that the daemon of the store in `dir` listens on.
pub fn socket_path(dir: &Path) -> PathBuf {
    dir.join("takeover.sock")
}

/// Nanoseconds of a clock that all processes of the host see.
pub fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(nanos)
}
