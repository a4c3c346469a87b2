//! The limits of everything, in one place, with the relations between them checked at compile time.

use crate::units::{CLUSTER_SECTORS, SECTOR_BYTES};

/// The largest disk: 64 TiB, in sectors.
pub const DISK_SECTORS_MAX: u64 = 64 << 40 >> 9;
/// The smallest disk: one sector.
pub const DISK_SECTORS_MIN: u64 = 1;
/// The largest slot: 24 bits of a resolve word.
pub const SLOT_MAX: u32 = (1 << 24) - 1;
/// The largest number of a layer in the sector cache.
pub const LAYER_NUMBER_MAX: u32 = 1 << 20;
/// Bytes of the name of a volume or snapshot, in UTF-8.
pub const NAME_BYTES_MAX: usize = 64;
/// Bytes of the path of a raw base.
pub const BASE_PATH_BYTES_MAX: usize = 3072;
/// Bytes of what a job is known by: a snapshot of a volume.
pub const JOB_SUBJECT_BYTES_MAX: usize = 2 * NAME_BYTES_MAX + 1;
/// Bytes of a map's journal after which the next flush writes a new checkpoint instead.
pub const JOURNAL_BYTES_MAX: u64 = 64 << 20;
/// Bytes of one request's data; a longer one is refused by the caller.
pub const REQUEST_BYTES_MAX: u64 = 64 << 20;
/// Operations that one queue context has with the kernel at once.
pub const ENGINE_DEPTH: u32 = 256;

const _: () = assert!(DISK_SECTORS_MAX / CLUSTER_SECTORS <= 1 << 34);
const _: () = assert!(DISK_SECTORS_MAX <= u64::MAX / SECTOR_BYTES);
