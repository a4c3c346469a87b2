//! A disk as a guest's file system sees it: whole requests, one at a time, that must succeed.

use std::path::Path;

use crate::guest::{Guest, GuestOptions};
use crate::memory::{Buffer, POISON};
use crate::pattern::SECTOR;
use crate::request::{
    S_OK, T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES, UNMAP, header, segment,
};

/// The largest transfer.
const DATA_BYTES: u32 = 1 << 20;

/// A disk behind the first ring of a session.
#[derive(Debug)]
pub struct Disk {
    /// The session.
    pub guest: Guest,
    /// Where headers lie.
    header: Buffer,
    /// Where data lies.
    data: Buffer,
    /// Where the status lies.
    status: Buffer,
}

impl Disk {
    /// Starts a session with usual options.
    #[track_caller]
    pub fn connect(path: &Path) -> Self {
        Self::new(Guest::start(path, GuestOptions::default()))
    }

    /// A disk on a session that has started.
    pub fn new(guest: Guest) -> Self {
        let header = guest.header(T_IN, 0);
        let data = guest.memory.writable(DATA_BYTES);
        let status = guest.status();
        Self {
            guest,
            header,
            data,
            status,
        }
    }

    /// As [`Guest::reconnect`].
    #[track_caller]
    pub fn reconnect(self, path: &Path) -> Self {
        let guest = self.guest.reconnect(path);
        Self { guest, ..self }
    }

    /// Carries out one request: its status. `data` is copied in, or out if `write_back`.
    #[track_caller]
    fn request(&mut self, kind: u32, sector: u64, data: &mut [u8], from_device: bool) -> u8 {
        let len = u32::try_from(data.len()).expect("a short request");
        assert!(len <= DATA_BYTES, "a transfer of {len} bytes");
        let buffer = Buffer {
            len,
            writable: from_device,
            ..self.data
        };
        let memory = &self.guest.memory;
        memory.write(self.header.gpa, &header(kind, sector));
        memory.write(self.status.gpa, &[POISON]);
        if from_device {
            memory.write(buffer.gpa, &vec![POISON; data.len()]);
        } else {
            memory.write(buffer.gpa, data);
        }
        let chain = [self.header, buffer, self.status];
        if data.is_empty() {
            self.guest.run(&[chain[0], chain[2]]);
        } else {
            self.guest.run(&chain);
        }
        if from_device {
            data.copy_from_slice(&self.guest.memory.bytes(buffer));
        }
        self.guest.last_byte(self.status)
    }

    /// Reads sectors, or tells the status.
    ///
    /// # Errors
    /// The status, if it is not 0.
    #[track_caller]
    pub fn try_read(&mut self, sector: u64, count: u64) -> Result<Vec<u8>, u8> {
        let mut data = vec![0; usize::try_from(count).expect("64-bit host") * SECTOR];
        match self.request(T_IN, sector, &mut data, true) {
            S_OK => Ok(data),
            status => Err(status),
        }
    }

    /// Reads sectors.
    #[track_caller]
    pub fn read(&mut self, sector: u64, count: u64) -> Vec<u8> {
        match self.try_read(sector, count) {
            Ok(data) => data,
            Err(status) => panic!("reading {count} sectors at {sector}: status {status}"),
        }
    }

    /// Writes whole sectors: the status.
    #[track_caller]
    pub fn try_write(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.request(T_OUT, sector, &mut data.to_vec(), false)
    }

    /// Writes whole sectors.
    #[track_caller]
    pub fn write(&mut self, sector: u64, data: &[u8]) {
        assert_eq!(
            self.try_write(sector, data),
            S_OK,
            "writing at sector {sector}"
        );
    }

    /// Flushes: the status.
    #[track_caller]
    pub fn try_flush(&mut self) -> u8 {
        self.request(T_FLUSH, 0, &mut [], false)
    }

    /// Flushes.
    #[track_caller]
    pub fn flush(&mut self) {
        assert_eq!(self.try_flush(), S_OK, "flush");
    }

    /// The name of the disk, all 20 bytes.
    #[track_caller]
    pub fn id(&mut self) -> Vec<u8> {
        let mut data = vec![0; 20];
        assert_eq!(self.request(T_GET_ID, 0, &mut data, true), S_OK, "GET_ID");
        data
    }

    /// Discards or zeroes these segments, given as they stand in the request: the status.
    #[track_caller]
    pub fn try_segments(&mut self, kind: u32, segments: &[[u8; 16]]) -> u8 {
        self.request(kind, 0, &mut segments.concat(), false)
    }

    /// Discards sectors.
    #[track_caller]
    pub fn discard(&mut self, sector: u64, count: u32) {
        let status = self.try_segments(T_DISCARD, &[segment(sector, count, 0)]);
        assert_eq!(status, S_OK, "discard of {count} sectors at {sector}");
    }

    /// Makes sectors read as zeroes.
    #[track_caller]
    pub fn write_zeroes(&mut self, sector: u64, count: u32, unmap: bool) {
        let flags = if unmap { UNMAP } else { 0 };
        let status = self.try_segments(T_WRITE_ZEROES, &[segment(sector, count, flags)]);
        assert_eq!(status, S_OK, "write-zeroes of {count} sectors at {sector}");
    }
}
