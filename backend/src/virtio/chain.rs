//! A descriptor chain, resolved to memory of this process.
//!
//! [`Chain::walk`] follows a chain from its head and collects its readable and its writable buffers as segments, cut
//! where guest memory is not contiguous here. It reads every descriptor once, and never more of them than the table has.
//! SPEC: virtio 1.2, 2.7.5.
//!
//! A chain whose shape is wrong is [`Malformed`]. A chain of the right shape with a buffer outside guest memory is
//! walked to its end all the same ([`Chain::is_whole`] is false), so that its status byte can be found.

use std::sync::atomic::Ordering;

use stratablk_layers::file::Segment;
use virtio_queue::desc::split::Descriptor;
use vm_memory::volatile_memory::VolatileSlice;
use vm_memory::{Address, Bytes, GuestAddress};

use super::ring::{DESCRIPTOR_BYTES, RING_SIZE_MAX};
use crate::vhost::memory::GuestMemory;

/// Descriptors of an indirect table. A driver may use tables longer than the ring, and Linux does if the device accepts
/// more segments than the ring has entries; the largest ring is a bound that both sides know.
pub const INDIRECT_ENTRIES_MAX: u16 = RING_SIZE_MAX;

/// What is wrong with the shape of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// More descriptors than the table has: a circle.
    #[error("the chain is longer than its table")]
    TooLong,
    /// A `next` outside the table.
    #[error("a descriptor names a next one that does not exist")]
    NoSuchDescriptor,
    /// A readable buffer after a writable one.
    #[error("a readable buffer follows a writable one")]
    Order,
    /// An indirect descriptor that was not negotiated, inside an indirect table, or that has a next one.
    #[error("an indirect descriptor where none may be")]
    Indirect,
    /// An indirect table whose length is zero, no multiple of 16, or too large, or that lies outside guest memory.
    #[error("an indirect table with an impossible length or place")]
    IndirectTable,
}

/// A table of descriptors.
enum Table<'a> {
    /// Contiguous in this process.
    Here(VolatileSlice<'a>),
    /// In guest memory, contiguous only for the guest.
    Guest(&'a GuestMemory, GuestAddress),
}

impl Table<'_> {
    /// Reads the descriptor at `index`. `None` if it does not lie in the table.
    #[inline]
    fn read(&self, index: u16) -> Option<Descriptor> {
        let offset = usize::from(index) * DESCRIPTOR_BYTES;
        match self {
            Self::Here(table) => read_descriptor(table, offset),
            Self::Guest(memory, start) => {
                let place = start.checked_add(offset as u64)?;
                read_descriptor(&memory.translate(place, DESCRIPTOR_BYTES as u64)?, 0)
            }
        }
    }
}

/// Reads the descriptor at `offset` of a table, once: two loads, unless the guest put the table at an odd place.
#[inline]
fn read_descriptor(table: &VolatileSlice<'_>, offset: usize) -> Option<Descriptor> {
    let half = |offset| {
        let half: Result<u64, _> = table.load(offset, Ordering::Relaxed);
        half.map(u64::from_le)
    };
    match (half(offset), half(offset + DESCRIPTOR_BYTES / 2)) {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "the three fields of the upper half"
        )]
        (Ok(low), Ok(high)) => Some(Descriptor::new(
            low,
            high as u32,
            (high >> 32) as u16,
            (high >> 48) as u16,
        )),
        _ => table.read_obj(offset).ok(),
    }
}

/// The buffers of one chain. Reused from request to request, so that the lists need not be allocated again.
#[derive(Debug, Default)]
pub struct Chain {
    /// What the device may read, in order, without empty buffers.
    pub readable: Vec<Segment>,
    /// What the device may write, in order, without empty buffers.
    pub writable: Vec<Segment>,
    /// The guest address of each element of `writable`.
    pub writable_guest: Vec<GuestAddress>,
    /// Bytes of all readable buffers, those outside memory counted.
    pub readable_len: u64,
    /// Bytes of all writable buffers, those outside memory counted.
    pub writable_len: u64,
    /// Whether every readable buffer lies in guest memory.
    readable_whole: bool,
    /// Whether every writable buffer lies in guest memory.
    writable_whole: bool,
    /// Whether the last writable buffer lies in guest memory.
    end_whole: bool,
}

impl Chain {
    /// Whether every buffer lies in guest memory.
    pub fn is_whole(&self) -> bool {
        self.readable_whole && self.writable_whole
    }

    /// Whether every readable buffer lies in guest memory.
    pub fn readable_is_whole(&self) -> bool {
        self.readable_whole
    }

    /// Whether the last writable byte lies in guest memory.
    pub fn end_is_whole(&self) -> bool {
        self.end_whole
    }

    /// Forgets the last chain.
    fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
        self.writable_guest.clear();
        self.readable_len = 0;
        self.writable_len = 0;
        self.readable_whole = true;
        self.writable_whole = true;
        self.end_whole = false;
    }

    /// Follows the chain from `head` of a table with `size` descriptors. The collected segments are valid as long as
    /// `memory` is.
    ///
    /// # Errors
    /// `Malformed`; what was collected means nothing then.
    pub fn walk(
        &mut self,
        memory: &GuestMemory,
        table: VolatileSlice<'_>,
        size: u16,
        head: u16,
        indirect_allowed: bool,
    ) -> Result<(), Malformed> {
        self.clear();
        let indirect = self.follow(memory, &Table::Here(table), size, head, indirect_allowed)?;
        let Some(indirect) = indirect else {
            return Ok(());
        };
        let (address, len) = (indirect.addr(), indirect.len());
        let bytes = usize::try_from(len).map_err(|_| Malformed::IndirectTable)?;
        let entries = u16::try_from(bytes / DESCRIPTOR_BYTES).unwrap_or(u16::MAX);
        if bytes == 0 || !bytes.is_multiple_of(DESCRIPTOR_BYTES) || entries > INDIRECT_ENTRIES_MAX {
            return Err(Malformed::IndirectTable);
        }
        let run = memory
            .translate(address, u64::from(len))
            .ok_or(Malformed::IndirectTable)?;
        let table = if run.len() == bytes {
            Table::Here(run)
        } else {
            Table::Guest(memory, address)
        };
        self.follow(memory, &table, entries, 0, false)?;
        Ok(())
    }

    /// Follows descriptors inside one table. Returns the indirect descriptor that ends it, if one does.
    fn follow(
        &mut self,
        memory: &GuestMemory,
        table: &Table<'_>,
        size: u16,
        first: u16,
        indirect_allowed: bool,
    ) -> Result<Option<Descriptor>, Malformed> {
        let mut index = first;
        for _ in 0..size {
            if index >= size {
                return Err(Malformed::NoSuchDescriptor);
            }
            let descriptor = table.read(index).ok_or(Malformed::IndirectTable)?;
            let has_next = descriptor.has_next();
            if descriptor.refers_to_indirect_table() {
                // The WRITE flag of such a descriptor means nothing.
                return if indirect_allowed && !has_next {
                    Ok(Some(descriptor))
                } else {
                    Err(Malformed::Indirect)
                };
            }
            self.add(memory, &descriptor)?;
            if !has_next {
                return Ok(None);
            }
            index = descriptor.next();
        }
        Err(Malformed::TooLong)
    }

    /// Adds the buffer of a descriptor.
    fn add(&mut self, memory: &GuestMemory, descriptor: &Descriptor) -> Result<(), Malformed> {
        let writable = descriptor.is_write_only();
        let mut rest = u64::from(descriptor.len());
        if rest == 0 {
            return Ok(());
        }
        if writable {
            self.writable_len += rest;
        } else if self.writable_len > 0 {
            return Err(Malformed::Order);
        } else {
            self.readable_len += rest;
        }
        let mut address = descriptor.addr();
        while rest > 0 {
            let Some(run) = memory.translate(address, rest) else {
                break;
            };
            let segment = Segment {
                base: run.ptr_guard_mut().as_ptr(),
                len: run.len(),
            };
            if writable {
                self.writable.push(segment);
                self.writable_guest.push(address);
            } else {
                self.readable.push(segment);
            }
            rest -= run.len() as u64;
            // A region that ends at the very last address is the last run of any buffer.
            let Some(next) = address.checked_add(run.len() as u64) else {
                break;
            };
            address = next;
        }
        let whole = rest == 0;
        if writable {
            self.writable_whole &= whole;
            self.end_whole = whole;
        } else {
            self.readable_whole &= whole;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_guest::{INDIRECT, NEXT, Outcome, TestGuest, WRITE};
    use super::*;
    use proptest::prelude::*;

    fn walk(guest: &TestGuest, head: u16) -> Outcome {
        guest.walk(head, true)
    }

    #[test]
    fn buffers_come_in_order_without_the_empty_ones() {
        let guest = TestGuest::new(8);
        guest.descriptor(2, 0x1000, 16, NEXT, 5);
        guest.descriptor(5, 0, 0, NEXT, 0);
        guest.descriptor(0, 0x2000, 100, NEXT | WRITE, 1);
        guest.descriptor(1, 0x3000, 1, WRITE, 7);
        let chain = walk(&guest, 2).expect("a good chain");
        assert_eq!(chain.readable_len, 16);
        assert_eq!(chain.writable_len, 101);
        assert_eq!(chain.writable_guest, [0x2000, 0x3000].map(GuestAddress));
        assert!(chain.is_whole() && chain.end_is_whole());
    }

    #[test]
    fn a_buffer_is_cut_at_the_border_of_two_regions() {
        let guest = TestGuest::new(8);
        let border = guest.second_region();
        guest.descriptor(0, border - 10, 30, WRITE, 0);
        let chain = walk(&guest, 0).expect("a good chain");
        let lens: Vec<usize> = chain.writable.iter().map(|segment| segment.len).collect();
        assert_eq!(lens, vec![10, 20]);
        assert_eq!(
            chain.writable_guest,
            [border - 10, border].map(GuestAddress)
        );
    }

    #[test]
    fn circles_end() {
        let guest = TestGuest::new(8);
        guest.descriptor(0, 0x1000, 16, NEXT, 1);
        guest.descriptor(1, 0x1000, 16, NEXT, 0);
        assert_eq!(walk(&guest, 0).err(), Some(Malformed::TooLong));
        guest.descriptor(3, 0, 0, NEXT, 3);
        assert_eq!(walk(&guest, 3).err(), Some(Malformed::TooLong));
        guest.descriptor(4, 0x1000, 16, NEXT, 8);
        assert_eq!(walk(&guest, 4).err(), Some(Malformed::NoSuchDescriptor));
    }

    #[test]
    fn readable_after_writable_is_refused() {
        let guest = TestGuest::new(8);
        guest.descriptor(0, 0x1000, 1, NEXT | WRITE, 1);
        guest.descriptor(1, 0x1000, 16, 0, 0);
        assert_eq!(walk(&guest, 0).err(), Some(Malformed::Order));
    }

    #[test]
    fn a_buffer_outside_memory_leaves_the_rest_readable() {
        let guest = TestGuest::new(8);
        guest.descriptor(0, 0x1000, 16, NEXT, 1);
        guest.descriptor(1, u64::MAX - 5, 4096, NEXT | WRITE, 2);
        guest.descriptor(2, 0x3000, 1, WRITE, 0);
        let chain = walk(&guest, 0).expect("the shape is good");
        assert!(!chain.is_whole());
        assert!(chain.readable_is_whole() && chain.end_is_whole());
        assert_eq!(chain.writable_len, 4097);
        guest.descriptor(2, guest.guest_end() - 1, 2, WRITE, 0);
        let chain = walk(&guest, 0).expect("the shape is good");
        assert!(!chain.end_is_whole());
    }

    #[test]
    fn indirect_tables_follow_normal_descriptors() {
        let guest = TestGuest::new(8);
        guest.descriptor(0, 0x1000, 16, NEXT, 1);
        guest.descriptor(1, 0x4000, 32, INDIRECT | WRITE, 0);
        guest.descriptor_at(0x4000, 0x2000, 512, NEXT | WRITE, 1);
        guest.descriptor_at(0x4010, 0x3000, 1, WRITE, 0);
        let chain = walk(&guest, 0).expect("a good chain");
        assert_eq!((chain.readable_len, chain.writable_len), (16, 513));
        assert_eq!(
            guest.walk(0, false).err(),
            Some(Malformed::Indirect),
            "not negotiated"
        );

        guest.descriptor(1, 0x4000, 32, INDIRECT | NEXT, 0);
        assert_eq!(
            walk(&guest, 0).err(),
            Some(Malformed::Indirect),
            "with a next one"
        );
        guest.descriptor(1, 0x4000, 32, INDIRECT, 0);
        guest.descriptor_at(0x4010, 0x5000, 16, INDIRECT, 0);
        assert_eq!(walk(&guest, 0).err(), Some(Malformed::Indirect), "nested");
        guest.descriptor_at(0x4010, 0x5000, 16, NEXT | WRITE, 0);
        assert_eq!(
            walk(&guest, 0).err(),
            Some(Malformed::TooLong),
            "a circle in the table"
        );
        guest.descriptor_at(0x4000, 0x5000, 16, NEXT | WRITE, 2);
        assert_eq!(walk(&guest, 0).err(), Some(Malformed::NoSuchDescriptor));
    }

    #[test]
    fn impossible_indirect_tables_are_refused() {
        let guest = TestGuest::new(8);
        for len in [0u32, 1, 15, 17, 16 * 1025, u32::MAX, u32::MAX - 15] {
            guest.descriptor(0, 0x4000, len, INDIRECT, 0);
            assert_eq!(
                walk(&guest, 0).err(),
                Some(Malformed::IndirectTable),
                "{len}"
            );
        }
        guest.descriptor(0, u64::MAX - 8, 16, INDIRECT, 0);
        assert_eq!(walk(&guest, 0).err(), Some(Malformed::IndirectTable));
        guest.descriptor(0, guest.guest_end() - 16, 32, INDIRECT, 0);
        guest.descriptor_at(guest.guest_end() - 16, 0x1000, 16, NEXT, 1);
        assert_eq!(
            walk(&guest, 0).err(),
            Some(Malformed::IndirectTable),
            "runs out of memory"
        );
    }

    #[test]
    fn an_indirect_table_may_span_two_regions_and_be_unaligned() {
        let guest = TestGuest::new(8);
        let start = guest.second_region() - 16;
        guest.descriptor(0, start, 32, INDIRECT, 0);
        guest.descriptor_at(start, 0x1000, 16, NEXT, 1);
        guest.descriptor_at(start + 16, 0x3000, 1, WRITE, 0);
        let chain = walk(&guest, 0).expect("a good chain");
        assert_eq!((chain.readable_len, chain.writable_len), (16, 1));
        guest.descriptor(0, 0x4003, 32, INDIRECT, 0);
        guest.descriptor_at(0x4003, 0x1000, 16, NEXT, 1);
        guest.descriptor_at(0x4013, 0x3000, 1, WRITE, 0);
        let chain = walk(&guest, 0).expect("a good chain");
        assert_eq!((chain.readable_len, chain.writable_len), (16, 1));
    }

    /// A descriptor that is more often plausible than not.
    fn any_descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
        let address = prop_oneof![
            8 => 0u64..0x30000,
            1 => any::<u64>(),
        ];
        let len =
            prop_oneof![6 => 0u32..0x2000, 2 => (0u32..40).prop_map(|n| n * 16), 1 => any::<u32>()];
        let flags = prop_oneof![8 => 0u16..8, 1 => any::<u16>()];
        let next = prop_oneof![8 => 0u16..8, 1 => any::<u16>()];
        (address, len, flags, next)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn no_table_makes_the_walk_fault_or_grow(
            descriptors in prop::collection::vec(any_descriptor(), 8),
            indirect in prop::collection::vec(any_descriptor(), 16),
            table in 0x1000u64..0x22000,
            head in 0u16..8,
        ) {
            let guest = TestGuest::new(8);
            for (index, (address, len, flags, next)) in (0u16..).zip(descriptors) {
                let address = if flags & INDIRECT != 0 { table } else { address };
                guest.descriptor(index, address, len, flags, next);
            }
            for (index, (address, len, flags, next)) in (0u64..).zip(indirect) {
                guest.try_descriptor_at(table + 16 * index, address, len, flags, next);
            }
            if let Ok(chain) = guest.walk(head, true) {
                prop_assert!(chain.readable.len() <= 3 * (8 + 1024));
                prop_assert!(chain.writable.len() <= 3 * (8 + 1024));
                let sum: u64 = chain.writable.iter().map(|segment| segment.len as u64).sum();
                prop_assert!(sum <= chain.writable_len);
                prop_assert!(sum == chain.writable_len || !chain.is_whole());
                prop_assert_eq!(chain.writable.len(), chain.writable_guest.len());
                let inside = |segment: &Segment| guest.holds(segment);
                prop_assert!(chain.readable.iter().chain(&chain.writable).all(inside));
            }
        }
    }
}
