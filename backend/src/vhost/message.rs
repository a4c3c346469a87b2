//! Messages as a front-end sends them, made by us: what a session has been told so far, for who serves its front-end after us.
//!
//! A session that goes from one process to the next goes as the messages that lead to the state that it is in. So there is no
//! other form of that state, and the one who takes it over reads and checks them as if they came from the front-end itself.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use vhost::vhost_user::message::{FrontendReq, VhostUserInflight, VhostUserVringAddrFlags};

use super::memory::RegionSpec;
use crate::virtio::ring::RingAddresses;

/// Version 1 of the protocol, and no acknowledgement asked for.
const FLAGS: u32 = 1;
/// The flag in the number of a ring that says that no descriptor comes.
const NO_DESCRIPTOR: u64 = 0x100;
/// The most descriptors of a message.
pub const DESCRIPTORS_MAX: usize = 32;
/// The longest body of a message that is made here: a memory table of so many regions.
pub const BODY_BYTES_MAX: usize = 8 + 32 * DESCRIPTORS_MAX;

/// A message.
#[derive(Debug)]
pub struct Message {
    /// Its number.
    pub code: u32,
    /// What follows the header.
    pub body: Vec<u8>,
    /// The descriptors that come with it; others may have them too.
    pub descriptors: Vec<Arc<OwnedFd>>,
}

/// The bytes of a body, in the byte order of the machines that this runs on.
fn body(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// The same, of 32-bit numbers.
fn short_body(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

impl Message {
    /// A message without descriptors.
    fn new(code: FrontendReq, body: Vec<u8>) -> Self {
        Self {
            code: code.into(),
            body,
            descriptors: Vec::new(),
        }
    }

    /// The same with one.
    fn with(mut self, descriptor: Arc<OwnedFd>) -> Self {
        self.descriptors.push(descriptor);
        self
    }

    /// One without a body.
    pub fn plain(code: FrontendReq) -> Self {
        Self::new(code, Vec::new())
    }

    /// One with a number.
    pub fn number(code: FrontendReq, number: u64) -> Self {
        Self::new(code, body(&[number]))
    }

    /// One with the number of a ring and another one.
    pub fn ring(code: FrontendReq, ring: u16, number: u32) -> Self {
        Self::new(code, short_body(&[u32::from(ring), number]))
    }

    /// One that brings an event of a ring, or says that there is none.
    pub fn event(code: FrontendReq, ring: u16, event: Option<Arc<OwnedFd>>) -> Self {
        match event {
            Some(event) => Self::number(code, u64::from(ring)).with(event),
            None => Self::number(code, u64::from(ring) | NO_DESCRIPTOR),
        }
    }

    /// One that brings a descriptor and nothing else.
    pub fn descriptor(code: FrontendReq, descriptor: Arc<OwnedFd>) -> Self {
        Self::plain(code).with(descriptor)
    }

    /// SET_VRING_ADDR.
    pub fn addresses(ring: u16, addresses: &RingAddresses, log: Option<u64>) -> Self {
        let logged = VhostUserVringAddrFlags::VHOST_VRING_F_LOG.bits();
        let flags = if log.is_some() { logged } else { 0 };
        let mut bytes = short_body(&[u32::from(ring), flags]);
        let RingAddresses {
            descriptors,
            available,
            used,
        } = *addresses;
        bytes.extend(body(&[descriptors, used, available, log.unwrap_or(0)]));
        Self::new(FrontendReq::SET_VRING_ADDR, bytes)
    }

    /// SET_MEM_TABLE, of at most [`DESCRIPTORS_MAX`] regions.
    pub fn memory_table(regions: Vec<(RegionSpec, Arc<OwnedFd>)>) -> Self {
        let count = u32::try_from(regions.len()).unwrap_or(u32::MAX);
        let mut bytes = short_body(&[count, 0]);
        let mut descriptors = Vec::new();
        for (region, file) in regions {
            bytes.extend(region_body(&region));
            descriptors.push(file);
        }
        Self {
            descriptors,
            ..Self::new(FrontendReq::SET_MEM_TABLE, bytes)
        }
    }

    /// ADD_MEM_REG.
    pub fn region(region: &RegionSpec, file: Arc<OwnedFd>) -> Self {
        let mut bytes = body(&[0]);
        bytes.extend(region_body(region));
        Self::new(FrontendReq::ADD_MEM_REG, bytes).with(file)
    }

    /// SET_LOG_BASE.
    pub fn log(file: Arc<OwnedFd>, offset: u64, len: u64) -> Self {
        Self::new(FrontendReq::SET_LOG_BASE, body(&[len, offset])).with(file)
    }

    /// SET_INFLIGHT_FD.
    pub fn inflight(file: Arc<OwnedFd>, shape: &VhostUserInflight) -> Self {
        let mut bytes = body(&[shape.mmap_size, shape.mmap_offset]);
        bytes.extend(shape.num_queues.to_le_bytes());
        bytes.extend(shape.queue_size.to_le_bytes());
        // The structure ends where a 64-bit number could begin.
        bytes.resize(size_of::<VhostUserInflight>(), 0);
        Self::new(FrontendReq::SET_INFLIGHT_FD, bytes).with(file)
    }

    /// SET_CONFIG of one byte.
    pub fn config_byte(offset: u32, value: u8) -> Self {
        let mut bytes = short_body(&[offset, 1, 0]);
        bytes.push(value);
        Self::new(FrontendReq::SET_CONFIG, bytes)
    }

    /// Whether it brings a table of memory.
    pub fn is_memory_table(&self) -> bool {
        self.code == u32::from(FrontendReq::SET_MEM_TABLE)
    }

    /// Sends it whole, or nothing of it.
    ///
    /// # Errors
    /// `WouldBlock` if there is no room; the host's answer.
    pub fn send(&self, socket: impl AsFd) -> io::Result<()> {
        let len = u32::try_from(self.body.len()).map_err(io::Error::other)?;
        let mut bytes = short_body(&[self.code, FLAGS, len]);
        bytes.extend(&self.body);
        let files: Vec<BorrowedFd<'_>> = self.descriptors.iter().map(|one| one.as_fd()).collect();
        let mut space =
            [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&files)) {
            return Err(io::Error::other("too many descriptors for a message"));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let sent = rustix::net::sendmsg(socket, &[io::IoSlice::new(&bytes)], &mut control, flags)?;
        if sent < bytes.len() {
            return Err(io::Error::other("a message was sent in part"));
        }
        Ok(())
    }
}

/// A region in a body.
fn region_body(region: &RegionSpec) -> Vec<u8> {
    body(&[region.guest.0, region.len, region.user, region.offset])
}
