//! The simulated engine: completes what was kicked in a random order, some of it only after several reaps.

use std::io;
use std::os::fd::RawFd;

use super::SimMedia;
use super::crash::Flight;
use super::observe::Event;
use super::world::{errno, in_range};
use crate::file::{Engine, IoDone, IoOp, Segment};

/// See the module's text.
#[derive(Debug)]
pub(super) struct SimEngine {
    media: SimMedia,
    depth: usize,
    /// Submitted, not kicked.
    queued: Vec<Operation>,
    /// Kicked, not completed.
    flying: Vec<Operation>,
    /// Completed, not reaped.
    done: Vec<IoDone>,
}

/// An operation on its way.
#[derive(Debug)]
struct Operation {
    user: u64,
    what: What,
}

/// What an operation does.
#[derive(Debug)]
enum What {
    Read {
        token: i32,
        offset: u64,
        segments: Vec<Segment>,
    },
    Write {
        token: i32,
        offset: u64,
        segments: Vec<Segment>,
    },
    Punch {
        token: i32,
        offset: u64,
        len: u64,
    },
    Sync {
        token: i32,
    },
    /// A kicked write or punch: the number of its flight.
    Flying(u64),
    /// A kicked sync: what it covers.
    Syncing {
        token: i32,
        mark: u64,
    },
    /// Nonsense, which fails.
    Refused,
}

#[expect(
    unsafe_code,
    reason = "raw pointers to a caller's memory, which is not tied to a thread"
)]
// SAFETY: the pointers are only used for copies under the promise of `Engine::submit`, which holds on whatever thread the
// engine is.
unsafe impl Send for What {}

impl SimEngine {
    pub(super) fn new(media: SimMedia, depth: u32) -> Self {
        let depth = usize::try_from(depth).unwrap_or(usize::MAX).max(1);
        Self {
            media,
            depth,
            queued: Vec::new(),
            flying: Vec::new(),
            done: Vec::new(),
        }
    }

    /// A number below `bound`.
    fn draw(&self, bound: usize) -> usize {
        self.media.world().random.index(bound)
    }

    /// Completes one of the operations under way; there is one.
    fn complete_one(&mut self) {
        let pick = self.draw(self.flying.len());
        let Operation { user, what } = self.flying.swap_remove(pick);
        let result = match what {
            What::Read {
                token,
                offset,
                segments,
            } => self.read(token, offset, &segments),
            What::Flying(number) => {
                let (event, (result, path)) = self.media.world().end_flight(number);
                self.media.point(event, path);
                result
            }
            What::Syncing { token, mark } => {
                let (result, path) = self.media.world().sync(token, mark);
                self.media.point(Event::SyncEnded, path);
                result
            }
            What::Write { .. } | What::Punch { .. } | What::Sync { .. } | What::Refused => {
                Err(errno(libc::EINVAL))
            }
        };
        self.done.push(IoDone { user, result });
    }

    fn read(&self, token: i32, offset: u64, segments: &[Segment]) -> io::Result<()> {
        let mut at = offset;
        let mut bytes = Vec::new();
        for segment in segments {
            bytes.clear();
            bytes.resize(segment.len, 0);
            self.media.world().read(token, &mut bytes, at)?;
            // SAFETY:
            // - The submitter promised that the segment is valid for writes and that nobody has a reference to it.
            // - `bytes` is our own and as long.
            #[expect(unsafe_code, reason = "scatters into a caller's raw memory")]
            unsafe {
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), segment.base, segment.len);
            }
            at += segment.len as u64;
        }
        Ok(())
    }
}

/// The bytes of a write, at the time of its kick.
fn gather(segments: &[Segment]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for segment in segments {
        let at = bytes.len();
        bytes.resize(at + segment.len, 0);
        // SAFETY:
        // - The submitter promised that the segment is valid for reads.
        // - `bytes` is our own and was grown by the segment's length.
        #[expect(unsafe_code, reason = "gathers a caller's raw memory")]
        unsafe {
            std::ptr::copy_nonoverlapping(
                segment.base,
                bytes.as_mut_ptr().wrapping_add(at),
                segment.len,
            );
        }
    }
    bytes
}

impl Engine for SimEngine {
    fn room(&self) -> usize {
        self.depth.saturating_sub(self.under_way())
    }

    #[expect(unsafe_code, reason = "the contract of the trait")]
    unsafe fn submit(&mut self, op: IoOp<'_>, user: u64) {
        assert!(self.room() > 0, "submitted without room");
        let total = |segments: &[Segment]| {
            segments
                .iter()
                .try_fold(0u64, |sum, segment| sum.checked_add(segment.len as u64))
        };
        let fits =
            |offset: u64, len: Option<u64>| len.is_some_and(|len| in_range(offset, len).is_ok());
        // Empty segments may have any address.
        let kept = |segments: &[Segment]| segments.iter().copied().filter(|s| s.len > 0).collect();
        let what = match op {
            IoOp::Read {
                file,
                offset,
                segments,
            } if fits(offset, total(segments)) => What::Read {
                token: file.0,
                offset,
                segments: kept(segments),
            },
            IoOp::Write {
                file,
                offset,
                segments,
            } if fits(offset, total(segments)) => What::Write {
                token: file.0,
                offset,
                segments: kept(segments),
            },
            IoOp::Punch { file, offset, len } if fits(offset, Some(len)) => What::Punch {
                token: file.0,
                offset,
                len,
            },
            IoOp::SyncData { file } => What::Sync { token: file.0 },
            IoOp::Read { .. } | IoOp::Write { .. } | IoOp::Punch { .. } => What::Refused,
        };
        self.queued.push(Operation { user, what });
    }

    fn kick(&mut self) -> io::Result<()> {
        for Operation { user, what } in std::mem::take(&mut self.queued) {
            let what = match what {
                What::Write {
                    token,
                    offset,
                    segments,
                } => {
                    let flight = Flight::Write {
                        token,
                        offset,
                        bytes: gather(&segments),
                    };
                    What::Flying(self.media.world().begin_flight(flight))
                }
                What::Punch { token, offset, len } => {
                    What::Flying(self.media.world().begin_flight(Flight::Punch {
                        token,
                        offset,
                        len,
                    }))
                }
                What::Sync { token } => {
                    let (mark, path) = {
                        let world = self.media.world();
                        (world.sync_mark(token), world.path(token))
                    };
                    self.media.point(Event::SyncBegun, path);
                    What::Syncing { token, mark }
                }
                other => other,
            };
            self.flying.push(Operation { user, what });
        }
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<IoDone>) -> io::Result<()> {
        for _ in 0..self.draw(self.flying.len() + 1) {
            self.complete_one();
        }
        done.append(&mut self.done);
        Ok(())
    }

    fn wait(&mut self) -> io::Result<()> {
        self.kick()?;
        if self.done.is_empty() && !self.flying.is_empty() {
            self.complete_one();
        }
        Ok(())
    }

    fn under_way(&self) -> usize {
        self.queued.len() + self.flying.len() + self.done.len()
    }

    fn wake_fd(&self) -> Option<RawFd> {
        None
    }
}

impl Drop for SimEngine {
    fn drop(&mut self) {
        while !self.flying.is_empty() {
            self.complete_one();
        }
    }
}
