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
        self.context.begin_batch();
        self.submit(operation, Durability::AfterFlush, memory, &[], u64::MAX);
        self.context.kick();
        loop {
            if let Some((_, result, memory)) = self.poll().pop() {
                return (result, memory);
            }
            self.context.wait(-1).unwrap();
        }
    }

    /// Reads a whole disk.
    pub fn read_all(&mut self, number: u64, sectors: u64) -> Result<Vec<Value>, String> {
        let bytes = vec![0xa5; (sectors * SECTOR_BYTES) as usize];
        let (result, bytes) = self.run(Operation::Read(Sector(0)), bytes);
        result.map_err(|error| format!("disk {number} cannot be read: {error:?}"))?;
        let chunks = bytes.chunks_exact(SECTOR_BYTES as usize);
        (0..)
            .zip(chunks)
            .map(|(sector, bytes)| unstamp(number, sector, bytes))
            .collect()
    }
}
