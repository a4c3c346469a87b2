//! `stratablk-memcpy`: the physical limit to measure the daemon against, served by the daemon's own sessions, workers and
//! rings: a disk that is a piece of memory, and one copy a request.

mod copy;
mod memory;

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use stratablk::attach::{AttachOptions, SocketSource, start_disk};
use stratablk::worker::disk::{DiskContext, DiskSource};
use stratablk_layers::file::Segment;
use stratablk_layers::units::{SECTOR_BYTES, Sector};
use stratablk_layers::volume::{Completion, Durability, Operation, RequestError};

use self::copy::CopyKind;
use self::memory::{Memory, Pages};

/// Serves memory as a disk: no layers, no files, one copy a request. What a vhost-user back-end can reach on this machine.
///
/// Example: stratablk-memcpy --socket-path /run/limit.sock --size 268435456
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The socket to listen on.
    #[arg(long)]
    socket_path: PathBuf,
    /// Bytes of the disk.
    #[arg(long)]
    size: u64,
    /// Virtqueues, each with a worker thread of its own.
    #[arg(long, default_value_t = 1)]
    queues: u16,
    /// Which pages the memory has.
    #[arg(long, value_enum, default_value_t = Pages::Huge)]
    pages: Pages,
    /// How reads copy.
    #[arg(long, value_enum, default_value_t = CopyKind::FASTEST)]
    read_copy: CopyKind,
    /// How writes copy.
    #[arg(long, value_enum, default_value_t = CopyKind::FASTEST)]
    write_copy: CopyKind,
}

/// The disk.
struct MemoryDisk {
    /// What it holds.
    memory: Memory,
    /// How reads copy.
    read_copy: CopyKind,
    /// How writes copy.
    write_copy: CopyKind,
}

/// What serves one worker: every request ends while it is submitted.
struct MemoryContext {
    /// The disk.
    disk: Arc<MemoryDisk>,
    /// Requests that have ended and were not yet polled.
    ended: Vec<Completion>,
}

impl DiskSource for MemoryDisk {
    type Context = MemoryContext;

    fn name(&self) -> &'static str {
        "memcpy"
    }

    fn capacity(&self) -> Sector {
        Sector(self.memory.len() as u64 / SECTOR_BYTES)
    }

    fn context(self: &Arc<Self>, _read_only: bool) -> stratablk_layers::Result<MemoryContext> {
        Ok(MemoryContext {
            disk: Arc::clone(self),
            ended: Vec::new(),
        })
    }
}

impl MemoryDisk {
    /// Carries out a request.
    #[expect(unsafe_code, reason = "copies to and from guest memory")]
    fn carry_out(&self, operation: Operation, segments: &[Segment]) -> Result<(), RequestError> {
        let (start, to_guest) = match operation {
            Operation::Read(sector) => (sector, true),
            Operation::Write(sector) => (sector, false),
            // The limit has nothing to make durable, and what a discard leaves is of no interest.
            Operation::Flush | Operation::Discard(_) | Operation::WriteZeroes { .. } => {
                return Ok(());
            }
        };
        let mut offset = start.bytes().ok_or(RequestError::OutOfRange)?;
        for segment in segments {
            let place = self
                .memory
                .place(offset, segment.len)
                .ok_or(RequestError::OutOfRange)?;
            offset += segment.len as u64;
            let (kind, from, to) = if to_guest {
                (self.read_copy, place.cast_const(), segment.base)
            } else {
                (self.write_copy, segment.base.cast_const(), place)
            };
            // SAFETY:
            // - the worker promises its segments for this operation, and `place` lies in the mapping with all its bytes;
            // - the mapping is no guest memory, so the two do not overlap;
            // - bytes that two requests copy at once may be torn, as on any disk: no Rust reference to them exists.
            unsafe { copy::copy(kind, from, to, segment.len) };
        }
        Ok(())
    }
}

impl DiskContext for MemoryContext {
    fn end_held(&mut self, _chosen: &dyn Fn(u64) -> bool) -> bool {
        // Memory is never full.
        false
    }

    fn begin_batch(&mut self) {}

    #[expect(unsafe_code, reason = "the seam of a disk")]
    unsafe fn submit(
        &mut self,
        operation: Operation,
        _durability: Durability,
        segments: &[Segment],
        token: u64,
    ) {
        let result = self.disk.carry_out(operation, segments);
        self.ended.push(Completion { token, result });
    }

    fn kick(&mut self) {}

    fn poll(&mut self, done: &mut Vec<Completion>) {
        done.append(&mut self.ended);
    }

    fn wake_fds(&self) -> Vec<RawFd> {
        Vec::new()
    }

    fn under_way(&self) -> usize {
        self.ended.len()
    }
}

/// Serves until the process is ended.
fn serve(arguments: Arguments) -> Result<(), String> {
    let memory = Memory::new(arguments.size, arguments.pages).map_err(|error| error.to_string())?;
    let disk = Arc::new(MemoryDisk {
        memory,
        read_copy: arguments.read_copy,
        write_copy: arguments.write_copy,
    });
    let options = AttachOptions {
        queues: arguments.queues,
        ..AttachOptions::default()
    };
    let _attachment = start_disk(disk, SocketSource::Listen(arguments.socket_path), options)
        .map_err(|error| error.to_string())?;
    loop {
        std::thread::park();
    }
}

fn main() -> ExitCode {
    match serve(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stratablk-memcpy: {error}");
            ExitCode::FAILURE
        }
    }
}
