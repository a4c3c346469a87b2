//! One simulated guest: reads and writes a volume through queue contexts, from memory of its own.

use std::collections::HashMap;

use stratablk_layers::file::Segment;
use stratablk_layers::units::{SECTOR_BYTES, Sector};
use stratablk_layers::volume::{Completion, Durability, Operation, QueueContext, RequestError};

use crate::oracle::{Value, unstamp};

/// A queue context with the memory of its requests.
pub struct Queue {
    /// The context. Dropped before the memory, which it may still use.
    context: QueueContext,
    /// The memory of each request under way.
    memory: HashMap<u64, Vec<u8>>,
    /// Reused.
    done: Vec<Completion>,
}

impl Queue {
    /// A queue over a context.
    pub fn new(context: QueueContext) -> Self {
        Self {
            context,
            memory: HashMap::new(),
            done: Vec::new(),
        }
    }

    /// The context.
    pub fn context(&mut self) -> &mut QueueContext {
        &mut self.context
    }

    /// Submits a request over `memory`, cut into segments at the given offsets.
    pub fn submit(
        &mut self,
        operation: Operation,
        durability: Durability,
        mut memory: Vec<u8>,
        cuts: &[usize],
        token: u64,
    ) {
        let base = memory.as_mut_ptr();
        let mut segments = Vec::new();
        let mut from = 0;
        for to in cuts.iter().copied().chain([memory.len()]) {
            if to > from {
                segments.push(Segment {
                    base: base.wrapping_add(from),
                    len: to - from,
                });
                from = to;
            }
        }
        self.memory.insert(token, memory);
        #[expect(unsafe_code, reason = "plays the part of the guest")]
        // SAFETY: the memory stays in `self.memory`, untouched, until the token was polled; the context is dropped first.
        unsafe {
            self.context.submit(operation, durability, &segments, token);
        }
    }

    /// The requests that have ended, with their memory.
    pub fn poll(&mut self) -> Vec<(u64, Result<(), RequestError>, Vec<u8>)> {
        self.context.poll(&mut self.done);
        let memory = &mut self.memory;
        let ended = self.done.drain(..);
        ended
            .map(|end| (end.token, end.result, memory.remove(&end.token).unwrap()))
            .collect()
    }

    /// Carries out one request to its end.
    pub fn run(
        &mut self,
        operation: Operation,
        memory: Vec<u8>,
    ) -> (Result<(), RequestError>, Vec<u8>) {
        self.begin(operation, memory);
        loop {
            if let Some((_, result, memory)) = self.poll().pop() {
                return (result, memory);
            }
            self.context.wait(-1).unwrap();
        }
    }

    /// As `run`, where nobody writes frames back but this function's helper.
    pub fn run_helped(
        &mut self,
        operation: Operation,
        memory: Vec<u8>,
        help: &dyn Fn(),
    ) -> (Result<(), RequestError>, Vec<u8>) {
        self.begin(operation, memory);
        for _ in 0..10_000 {
            if let Some((_, result, memory)) = self.poll().pop() {
                return (result, memory);
            }
            help();
            self.context.wait(0).unwrap();
        }
        panic!("{operation:?} does not end");
    }

    /// Submits one request.
    fn begin(&mut self, operation: Operation, memory: Vec<u8>) {
        self.context.begin_batch();
        self.submit(operation, Durability::AfterFlush, memory, &[], u64::MAX);
        self.context.kick();
    }

    /// Reads a whole disk with one request.
    pub fn read_all(&mut self, number: u64, sectors: u64) -> Result<Vec<Value>, String> {
        self.read_in_pieces(number, sectors, sectors)
    }

    /// Reads a whole disk with requests of so many sectors.
    pub fn read_in_pieces(
        &mut self,
        number: u64,
        sectors: u64,
        piece: u64,
    ) -> Result<Vec<Value>, String> {
        let mut values = Vec::new();
        for first in (0..sectors).step_by(piece as usize) {
            let count = piece.min(sectors - first);
            let bytes = vec![0xa5; (count * SECTOR_BYTES) as usize];
            let (result, bytes) = self.run(Operation::Read(Sector(first)), bytes);
            result.map_err(|error| format!("disk {number} cannot be read: {error:?}"))?;
            for (sector, bytes) in (first..).zip(bytes.chunks_exact(SECTOR_BYTES as usize)) {
                values.push(unstamp(number, sector, bytes)?);
            }
        }
        Ok(values)
    }
}
