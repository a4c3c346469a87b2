//! The state of one device for one front-end, and what each vhost-user message does to it.
//!
//! The crate `vhost` reads and checks messages and calls the trait implemented here; one thread does, one message after the
//! other. Rings are served by workers, which are started when the first ring is, and told what changes by commands
//! that are answered once the change has taken effect.
//!
//! # Life of a ring
//! ```text
//! stopped --(size, addresses, memory, kick, enabled)--> attached to a worker --(first kick)--> served
//!    ^                                                     |         ^
//!    +------------ GET_VRING_BASE, RESET_DEVICE -----------+         | SET_VRING_ENABLE 1
//!                                                          +-- SET_VRING_ENABLE 0 --> disabled
//! ```
//! Leaving a worker drains the ring: everything under way completes first, and nothing is touched afterwards.
//!
//! INVARIANT: size, addresses, base and features do not change from the first attachment of a ring to its stop; a ring
//! is attached only if everything it needs is there; `memory` and `log` are what all workers use.

pub mod hand_over;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use stratablk_layers::volume::Durability;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Backend, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use vm_memory::{GuestAddress, GuestAddressSpace};

use super::channel::Channel;
use super::config_space::{ConfigSpace, ConfigWrite, judge_write};
use super::device_state::Transfer;
use super::dirty_log::DirtyLog;
use super::disk_use::DiskUse;
use super::event::{Event, Kick};
use super::features;
use super::inflight::InflightBuffer;
use super::memory::{GuestMemory, RegionSpec, slots_max};
use super::refusal::{host, refuse, refuse_memory, refuse_shared};
use super::state::SessionState;
use super::turn::Turns;
use super::under_way::InMessage;
use super::vring::{SessionMemory, Vring};
use crate::signal::Signal;
use crate::virtio::ring::{RingAddresses, RingLayout, UsedLog};
use crate::virtio::tracker::resume;
use crate::worker::command::WorkerHandle;
use crate::worker::counters::Counters;
use crate::worker::provider::DiskProvider;
use crate::worker::{WorkerSetup, start};

/// What a handler is made with.
#[derive(Debug)]
pub struct HandlerSetup<P> {
    /// Gives the disk out.
    pub provider: Arc<P>,
    /// Whether this attachment may not change it, even if others may.
    pub read_only: bool,
    /// How many rings the device has.
    pub queues: u16,
    /// One a worker that may be started.
    pub counters: Vec<Arc<Counters>>,
    /// What others see of the session.
    pub state: Arc<SessionState>,
    /// Whose rings run.
    pub turns: Arc<Turns>,
    /// Written if a worker ends by a panic.
    pub trouble: Arc<Signal>,
}

/// The device, as one front-end sees it. Dropping it completes everything that is under way and ends the workers.
pub struct Handler<P: DiskProvider> {
    /// What it was made with.
    setup: HandlerSetup<P>,
    /// The disk; dropped after the workers, which use it.
    disk: DiskUse<P>,
    /// One a counter; started when the first of their rings is.
    workers: Vec<Option<WorkerHandle>>,
    /// The rings.
    rings: Vec<Vring>,
    /// Guest memory.
    memory: SessionMemory,
    /// The dirty log that the front-end set, whether or not it is to be written.
    log: Option<Arc<DirtyLog>>,
    /// Where the requests under way are tracked, if the front-end wants it.
    inflight: Option<InflightBuffer>,
    /// The transfer of the device's state that was asked for last, if any was.
    transfer: Option<Transfer>,
    /// Virtio features that the front-end took; `None` before it has.
    features: Option<u64>,
    /// Protocol features that the front-end took.
    protocol: u64,
    /// Whether the front-end has read the features, without which the crate sends no acknowledgements.
    features_read: bool,
    /// Whether the device caches writes until a flush, as far as the driver may choose.
    writeback: bool,
    /// Whether the front-end has claimed the device.
    owned: bool,
    /// Whether the message just handled brought a channel.
    channel_came: bool,
    /// Whether rings take nothing yet, since it is not certain that they are ours.
    held: bool,
}

/// The capacity is the beginning of the configuration space.
const CAPACITY_BYTES: u32 = 8;

/// A region as a message describes it.
fn spec_of(region: &VhostUserMemoryRegion) -> RegionSpec {
    RegionSpec {
        guest: GuestAddress(region.guest_phys_addr),
        user: region.user_addr,
        len: region.memory_size,
        offset: region.mmap_offset,
    }
}

impl<P: DiskProvider> Handler<P> {
    /// A device that no front-end has said anything to yet.
    pub fn new(setup: HandlerSetup<P>) -> Self {
        let memory = SessionMemory::new(GuestMemory::default());
        let provider = Arc::clone(&setup.provider);
        let begun = Arc::clone(&setup.state.begun);
        let turns = Arc::clone(&setup.turns);
        Self {
            disk: DiskUse::new(provider, setup.read_only, begun, turns),
            workers: setup.counters.iter().map(|_| None).collect(),
            rings: (0..setup.queues).map(|_| Vring::new(&memory)).collect(),
            setup,
            memory,
            log: None,
            inflight: None,
            transfer: None,
            features: None,
            protocol: 0,
            features_read: false,
            writeback: true,
            owned: false,
            channel_came: false,
            held: false,
        }
    }

    /// Whether the front-end has claimed the device.
    pub fn is_owned(&self) -> bool {
        self.owned
    }

    /// Whether a ring is in use: from then on the front-end may be silent for as long as it likes.
    pub fn is_serving(&self) -> bool {
        self.rings.iter().any(Vring::is_started)
    }

    /// Whether the crate acknowledges messages that ask for it.
    pub fn acknowledges(&self) -> bool {
        self.features_read && self.protocol & VhostUserProtocolFeatures::REPLY_ACK.bits() != 0
    }

    /// A message begins; until what is returned is dropped it goes on.
    pub fn begin_message(&self) -> InMessage {
        InMessage::begin(&self.setup.state)
    }

    /// Completes everything that is under way, ends the workers and lets the disk go.
    pub fn finish(&mut self) {
        self.workers.clear();
        *self.setup.state.channel() = None;
        self.setup.state.rings.store(0, Ordering::Relaxed);
        self.disk.release();
    }

    /// Ends the workers and lets the disk go if the last ring was stopped.
    fn release_unless_serving(&mut self) {
        if !self.is_serving() {
            self.workers.iter_mut().for_each(|worker| *worker = None);
            self.disk.release();
        }
    }

    /// Uses this socket as the way back to the front-end, if the message just handled brought one.
    pub fn adopt_channel(&mut self, socket: Option<OwnedFd>) {
        if std::mem::take(&mut self.channel_came) {
            *self.setup.state.channel() = socket.map(Channel::new);
        }
        self.setup.state.transfers(self.transfer.is_some());
    }

    /// A protocol feature that the front-end took?
    fn has_protocol(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.protocol & feature.bits() != 0
    }

    /// The virtio features that the front-end took.
    fn acked(&self) -> u64 {
        self.features.unwrap_or(0)
    }

    /// Guest memory as it is now.
    fn memory(&self) -> Arc<GuestMemory> {
        self.memory.memory().into_inner()
    }

    /// The ring with this number.
    fn ring(&mut self, index: impl Into<u32>) -> Result<(u16, &mut Vring)> {
        let index = index.into();
        let refused = || refuse(format!("there is no ring {index}"));
        let number = u16::try_from(index).map_err(|_| refused())?;
        let ring = self
            .rings
            .get_mut(usize::from(number))
            .ok_or_else(refused)?;
        Ok((number, ring))
    }

    /// The worker that serves this ring, if it was started.
    fn worker(&self, index: u16) -> Option<&WorkerHandle> {
        let count = self.workers.len().max(1);
        self.workers.get(usize::from(index) % count)?.as_ref()
    }

    /// The worker that serves this ring, which is started if need be.
    fn worker_or_start(&mut self, index: u16) -> Result<&WorkerHandle> {
        let count = self.workers.len().max(1);
        let place = usize::from(index) % count;
        let counters = self.setup.counters.get(place).cloned();
        let counters = counters.ok_or_else(|| refuse("there is no worker"))?;
        let memory = self.memory();
        let setup = WorkerSetup {
            disk: self
                .disk
                .open(&self.rings, &memory, self.inflight.as_ref())
                .map_err(host)?,
            read_only: self.disk.may_not_change(),
            memory,
            log: self.log_in_use(),
            durability: self.durability(),
            counters,
            trouble: Arc::clone(&self.setup.trouble),
        };
        let worker = self
            .workers
            .get_mut(place)
            .ok_or_else(|| refuse("there is no worker"))?;
        if worker.is_none() {
            let started = start(format!("worker-{place}"), setup).map_err(host)?;
            self.setup.state.activity.add_worker(&started);
            *worker = Some(started);
        }
        worker.as_ref().ok_or_else(|| refuse("there is no worker"))
    }

    /// The dirty log, while it is to be written.
    fn log_in_use(&self) -> Option<Arc<DirtyLog>> {
        let wanted = self.acked() & features::LOG_ALL != 0;
        self.log.clone().filter(|_| wanted)
    }

    /// Where changes of a ring's used ring are logged.
    fn used_log(&self, ring: &Vring) -> Option<UsedLog> {
        Some(UsedLog {
            log: self.log_in_use()?,
            address: ring.log_address?,
        })
    }

    /// What writes promise.
    ///
    /// SPEC: virtio 1.2, 5.2.6.2. With CONFIG_WCE the driver chooses; without, a driver that sends flushes gets a cache that
    /// is written back, and one that does not (it took no FLUSH) gets writes that are stable when they complete.
    fn durability(&self) -> Durability {
        let acked = self.acked();
        let cached = if acked & features::CONFIG_WCE != 0 {
            self.writeback
        } else {
            acked & features::FLUSH != 0
        };
        if cached {
            Durability::AfterFlush
        } else {
            Durability::OnCompletion
        }
    }

    /// Tells all workers what writes promise now.
    fn send_durability(&self) -> Result<()> {
        let durability = self.durability();
        for worker in self.workers.iter().flatten() {
            worker.set_durability(durability).map_err(host)?;
        }
        Ok(())
    }

    /// Tells all workers what to log now.
    fn send_log(&self) -> Result<()> {
        for worker in self.workers.iter().flatten() {
            let rings = (0u16..)
                .zip(&self.rings)
                .map(|(index, ring)| (index, self.used_log(ring)))
                .collect();
            worker.set_log(self.log_in_use(), rings).map_err(host)?;
        }
        Ok(())
    }

    /// Uses other memory from now on. Returns when no request uses the memory before.
    fn set_memory(&mut self, memory: GuestMemory) -> Result<()> {
        if self.log_in_use().is_some_and(|log| !log.covers(&memory)) {
            return Err(refuse("the dirty log is too small for this memory"));
        }
        let publication = self.memory.lock();
        publication
            .unwrap_or_else(PoisonError::into_inner)
            .replace(memory);
        let memory = self.memory();
        for worker in self.workers.iter().flatten() {
            let layouts = (0u16..)
                .zip(&self.rings)
                .filter(|(_, ring)| ring.attached)
                .map(|(index, ring)| (index, ring.locate(&memory)))
                .collect();
            worker
                .set_memory(Arc::clone(&memory), layouts)
                .map_err(host)?;
        }
        self.attach_all()
    }

    /// Attaches every ring that can be.
    fn attach_all(&mut self) -> Result<()> {
        (0..self.setup.queues).try_for_each(|index| self.attach(index))
    }

    /// Gives a ring to its worker if everything it needs is there.
    fn attach(&mut self, index: u16) -> Result<()> {
        let Some(ring) = self.rings.get(usize::from(index)) else {
            return Ok(());
        };
        let Some(kick) = ring.kick.clone() else {
            return Ok(());
        };
        let memory = self.memory();
        let ready = ring.is_enabled()
            && !ring.attached
            && ring.size().is_some()
            && ring.addresses.is_some()
            && self.features.is_some()
            && !memory.is_empty();
        if !ready {
            return Ok(());
        }
        let Some(layout) = ring.locate(&memory) else {
            if let Some(err) = &ring.err {
                err.signal();
            }
            return Err(refuse(format!("ring {index} does not lie in guest memory")));
        };
        let region = self.inflight.as_ref().and_then(|all| all.region(index));
        let resumed = region.map(|region| {
            let resumed = resume(region, layout.size(), layout.used_index(), ring.base());
            resumed.inspect_err(|_| ring.err.iter().for_each(|err| err.signal()))
        });
        let resumed = resumed
            .transpose()
            .map_err(|why| refuse(format!("ring {index} cannot start: {why}")))?;
        let log = self.used_log(ring);
        let setup = ring.setup(index, layout, kick, self.acked(), log, resumed);
        let held = self.held;
        let worker = self.worker_or_start(index);
        let attached = worker.and_then(|worker| worker.attach_as(setup, held).map_err(host));
        if attached.is_err() {
            self.release_unless_serving();
        }
        attached?;
        if let Some(ring) = self.rings.get_mut(usize::from(index)) {
            ring.attached = true;
            ring.set_started(true);
        }
        self.setup.state.ring_started(self.disk.capacity());
        Ok(())
    }

    /// Takes a ring from its worker, after everything under way on it has completed. Nothing of it is touched afterwards.
    fn detach(&mut self, index: u16) -> Result<()> {
        let attached = self
            .rings
            .get(usize::from(index))
            .is_some_and(|ring| ring.attached);
        if !attached {
            return Ok(());
        }
        let base = match self.worker(index) {
            Some(worker) => worker.detach(index).map_err(host)?,
            None => None,
        };
        if let Some(ring) = self.rings.get_mut(usize::from(index)) {
            ring.attached = false;
            ring.set_base(base.unwrap_or(ring.base()));
        }
        let _no_notification = self.setup.state.channel();
        self.setup.state.rings.fetch_sub(1, Ordering::Relaxed);
        Ok(())
    }

    /// Takes all rings from their workers.
    fn detach_all(&mut self) -> Result<()> {
        (0..self.setup.queues).try_for_each(|index| self.detach(index))
    }

    /// Refuses to change what is frozen while a ring is in use.
    fn frozen(ring: &Vring, index: u16, what: &str) -> Result<()> {
        if ring.is_started() {
            return Err(refuse(format!(
                "the {what} of ring {index} cannot change while it is in use; stop it by GET_VRING_BASE first"
            )));
        }
        Ok(())
    }

    /// What the configuration space tells.
    fn config_space(&self) -> ConfigSpace {
        ConfigSpace {
            capacity: self.disk.capacity(),
            queues: self.setup.queues,
            writable: !self.disk.read_only(),
            writeback: self.writeback,
        }
    }
}

impl<P: DiskProvider> Drop for Handler<P> {
    fn drop(&mut self) {
        self.finish();
        self.setup.state.features.store(0, Ordering::Relaxed);
    }
}

impl<P: DiskProvider> VhostUserBackendReqHandlerMut for Handler<P> {
    fn set_owner(&mut self) -> Result<()> {
        self.owned = true;
        Ok(())
    }

    /// The specification lets us ignore this or disable all rings with it.
    fn reset_owner(&mut self) -> Result<()> {
        self.detach_all()?;
        for ring in &mut self.rings {
            ring.set_enabled(false);
        }
        Ok(())
    }

    /// Back to the state before SET_FEATURES, with connection, protocol features and memory as they are.
    fn reset_device(&mut self) -> Result<()> {
        self.detach_all()?;
        for ring in &mut self.rings {
            ring.reset(&self.memory);
        }
        self.release_unless_serving();
        self.inflight = None;
        self.transfer = None;
        self.disk.reset();
        self.features = None;
        self.writeback = true;
        self.setup.state.features.store(0, Ordering::Relaxed);
        self.send_log()?;
        self.send_durability()
    }

    fn get_features(&mut self) -> Result<u64> {
        self.features_read = true;
        Ok(features::offered(self.disk.read_only()))
    }

    fn set_features(&mut self, acked: u64) -> Result<()> {
        let unknown = acked & !features::offered(self.disk.read_only());
        if unknown != 0 {
            return Err(refuse(format!("features {unknown:#x} were not offered")));
        }
        let before = self.features;
        let changed = before.unwrap_or(0) ^ acked;
        let in_use = self.rings.iter().any(Vring::is_started);
        if in_use && changed & !features::LOG_ALL != 0 {
            return Err(refuse("features cannot change while a ring is in use"));
        }
        let log = self.log.as_ref().filter(|_| acked & features::LOG_ALL != 0);
        if log.is_some_and(|log| !log.covers(&self.memory())) {
            return Err(refuse("the dirty log is too small for the memory"));
        }
        self.features = Some(acked);
        self.setup.state.features.store(acked, Ordering::Relaxed);
        let cache = features::FLUSH | features::CONFIG_WCE;
        if before.is_none() || changed & cache != 0 {
            // SPEC: virtio 1.2, 5.2.5.2: a driver that sends no flushes must find the cache off.
            self.writeback = acked & cache != features::CONFIG_WCE;
        }
        if acked & features::PROTOCOL_FEATURES == 0 {
            for ring in &mut self.rings {
                ring.set_enabled(true);
            }
        }
        self.send_durability()?;
        self.send_log()?;
        self.attach_all()
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let specs: Vec<RegionSpec> = regions.iter().map(spec_of).collect();
        let memory = GuestMemory::from_table(&specs, files).map_err(|e| refuse_memory(&e))?;
        self.set_memory(memory)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, size: u32) -> Result<()> {
        let (index, ring) = self.ring(index)?;
        if !RingLayout::size_is_valid(size) {
            return Err(refuse(format!(
                "ring {index} cannot have {size} entries; a power of two up to 1024 would do"
            )));
        }
        let size = u16::try_from(size).map_err(|_| refuse("ring size"))?;
        if ring.size() != Some(size) {
            Self::frozen(ring, index, "size")?;
        }
        ring.set_size(size).map_err(|e| refuse(e.to_string()))?;
        self.attach(index)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let (index, ring) = self.ring(index)?;
        let addresses = RingAddresses {
            descriptors: descriptor,
            available,
            used,
        };
        if ring.addresses != Some(addresses) {
            Self::frozen(ring, index, "addresses")?;
        }
        ring.addresses = Some(addresses);
        ring.log_address = flags
            .contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG)
            .then_some(GuestAddress(log));
        let (known, attached) = (ring.size().is_some(), ring.attached);
        let ring = self.rings.get(usize::from(index));
        let memory = self.memory();
        let lies = ring.is_some_and(|ring| ring.locate(&memory).is_some());
        if known && !memory.is_empty() && !lies {
            if let Some(ring) = self.rings.get_mut(usize::from(index)) {
                ring.addresses = None;
            }
            return Err(refuse(format!("ring {index} does not lie in guest memory")));
        }
        if attached {
            self.send_log()?;
        }
        self.attach(index)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let (index, ring) = self.ring(index)?;
        Self::frozen(ring, index, "base")?;
        let base = u16::try_from(base)
            .map_err(|_| refuse(format!("the base of ring {index} is more than 16 bits")))?;
        ring.set_base(base);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let (number, _) = self.ring(index)?;
        self.detach(number)?;
        let (_, ring) = self.ring(index)?;
        ring.set_started(false);
        // The ring starts again with a new kick; a left-over one must not start it.
        ring.kick = None;
        let base = u32::from(ring.base());
        self.release_unless_serving();
        Ok(VhostUserVringState::new(index, base))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let (index, ring) = self.ring(index)?;
        let kick = Arc::new(match fd {
            Some(file) => Kick::Event(Event::new(file).map_err(host)?),
            None => Kick::Poll,
        });
        ring.kick = Some(Arc::clone(&kick));
        if ring.attached {
            let worker = self.worker(index).ok_or_else(|| refuse("no worker"))?;
            return worker.set_kick(index, kick).map_err(host);
        }
        self.attach(index)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let (index, ring) = self.ring(index)?;
        let call = fd.map(Event::new).transpose().map_err(host)?.map(Arc::new);
        ring.call.clone_from(&call);
        match (ring.attached, self.worker(index)) {
            (true, Some(worker)) => worker.set_call(index, call).map_err(host),
            _ => Ok(()),
        }
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let (index, ring) = self.ring(index)?;
        let err = fd.map(Event::new).transpose().map_err(host)?.map(Arc::new);
        ring.err.clone_from(&err);
        match (ring.attached, self.worker(index)) {
            (true, Some(worker)) => worker.set_err(index, err).map_err(host),
            _ => Ok(()),
        }
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(features::protocol())
    }

    fn set_protocol_features(&mut self, acked: u64) -> Result<()> {
        // The crate takes what the message says, whatever we answer.
        self.protocol = acked;
        let unknown = acked & !features::protocol().bits();
        if unknown != 0 {
            return Err(refuse(format!(
                "protocol features {unknown:#x} were not offered"
            )));
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(u64::from(self.setup.queues))
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let (index, ring) = self.ring(index)?;
        ring.set_enabled(enable);
        if enable {
            self.attach(index)
        } else {
            self.detach(index)
        }
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        let space = self.config_space();
        if offset < CAPACITY_BYTES {
            self.setup.state.told(space.capacity);
        }
        Ok(space.read(offset, size))
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], flags: VhostUserConfigFlags) -> Result<()> {
        match judge_write(offset, buf, flags.is_empty()) {
            ConfigWrite::Writeback(on) if self.acked() & features::CONFIG_WCE != 0 => {
                self.writeback = on;
                self.send_durability()
            }
            ConfigWrite::Writeback(_) => {
                Err(refuse("writeback cannot be chosen without CONFIG_WCE"))
            }
            ConfigWrite::Nothing => Ok(()),
            ConfigWrite::Refused => Err(refuse(format!(
                "{} bytes at {offset} of the configuration space cannot be written",
                buf.len()
            ))),
        }
    }

    /// The session has looked at the socket in the message before, and hands it over by `adopt_channel`.
    fn set_backend_req_fd(&mut self, _backend: Backend) {
        self.channel_came = self.has_protocol(VhostUserProtocolFeatures::CONFIG);
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(slots_max() as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<u64>> {
        let memory = self
            .memory()
            .with_region(spec_of(region), &fd)
            .map_err(|e| refuse_memory(&e))?;
        drop(fd);
        self.set_memory(memory)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let memory = self
            .memory()
            .without_region(spec_of(region))
            .map_err(|e| refuse_memory(&e))?;
        self.set_memory(memory)
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let log = DirtyLog::map(&file, log.mmap_offset, log.mmap_size).map_err(refuse_shared)?;
        drop(file);
        if self.acked() & features::LOG_ALL != 0 && !log.covers(&self.memory()) {
            return Err(refuse("the dirty log is too small for the memory"));
        }
        self.log = Some(Arc::new(log));
        self.send_log()
    }

    /// Nothing of it is kept: the front-end hands it back if it wants it used.
    fn get_inflight_fd(&mut self, asked: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        InflightBuffer::create(asked, self.setup.queues).map_err(host)
    }

    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> Result<()> {
        if self.is_serving() {
            return Err(refuse(
                "the inflight buffer cannot change while a ring is in use",
            ));
        }
        let buffer = InflightBuffer::map(&file, given, self.setup.queues).map_err(refuse_shared)?;
        self.inflight = Some(buffer);
        Ok(())
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        Err(refuse("this is no GPU"))
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        Err(refuse("SHARED_OBJECT was not offered"))
    }

    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        phase: VhostTransferStatePhase,
        file: File,
    ) -> Result<Option<File>> {
        self.transfer = None;
        if !self.has_protocol(VhostUserProtocolFeatures::DEVICE_STATE) || self.is_serving() {
            return Err(refuse(
                "the state is transferred only if that was agreed, and all rings are stopped",
            ));
        }
        let begun = Transfer::begin(&self.disk, direction, phase, file);
        self.transfer = Some(begun.map_err(host)?);
        Ok(None)
    }

    fn check_device_state(&mut self) -> Result<()> {
        let transfer = self.transfer.take().filter(|_| !self.is_serving());
        let transfer = transfer.ok_or_else(|| refuse("no state of the device was transferred"))?;
        transfer.check(&mut self.disk).map_err(host)
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(refuse("SHMEM was not offered"))
    }
}
