//! A virtio-blk request: what a chain asks of the disk.
//!
//! SPEC: virtio 1.2, 5.2.6. A request is a 16-byte header, data, and a status byte, in descriptors of any arrangement: the
//! header is the first 16 readable bytes, the status is the last writable byte, data is what lies between.
//!
//! [`parse`] judges everything that can be judged without the disk. What it lets through is whole sectors inside the
//! capacity, in guest memory, and within the limits that the configuration space announces.
//!
//! # The used length
//! The driver may trust that many bytes from the first writable one to have been written. A read that succeeded reports
//! its data and the status. Where data that was not written lies before the status byte (a failed read, a
//! failed or unknown request with a data area), nothing can be promised and 0 is reported; the status byte is valid all
//! the same. A request whose only writable byte is the status reports 1.

use std::ptr::NonNull;

use stratablk_layers::file::Segment;
use stratablk_layers::limits::REQUEST_BYTES_MAX;
use stratablk_layers::units::{SECTOR_BYTES, Sector, SectorRange};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::volatile_memory::VolatileSlice;
use vm_memory::{Address, GuestAddress};

use super::chain::Chain;
use crate::vhost::config_space::{ZERO_RANGES_MAX, ZERO_SECTORS_MAX};

/// Bytes of the header.
const HEADER_BYTES: usize = 16;
/// Bytes of one range of a discard or write-zeroes.
const RANGE_BYTES: usize = 16;
/// Bytes of the answer to GET_ID.
pub const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// How a request ended, as the guest reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok,
    /// It failed, or could not be.
    IoError,
    /// The device does not know it.
    Unsupported,
}

impl Status {
    /// The status byte.
    pub fn byte(self) -> u8 {
        let value = match self {
            Self::Ok => VIRTIO_BLK_S_OK,
            Self::IoError => VIRTIO_BLK_S_IOERR,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP,
        };
        u8::try_from(value).unwrap_or(u8::MAX)
    }
}

/// What a request is, for the counters and for what its completion means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// Fills guest memory from the disk.
    Read,
    /// Writes guest memory to the disk.
    Write,
    /// Makes writes survive.
    Flush,
    /// Discards or zeroes ranges.
    Zero,
    /// Anything else.
    #[default]
    Other,
}

/// What is left to do for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Fill the data area from this sector.
    Read(Sector),
    /// Write the data area from this sector.
    Write(Sector),
    /// Flush the disk.
    Flush,
    /// Zero the ranges; `discard` says that the guest needs them no longer.
    Zero {
        /// Whether it is a discard.
        discard: bool,
    },
    /// Nothing: this is how it ends.
    Finish(Status),
}

/// A range to zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZeroRange {
    /// Which sectors.
    pub range: SectorRange,
    /// Whether their space may be given back.
    pub unmap: bool,
}

/// The status byte of a request.
#[derive(Clone, Copy, Debug)]
pub struct StatusPlace {
    /// Its address here.
    pub host: NonNull<u8>,
    /// Its guest address.
    pub guest: GuestAddress,
}

/// A request, judged.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// What to do.
    pub task: Task,
    /// What it is.
    pub kind: Kind,
    /// Where its status goes.
    pub status: StatusPlace,
    /// Bytes of data.
    pub bytes: u64,
    /// The used length if it succeeds.
    pub used_on_success: u32,
    /// The used length if it fails.
    pub used_on_failure: u32,
}

/// What a request is judged by.
#[derive(Clone, Copy, Debug)]
pub struct Disk {
    /// Its size.
    pub capacity: Sector,
    /// Whether it may not be changed.
    pub read_only: bool,
    /// What GET_ID answers.
    pub id: [u8; ID_BYTES],
}

/// The answer to GET_ID for a volume of this name: its first 20 bytes, padded with NULs.
pub fn id_of(name: &str) -> [u8; ID_BYTES] {
    let mut id = [0; ID_BYTES];
    for (place, byte) in id.iter_mut().zip(name.bytes()) {
        *place = byte;
    }
    id
}

/// The header of a request.
struct Header {
    /// `VIRTIO_BLK_T_*`.
    kind: u32,
    /// The first sector.
    sector: Sector,
}

/// Judges the request in `chain`. Afterwards `chain.readable` and `chain.writable` hold its data only, and `ranges` the
/// ranges to zero.
///
/// `None`: there is no byte for a status, so the chain can only be returned.
pub fn parse(chain: &mut Chain, disk: &Disk, ranges: &mut Vec<ZeroRange>) -> Option<Request> {
    ranges.clear();
    let status = cut_status(chain)?;
    let only_status = chain.writable_len == 0;
    let mut request = Request {
        task: Task::Finish(Status::IoError),
        kind: Kind::Other,
        status,
        bytes: 0,
        used_on_success: u32::from(only_status),
        used_on_failure: u32::from(only_status),
    };
    let Some(header) = cut_header(chain) else {
        return Some(request);
    };
    match header.kind {
        VIRTIO_BLK_T_IN => read(&mut request, chain, disk, header.sector),
        VIRTIO_BLK_T_OUT => write(&mut request, chain, disk, header.sector),
        VIRTIO_BLK_T_FLUSH => {
            request.kind = Kind::Flush;
            request.task = if disk.read_only {
                Task::Finish(Status::Ok)
            } else {
                Task::Flush
            };
        }
        VIRTIO_BLK_T_GET_ID => get_id(&mut request, chain, disk),
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
            let discard = header.kind == VIRTIO_BLK_T_DISCARD;
            request.kind = Kind::Zero;
            request.task = match zero(chain, disk, discard, ranges) {
                Ok(()) => Task::Zero { discard },
                Err(status) => Task::Finish(status),
            };
            request.bytes = ranges
                .iter()
                .map(|zero| zero.range.count * SECTOR_BYTES)
                .sum();
        }
        _ => request.task = Task::Finish(Status::Unsupported),
    }
    Some(request)
}

/// Takes the status byte off the writable area.
fn cut_status(chain: &mut Chain) -> Option<StatusPlace> {
    if !chain.end_is_whole() {
        return None;
    }
    let last = chain.writable.last_mut()?;
    let before = last.len.checked_sub(1)?;
    let host = NonNull::new(last.base.wrapping_add(before))?;
    let guest = chain.writable_guest.last()?.checked_add(before as u64)?;
    last.len = before;
    if before == 0 {
        chain.writable.pop();
        chain.writable_guest.pop();
    }
    chain.writable_len -= 1;
    Some(StatusPlace { host, guest })
}

/// Takes the header off the readable area.
fn cut_header(chain: &mut Chain) -> Option<Header> {
    if !chain.readable_is_whole() || chain.readable_len < HEADER_BYTES as u64 {
        return None;
    }
    let mut bytes = [0; HEADER_BYTES];
    gather(&chain.readable, &mut bytes)?;
    let mut left = HEADER_BYTES;
    let mut used = 0;
    for segment in &mut chain.readable {
        let cut = left.min(segment.len);
        segment.base = segment.base.wrapping_add(cut);
        segment.len -= cut;
        left -= cut;
        if segment.len > 0 {
            break;
        }
        used += 1;
    }
    chain.readable.drain(..used);
    chain.readable_len -= HEADER_BYTES as u64;
    let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = bytes;
    Some(Header {
        kind: u32::from_le_bytes([k0, k1, k2, k3]),
        sector: Sector(u64::from_le_bytes(sector)),
    })
}

/// The sectors of a transfer of `bytes` bytes, if they are whole and lie on the disk.
fn transfer(disk: &Disk, sector: Sector, bytes: u64) -> Option<SectorRange> {
    if !bytes.is_multiple_of(SECTOR_BYTES) || bytes > REQUEST_BYTES_MAX {
        return None;
    }
    let believed = crate::canary::is_on();
    SectorRange::new(sector, bytes / SECTOR_BYTES)
        .filter(|range| range.fits(disk.capacity) || believed)
}

/// Judges a read.
fn read(request: &mut Request, chain: &Chain, disk: &Disk, sector: Sector) {
    let bytes = chain.writable_len;
    request.kind = Kind::Read;
    if !chain.is_whole() || transfer(disk, sector, bytes).is_none() {
        return;
    }
    request.bytes = bytes;
    // A request is at most REQUEST_BYTES_MAX long.
    request.used_on_success = u32::try_from(bytes + 1).unwrap_or(0);
    request.task = match bytes {
        0 => Task::Finish(Status::Ok),
        _ => Task::Read(sector),
    };
}

/// Judges a write.
fn write(request: &mut Request, chain: &Chain, disk: &Disk, sector: Sector) {
    let bytes = chain.readable_len;
    request.kind = Kind::Write;
    if disk.read_only || transfer(disk, sector, bytes).is_none() {
        return;
    }
    request.bytes = bytes;
    request.task = match bytes {
        0 => Task::Finish(Status::Ok),
        _ => Task::Write(sector),
    };
}

/// Answers GET_ID.
fn get_id(request: &mut Request, chain: &Chain, disk: &Disk) {
    if !chain.is_whole() {
        return;
    }
    let written = scatter(&chain.writable, &disk.id);
    let all = written as u64 == chain.writable_len;
    request.bytes = written as u64;
    // At most 21. What lies between a longer buffer's first 20 bytes and the status is not written.
    request.used_on_success = u32::try_from(written + usize::from(all)).unwrap_or(0);
    request.task = Task::Finish(Status::Ok);
}

/// Reads and judges the ranges of a discard or write-zeroes. All of them are judged before any is carried out.
fn zero(
    chain: &mut Chain,
    disk: &Disk,
    discard: bool,
    ranges: &mut Vec<ZeroRange>,
) -> Result<(), Status> {
    let bytes = chain.readable_len;
    let count = bytes / RANGE_BYTES as u64;
    if disk.read_only
        || bytes == 0
        || !bytes.is_multiple_of(RANGE_BYTES as u64)
        || count > u64::from(ZERO_RANGES_MAX)
    {
        return Err(Status::IoError);
    }
    let mut copy = [0; RANGE_BYTES * ZERO_RANGES_MAX as usize];
    let len = usize::try_from(bytes).map_err(|_| Status::IoError)?;
    let copy = copy.get_mut(..len).ok_or(Status::IoError)?;
    gather(&chain.readable, copy).ok_or(Status::IoError)?;
    let (structures, _) = copy.as_chunks::<RANGE_BYTES>();
    let known = if discard {
        0
    } else {
        VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
    };
    let mut refused = None;
    for bytes in structures {
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = *bytes;
        let start = Sector(u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]));
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes(flags);
        let range = SectorRange::new(start, u64::from(sectors))
            .filter(|range| range.fits(disk.capacity) && sectors <= ZERO_SECTORS_MAX);
        if flags & !known != 0 {
            // An unknown flag outweighs whatever else is wrong.
            refused = Some(Status::Unsupported);
            break;
        }
        match range {
            Some(range) => ranges.push(ZeroRange {
                range,
                unmap: discard || flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
            }),
            None => refused = Some(Status::IoError),
        }
    }
    match refused {
        None => Ok(()),
        Some(status) => {
            ranges.clear();
            Err(status)
        }
    }
}

/// A segment for the copying functions of `vm-memory`, which make no assumption about what the guest does meanwhile.
fn slice_of(segment: &Segment, len: usize) -> VolatileSlice<'_> {
    debug_assert!(len <= segment.len);
    #[expect(unsafe_code, reason = "guest memory is reached by address")]
    // SAFETY: segments come from `Chain::walk`, whose memory outlives the parsing of the request.
    unsafe {
        VolatileSlice::new(segment.base, len)
    }
}

/// Fills `bytes` from the first segments. `None` if they hold fewer.
fn gather(segments: &[Segment], bytes: &mut [u8]) -> Option<()> {
    let mut rest = bytes;
    for segment in segments {
        let len = segment.len.min(rest.len());
        let (now, later) = rest.split_at_mut(len);
        slice_of(segment, len).copy_to(now);
        rest = later;
        if rest.is_empty() {
            break;
        }
    }
    rest.is_empty().then_some(())
}

/// Writes as many of `bytes` as the segments hold. Returns how many.
fn scatter(segments: &[Segment], bytes: &[u8]) -> usize {
    let mut rest = bytes;
    for segment in segments {
        let (now, later) = rest.split_at(segment.len.min(rest.len()));
        slice_of(segment, now.len()).copy_from(now);
        rest = later;
        if rest.is_empty() {
            break;
        }
    }
    bytes.len() - rest.len()
}

#[cfg(test)]
mod tests {
    use super::super::test_guest::{NEXT, TestGuest, WRITE};
    use super::*;
    use proptest::prelude::*;

    const DISK: Disk = Disk {
        capacity: Sector(1000),
        read_only: false,
        id: *b"disk\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
    };
    const READ_ONLY: Disk = Disk {
        read_only: true,
        ..DISK
    };
    /// Where tests put their headers, data and status.
    const HEADER: u64 = 0x1000;
    const DATA: u64 = 0x2000;
    const STATUS: u64 = 0x8000;

    fn header(guest: &TestGuest, kind: u32, sector: u64) {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        guest.write(HEADER, &bytes);
    }

    /// Judges the request at head 0.
    fn judge(guest: &TestGuest, disk: &Disk) -> (Request, Vec<ZeroRange>) {
        let mut chain = guest.walk(0, true).expect("a good chain");
        let mut ranges = Vec::new();
        let request = parse(&mut chain, disk, &mut ranges).expect("a place for the status");
        (request, ranges)
    }

    /// Header, data of `len` bytes, status.
    fn simple(guest: &TestGuest, kind: u32, sector: u64, len: u32, data_flags: u16) {
        header(guest, kind, sector);
        guest.descriptor(0, HEADER, 16, NEXT, 1);
        guest.descriptor(1, DATA, len, NEXT | data_flags, 2);
        guest.descriptor(2, STATUS, 1, WRITE, 0);
    }

    fn zero_ranges(guest: &TestGuest, kind: u32, ranges: &[(u64, u32, u32)]) {
        simple(
            guest,
            kind,
            0,
            u32::try_from(ranges.len() * 16).expect("small"),
            0,
        );
        for ((sector, sectors, flags), place) in ranges.iter().zip(0u64..) {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&sector.to_le_bytes());
            bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
            bytes[12..].copy_from_slice(&flags.to_le_bytes());
            guest.write(DATA + 16 * place, &bytes);
        }
    }

    #[test]
    fn any_arrangement_of_descriptors_is_understood() {
        let guest = TestGuest::new(16);
        // A header in three pieces, the last one joined with the data of a write; a status of its own.
        header(&guest, VIRTIO_BLK_T_OUT, 7);
        guest.descriptor(0, HEADER, 3, NEXT, 1);
        guest.descriptor(1, HEADER + 3, 6, NEXT, 2);
        guest.descriptor(2, HEADER + 9, 7 + 1024, NEXT, 3);
        guest.descriptor(3, STATUS, 1, WRITE, 0);
        let (request, _) = judge(&guest, &DISK);
        assert_eq!(request.task, Task::Write(Sector(7)));
        assert_eq!((request.bytes, request.used_on_success), (1024, 1));
        // A read whose data and status share a descriptor.
        header(&guest, VIRTIO_BLK_T_IN, 9);
        guest.descriptor(0, HEADER, 16, NEXT, 1);
        guest.descriptor(1, DATA, 513, WRITE, 0);
        let mut chain = guest.walk(0, true).expect("a good chain");
        let request = parse(&mut chain, &DISK, &mut Vec::new()).expect("a status");
        assert_eq!(request.task, Task::Read(Sector(9)));
        assert_eq!(request.used_on_success, 513);
        assert_eq!(
            request.used_on_failure, 0,
            "nothing is known of the first byte"
        );
        assert_eq!(request.status.guest, GuestAddress(DATA + 512));
        assert_eq!((chain.writable.len(), chain.writable[0].len), (1, 512));
    }

    #[test]
    fn a_header_may_be_cut_anywhere() {
        let guest = TestGuest::new(8);
        for cut in 1..16u32 {
            header(&guest, VIRTIO_BLK_T_IN, 9);
            guest.descriptor(0, HEADER, cut, NEXT, 1);
            guest.descriptor(1, HEADER + u64::from(cut), 16 - cut, NEXT, 2);
            guest.descriptor(2, DATA, 1024, NEXT | WRITE, 3);
            guest.descriptor(3, STATUS, 1, WRITE, 0);
            let (request, _) = judge(&guest, &DISK);
            assert_eq!(request.task, Task::Read(Sector(9)), "{cut}");
            assert_eq!(request.used_on_success, 1025);
        }
    }

    #[test]
    fn the_status_is_the_last_writable_byte() {
        let guest = TestGuest::new(4);
        header(&guest, VIRTIO_BLK_T_FLUSH, 0);
        guest.descriptor(0, HEADER, 16, NEXT, 1);
        guest.descriptor(1, STATUS, 8, WRITE, 0);
        let (request, _) = judge(&guest, &DISK);
        assert_eq!(request.status.guest, GuestAddress(STATUS + 7));
        assert_eq!(
            request.used_on_success, 0,
            "the first seven bytes are not written"
        );
    }

    #[test]
    fn a_chain_without_a_place_for_the_status_is_only_returned() {
        let guest = TestGuest::new(4);
        header(&guest, VIRTIO_BLK_T_FLUSH, 0);
        guest.descriptor(0, HEADER, 16, 0, 0);
        let mut chain = guest.walk(0, true).expect("a good chain");
        assert!(parse(&mut chain, &DISK, &mut Vec::new()).is_none());
        guest.descriptor(0, HEADER, 16, NEXT, 1);
        guest.descriptor(1, guest.guest_end(), 1, WRITE, 0);
        let mut chain = guest.walk(0, true).expect("the shape is good");
        assert!(parse(&mut chain, &DISK, &mut Vec::new()).is_none());
    }

    #[test]
    fn short_headers_and_bad_addresses_fail() {
        let guest = TestGuest::new(4);
        guest.descriptor(0, HEADER, 15, NEXT, 1);
        guest.descriptor(1, STATUS, 1, WRITE, 0);
        assert_eq!(judge(&guest, &DISK).0.task, Task::Finish(Status::IoError));
        simple(&guest, VIRTIO_BLK_T_IN, 0, 512, WRITE);
        guest.descriptor(1, u64::MAX - 3, 512, NEXT | WRITE, 2);
        assert_eq!(judge(&guest, &DISK).0.task, Task::Finish(Status::IoError));
        simple(&guest, VIRTIO_BLK_T_OUT, 0, 512, 0);
        guest.descriptor(1, guest.guest_end() - 1, 512, NEXT, 2);
        assert_eq!(judge(&guest, &DISK).0.task, Task::Finish(Status::IoError));
        simple(&guest, VIRTIO_BLK_T_GET_ID, 0, 20, WRITE);
        guest.descriptor(1, guest.guest_end() - 1, 20, NEXT | WRITE, 2);
        assert_eq!(judge(&guest, &DISK).0.task, Task::Finish(Status::IoError));
    }

    #[test]
    fn unknown_types_are_unsupported() {
        let guest = TestGuest::new(4);
        let types = [
            2u32,
            3,
            5,
            7,
            9,
            10,
            12,
            14,
            15,
            16,
            18,
            20,
            22,
            24,
            26,
            0x8000_0000,
            u32::MAX,
        ];
        for kind in types {
            simple(&guest, kind, 0, 512, WRITE);
            let (request, _) = judge(&guest, &DISK);
            assert_eq!(request.task, Task::Finish(Status::Unsupported), "{kind}");
            assert_eq!(request.used_on_failure, 0);
        }
    }

    #[test]
    fn ranges_outside_the_disk_and_parts_of_sectors_fail() {
        let guest = TestGuest::new(4);
        for (kind, flags) in [(VIRTIO_BLK_T_IN, WRITE), (VIRTIO_BLK_T_OUT, 0)] {
            let last = [(999u64, 512u32), (0, 0x4000), (1000, 0)];
            for (sector, len) in last {
                simple(&guest, kind, sector, len, flags);
                assert_ne!(
                    judge(&guest, &DISK).0.task,
                    Task::Finish(Status::IoError),
                    "{sector} {len}"
                );
            }
            let beyond = [
                (999, 1024),
                (1000, 512),
                (u64::MAX, 512),
                (u64::MAX / 512, 512),
                (1001, 0),
            ];
            for (sector, len) in beyond.into_iter().chain([(0, 511), (0, 513), (0, 1)]) {
                simple(&guest, kind, sector, len, flags);
                assert_eq!(
                    judge(&guest, &DISK).0.task,
                    Task::Finish(Status::IoError),
                    "{sector} {len}"
                );
            }
        }
    }

    #[test]
    fn a_read_only_disk_takes_no_change() {
        let guest = TestGuest::new(4);
        simple(&guest, VIRTIO_BLK_T_OUT, 0, 512, 0);
        assert_eq!(
            judge(&guest, &READ_ONLY).0.task,
            Task::Finish(Status::IoError)
        );
        for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
            zero_ranges(&guest, kind, &[(0, 8, 0)]);
            assert_eq!(
                judge(&guest, &READ_ONLY).0.task,
                Task::Finish(Status::IoError)
            );
        }
        simple(&guest, VIRTIO_BLK_T_IN, 0, 512, WRITE);
        assert_eq!(judge(&guest, &READ_ONLY).0.task, Task::Read(Sector(0)));
    }

    #[test]
    fn get_id_fills_up_with_nuls_and_never_overruns() {
        let guest = TestGuest::new(4);
        for (len, used) in [(20u32, 21u32), (7, 8), (32, 20), (0, 1)] {
            guest.write(DATA, &[0xee; 40]);
            simple(&guest, VIRTIO_BLK_T_GET_ID, 0, len, WRITE);
            let (request, _) = judge(&guest, &DISK);
            assert_eq!(request.task, Task::Finish(Status::Ok));
            assert_eq!(request.used_on_success, used, "{len}");
            let bytes = guest.read(DATA, 40);
            let filled = (len as usize).min(20);
            assert_eq!(bytes[..filled], DISK.id[..filled]);
            assert!(bytes[filled..].iter().all(|byte| *byte == 0xee));
        }
        assert_eq!(
            &id_of("a name that is longer than the field"),
            b"a name that is longe"
        );
        assert_eq!(&id_of("x")[..2], b"x\0");
    }

    #[test]
    fn unknown_flags_of_ranges_are_unsupported() {
        let guest = TestGuest::new(4);
        for flags in [1u32, 2, 0x8000_0000] {
            zero_ranges(&guest, VIRTIO_BLK_T_DISCARD, &[(0, 8, flags)]);
            assert_eq!(
                judge(&guest, &DISK).0.task,
                Task::Finish(Status::Unsupported)
            );
        }
        for flags in [2u32, 3, 0x8000_0000] {
            zero_ranges(
                &guest,
                VIRTIO_BLK_T_WRITE_ZEROES,
                &[(0, 8, 1), (0, 8, flags)],
            );
            let (request, ranges) = judge(&guest, &DISK);
            assert_eq!(request.task, Task::Finish(Status::Unsupported));
            assert!(ranges.is_empty());
        }
    }

    #[test]
    fn ranges_are_read_and_bounded() {
        let guest = TestGuest::new(8);
        zero_ranges(
            &guest,
            VIRTIO_BLK_T_WRITE_ZEROES,
            &[(3, 5, 0), (990, 10, 1)],
        );
        let (request, ranges) = judge(&guest, &DISK);
        assert_eq!(request.task, Task::Zero { discard: false });
        let found: Vec<_> = ranges
            .iter()
            .map(|zero| (zero.range.start.0, zero.range.count, zero.unmap))
            .collect();
        assert_eq!(found, vec![(3, 5, false), (990, 10, true)]);
        assert_eq!(request.bytes, 15 * 512);
        // The second structure split over two descriptors.
        guest.descriptor(1, DATA, 20, NEXT, 3);
        guest.descriptor(3, DATA + 20, 12, NEXT, 2);
        assert_eq!(judge(&guest, &DISK).1, ranges);

        let huge = Disk {
            capacity: Sector(1 << 40),
            ..DISK
        };
        zero_ranges(&guest, VIRTIO_BLK_T_DISCARD, &[(0, ZERO_SECTORS_MAX, 0)]);
        assert_eq!(judge(&guest, &huge).0.task, Task::Zero { discard: true });
        zero_ranges(
            &guest,
            VIRTIO_BLK_T_DISCARD,
            &[(0, ZERO_SECTORS_MAX + 1, 0)],
        );
        assert_eq!(judge(&guest, &huge).0.task, Task::Finish(Status::IoError));
        for ranges in [
            vec![],
            vec![(1000, 1, 0)],
            vec![(u64::MAX, 2, 0)],
            vec![(0, 1, 0), (999, 2, 0)],
            vec![(0, 1, 0); 33],
        ] {
            zero_ranges(&guest, VIRTIO_BLK_T_DISCARD, &ranges);
            assert_eq!(
                judge(&guest, &DISK).0.task,
                Task::Finish(Status::IoError),
                "{ranges:?}"
            );
        }
        simple(&guest, VIRTIO_BLK_T_DISCARD, 0, 24, 0);
        assert_eq!(judge(&guest, &DISK).0.task, Task::Finish(Status::IoError));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn what_passes_lies_on_the_disk(
            bytes in prop::collection::vec(any::<u8>(), 64),
            kind in prop_oneof![0u32..16, any::<u32>()],
            sector in prop_oneof![0u64..1100, any::<u64>()],
            data in 0u32..5000,
            flags in prop_oneof![Just(0u16), Just(WRITE)],
        ) {
            let guest = TestGuest::new(4);
            guest.write(DATA, &bytes);
            simple(&guest, kind, sector, data, flags);
            let (request, ranges) = judge(&guest, &DISK);
            match request.task {
                Task::Read(start) | Task::Write(start) => {
                    prop_assert_eq!(request.bytes % 512, 0);
                    prop_assert!(start.0 + request.bytes / 512 <= 1000);
                }
                Task::Zero { .. } => {
                    prop_assert!(ranges.iter().all(|zero| zero.range.end().0 <= 1000));
                }
                Task::Flush | Task::Finish(_) => {}
            }
        }
    }
}
