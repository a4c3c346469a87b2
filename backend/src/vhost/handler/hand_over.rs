//! A device that goes from one process to the next, with its front-end connected: what it was told, as messages
//! ([`Message`]), and the few things that no message says.
//!
//! Nothing is copied for that, no descriptor either: messages and device share what they have, and the device ends.
//!
//! Whoever takes it over is told everything before its rings run: workers have them, and take nothing from them until it is
//! certain who serves them.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use stratablk_layers::units::Sector;
use vhost::vhost_user::message::FrontendReq;

use super::{DiskProvider, Handler};
use crate::vhost::config_space::WRITEBACK_OFFSET;
use crate::vhost::event::{Event, Kick};
use crate::vhost::features;
use crate::vhost::message::{DESCRIPTORS_MAX, Message};
use crate::vhost::vring::Vring;

/// What no message says of a session.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// Whether rings have run in it: a machine that goes on does not start.
    pub begun: bool,
    /// Whether its front-end was told that the disk is read-only.
    pub read_only: bool,
    /// The size that its front-end knows, in sectors.
    pub size_told: Option<u64>,
    /// The saved state that its machine is to go on from.
    pub loaded: Option<Vec<u8>>,
    /// Rings that are in use.
    pub started: Vec<u16>,
}

impl<P: DiskProvider> Handler<P> {
    /// Stops all rings, completes what is under way, lets the disk go and says what there is to say to who serves the
    /// front-end next. A state of the device that has just begun to be transferred is not: its front-end finds out when it asks
    /// how that went, and keeps its disk.
    ///
    /// # Errors
    /// A worker is gone.
    pub fn hand_over(&mut self) -> io::Result<(Facts, Vec<Message>)> {
        if self.transfer.take().is_some() {
            tracing::warn!("a state that is being transferred does not go on in another process");
        }
        let numbered = || (0u16..).zip(&self.rings);
        let started = numbered().filter(|(_, ring)| ring.is_started());
        let facts = Facts {
            begun: self.setup.state.has_begun(),
            read_only: self.disk.read_only(),
            size_told: self.setup.state.size_told().map(|size| size.0),
            loaded: self.disk.loaded().map(<[u8]>::to_vec),
            started: started.map(|(index, _)| index).collect(),
        };
        self.detach_together().map_err(io::Error::other)?;
        let messages = self.messages();
        self.finish();
        Ok((facts, messages))
    }

    /// Takes all rings from their workers at once.
    fn detach_together(&mut self) -> io::Result<()> {
        let mut answers = Vec::new();
        for (index, ring) in (0u16..).zip(&self.rings) {
            if ring.attached
                && let Some(worker) = self.worker(index)
            {
                answers.push((usize::from(index), worker.begin_detach(index)?));
            }
        }
        for (index, answer) in answers {
            let base = answer.recv().map_err(io::Error::other)?;
            if let Some(ring) = self.rings.get_mut(index) {
                ring.attached = false;
                ring.set_base(base.unwrap_or(ring.base()));
            }
        }
        Ok(())
    }

    /// What the front-end has said, as far as it still counts.
    fn messages(&self) -> Vec<Message> {
        use FrontendReq as Req;
        let mut said = Vec::new();
        if self.owned {
            said.push(Message::plain(Req::SET_OWNER));
        }
        if self.features_read {
            said.push(Message::plain(Req::GET_FEATURES));
        }
        if self.protocol != 0 {
            said.push(Message::number(Req::SET_PROTOCOL_FEATURES, self.protocol));
        }
        self.say_memory(&mut said);
        if let Some(log) = &self.log {
            let (file, offset, len) = log.source();
            said.push(Message::log(Arc::clone(file), offset, len));
        }
        if let Some(features) = self.features {
            said.push(Message::number(Req::SET_FEATURES, features));
            let cache = features & (features::FLUSH | features::CONFIG_WCE);
            if self.writeback != (cache != features::CONFIG_WCE) {
                let value = u8::from(self.writeback);
                said.push(Message::config_byte(WRITEBACK_OFFSET, value));
            }
        }
        if let Some(channel) = &*self.setup.state.channel() {
            let socket = channel.descriptor();
            said.push(Message::descriptor(Req::SET_BACKEND_REQ_FD, socket));
        }
        if let Some(inflight) = &self.inflight {
            let (file, shape) = inflight.source();
            said.push(Message::inflight(Arc::clone(file), &shape));
        }
        for (index, ring) in (0u16..).zip(&self.rings) {
            self.say_ring(index, ring, &mut said);
        }
        said
    }

    /// The memory.
    fn say_memory(&self, said: &mut Vec<Message>) {
        let memory = self.memory();
        let regions = memory.sources();
        let regions: Vec<_> = regions
            .map(|(spec, file)| (spec, Arc::clone(file)))
            .collect();
        if regions.is_empty() {
            return;
        }
        if regions.len() <= DESCRIPTORS_MAX {
            said.push(Message::memory_table(regions));
        } else {
            let added = regions.into_iter();
            said.extend(added.map(|(spec, file)| Message::region(&spec, file)));
        }
    }

    /// A ring, of which something may have been said.
    fn say_ring(&self, index: u16, ring: &Vring, said: &mut Vec<Message>) {
        use FrontendReq as Req;
        let event = |event: &Event| Some(event.descriptor());
        if let Some(size) = ring.size() {
            said.push(Message::ring(Req::SET_VRING_NUM, index, u32::from(size)));
        }
        if let Some(addresses) = &ring.addresses {
            let log = ring.log_address.map(|address| address.0);
            said.push(Message::addresses(index, addresses, log));
        }
        if ring.base() != 0 {
            let base = u32::from(ring.base());
            said.push(Message::ring(Req::SET_VRING_BASE, index, base));
        }
        if let Some(call) = &ring.call {
            said.push(Message::event(Req::SET_VRING_CALL, index, event(call)));
        }
        if let Some(err) = &ring.err {
            said.push(Message::event(Req::SET_VRING_ERR, index, event(err)));
        }
        if let Some(kick) = &ring.kick {
            let kick = match &**kick {
                Kick::Event(kick) => event(kick),
                Kick::Poll => None,
            };
            said.push(Message::event(Req::SET_VRING_KICK, index, kick));
        }
        // Without PROTOCOL_FEATURES they are enabled by SET_FEATURES, and no message does it.
        if ring.is_enabled() && self.acked() & features::PROTOCOL_FEATURES != 0 {
            said.push(Message::ring(Req::SET_VRING_ENABLE, index, 1));
        }
    }

    /// Begins a session that somebody else has begun. Nothing was said of it yet, and until [`Handler::release`] its rings take
    /// nothing.
    pub fn adopt(&mut self, facts: &Facts) {
        self.held = true;
        self.disk.adopt(facts.read_only, facts.loaded.clone());
        if let Some(size) = facts.size_told {
            self.setup.state.told(Sector(size));
        }
        if facts.begun && !self.setup.state.begun.swap(true, Ordering::Relaxed) {
            self.setup.turns.begin();
        }
    }

    /// Lets the rings run that are in use. They are looked at without a kick: somebody else has taken the kicks for what lies
    /// in them. Needs nothing of the host.
    pub fn release(&mut self, facts: &Facts) {
        self.held = false;
        for index in &facts.started {
            if let Some(ring) = self.rings.get_mut(usize::from(*index)) {
                ring.set_started(true);
            }
        }
        for worker in self.workers.iter().flatten() {
            // One that is gone has raised the alarm, which ends the session.
            let _ = worker.release();
        }
    }

    /// Whether all rings that are to run do.
    pub fn has_all(&self, facts: &Facts) -> bool {
        let runs = |index: &u16| {
            let ring = self.rings.get(usize::from(*index));
            ring.is_some_and(|ring| ring.attached || !ring.is_enabled())
        };
        facts.started.iter().all(runs)
    }
}
