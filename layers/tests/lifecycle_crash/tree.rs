//! What a tree of disks and snapshots may hold: flat copies, by sector the values that are allowed.
//!
//! A [`World`] is what a store shows: volumes by name, their snapshots, and what is in each. While a command is under way
//! there are two, that of before and that of after it; a crash must leave one of them, whole. What guests do meanwhile
//! happens in both.
//!
//! A disk in use has a history, since a crash may take back what no flush has covered and requests may overlap. A snapshot,
//! a clone, and what is restored are *still*: nobody writes to them, so they hold one value a sector. Which one that is
//! where several were allowed at the instant of the command is found out by looking, once the command has returned; from then
//! on it must never change, whatever is deleted, merged or resized around it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use stratablk_layers::catalog::VolumeKind;

use crate::oracle::{Promise, Value};

/// An instant: every event of a run has its own.
pub type Instant = u64;

/// A value that was written, or is being written.
#[derive(Clone, Copy, Debug)]
struct Entry {
    /// What.
    value: Value,
    /// When its request was issued.
    issued: Instant,
    /// When it ended; `Instant::MAX` while it is under way.
    ended: Instant,
}

impl Entry {
    /// What was there in the beginning.
    fn first(value: Value) -> Self {
        Self {
            value,
            issued: 0,
            ended: 0,
        }
    }
}

/// When the newest values that count were issued, by sector.
#[derive(Clone, Debug, Default)]
pub struct Marks(Vec<Instant>);

impl Marks {
    /// Raises those that are lower.
    fn raise(&mut self, other: &Self) {
        for (mark, other) in self.0.iter_mut().zip(&other.0) {
            *mark = (*mark).max(*other);
        }
    }
}

/// What a disk in use may hold.
#[derive(Clone, Debug)]
pub struct History {
    /// Every value of every sector that may still matter, in the order of issue.
    sectors: Vec<Vec<Entry>>,
    /// What a flush has covered.
    flushed: Marks,
    /// What was acknowledged.
    acknowledged: Marks,
}

impl History {
    /// A disk that holds these values, durably.
    fn new(values: &[Value]) -> Self {
        Self {
            sectors: values
                .iter()
                .map(|value| vec![Entry::first(*value)])
                .collect(),
            flushed: Marks(vec![0; values.len()]),
            acknowledged: Marks(vec![0; values.len()]),
        }
    }

    /// What must be there.
    fn marks(&self, promise: Promise) -> &Marks {
        match promise {
            Promise::Flushed => &self.flushed,
            Promise::Acknowledged => &self.acknowledged,
        }
    }

    /// The first sector with a value that is over, or was never written.
    fn wrong(&self, first: u64, found: &[Value], marks: &Marks) -> Option<String> {
        for (sector, value) in (first..).zip(found) {
            let at = sector as usize;
            let (Some(entries), Some(mark)) = (self.sectors.get(at), marks.0.get(at)) else {
                return Some(format!("sector {sector} is past the end"));
            };
            let may_be = |entry: &&Entry| entry.ended >= *mark;
            if entries
                .iter()
                .filter(may_be)
                .any(|entry| entry.value == *value)
            {
                continue;
            }
            let allowed: Vec<Value> = entries
                .iter()
                .filter(may_be)
                .map(|entry| entry.value)
                .collect();
            return Some(format!(
                "sector {sector} holds {value:?}; allowed: {allowed:?}"
            ));
        }
        None
    }

    /// Forgets values that can be found by nobody any more. No read may be under way that was issued before a flush which
    /// has ended.
    fn forget(&mut self) {
        for (entries, mark) in self.sectors.iter_mut().zip(&self.flushed.0) {
            entries.retain(|entry| entry.ended >= *mark);
        }
    }

    /// Makes the disk larger, by zeroes, or smaller.
    fn resize(&mut self, sectors: u64) {
        let sectors = sectors as usize;
        self.sectors
            .resize_with(sectors, || vec![Entry::first(Value::Zero)]);
        self.flushed.0.resize(sectors, 0);
        self.acknowledged.0.resize(sectors, 0);
    }
}

/// What something still holds.
#[derive(Clone, Debug)]
pub enum Content {
    /// Exactly this.
    Pinned(Arc<Vec<Value>>),
    /// What this disk of the world before the command held when the command was given, or something newer.
    Of {
        /// The disk.
        disk: String,
        /// What was flushed then.
        flushed: Marks,
        /// What was acknowledged then.
        acknowledged: Marks,
    },
}

/// What a disk holds.
#[derive(Clone, Debug)]
pub enum State {
    /// In use, or it may be at any time.
    Live(History),
    /// As a command that is under way leaves it.
    Still(Content),
}

/// A snapshot.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Equal for the snapshots of one command.
    pub group: u64,
    /// What it holds.
    pub content: Content,
}

/// A disk.
#[derive(Clone, Debug)]
pub struct Disk {
    /// Goes into the stamps; the same for all disks that came from one, so that others' data is seen as foreign.
    pub family: u64,
    /// Sectors.
    pub sectors: u64,
    /// Its type.
    pub kind: VolumeKind,
    /// Whether the next start of a machine resets it.
    pub armed: bool,
    /// The multiattach volume whose attachment it is.
    pub attached_from: Option<String>,
    /// What it is reset to, or what its attachments start from.
    pub floor: Option<Content>,
    /// What it holds.
    pub state: State,
    /// Its snapshots.
    pub snapshots: BTreeMap<String, Snapshot>,
}

impl Disk {
    /// A new disk that holds this.
    pub fn new(family: u64, sectors: u64, content: Content) -> Self {
        Self {
            family,
            sectors,
            kind: VolumeKind::Normal,
            armed: false,
            attached_from: None,
            floor: None,
            state: State::Still(content),
            snapshots: BTreeMap::new(),
        }
    }

    /// What it holds from the command on that is about to be given: for a snapshot, a clone, or a type that keeps it.
    pub fn content(&self, name: &str) -> Content {
        match &self.state {
            State::Still(content) => content.clone(),
            State::Live(history) => Content::Of {
                disk: name.to_owned(),
                flushed: history.flushed.clone(),
                acknowledged: history.acknowledged.clone(),
            },
        }
    }

    /// The same of a type.
    pub fn of_kind(mut self, kind: VolumeKind) -> Self {
        if let State::Still(content) = &self.state {
            let content = content.clone();
            self.turn_into(kind, content);
        }
        self
    }

    /// Takes a type, where it holds this.
    pub fn turn_into(&mut self, kind: VolumeKind, content: Content) {
        self.kind = kind;
        self.armed = kind == VolumeKind::Immutable;
        self.floor = None;
        if matches!(kind, VolumeKind::Immutable | VolumeKind::Multiattach) {
            // It is sealed for that, and durable.
            self.floor = Some(content.clone());
            self.state = State::Still(content);
        }
    }

    /// Goes on from a snapshot that holds this.
    pub fn restore(&mut self, content: Content) {
        self.sectors = content.sectors().unwrap_or(self.sectors);
        if self.floor.is_some() {
            self.floor = Some(content.clone());
        }
        self.state = State::Still(content);
    }

    /// A machine starts: what an immutable disk took is thrown away.
    pub fn machine_starts(&mut self) {
        if let Some(floor) = self.floor.as_ref().filter(|_| self.armed) {
            self.state = State::Still(floor.resized(self.sectors));
        }
        self.armed = false;
    }

    /// Takes over what guests did to it since its name was `name` and it became something else by a command to come.
    pub fn catch_up(&mut self, name: &str, now: &Self) {
        if let State::Live(_) = self.state {
            self.state = now.state.clone();
        }
        let contents = self
            .snapshots
            .values_mut()
            .map(|snapshot| &mut snapshot.content);
        for content in contents.chain(self.floor.as_mut()) {
            if matches!(content, Content::Of { disk, .. } if disk == name) {
                *content = now.content(name);
            }
        }
    }

    /// Another size: what is gained is zeroes.
    pub fn resize(&mut self, sectors: u64) {
        self.sectors = sectors;
        if let State::Live(history) = &mut self.state {
            history.resize(sectors);
        }
    }

    /// Its history.
    fn history(&self) -> Option<&History> {
        match &self.state {
            State::Live(history) => Some(history),
            State::Still(_) => None,
        }
    }

    /// Its history, to add to.
    fn history_mut(&mut self) -> Option<&mut History> {
        match &mut self.state {
            State::Live(history) => Some(history),
            State::Still(_) => None,
        }
    }
}

/// All that a store shows.
#[derive(Clone, Debug, Default)]
pub struct World {
    /// Its volumes.
    pub disks: BTreeMap<String, Arc<Disk>>,
}

/// Something that holds data: a volume (`None`), or a snapshot of it.
pub type Name = (String, Option<String>);

impl World {
    /// A disk, to change.
    pub fn disk_mut(&mut self, name: &str) -> Option<&mut Disk> {
        self.disks.get_mut(name).map(Arc::make_mut)
    }

    /// Everything that holds data.
    pub fn names(&self) -> Vec<Name> {
        let of = |(name, disk): (&String, &Arc<Disk>)| {
            let snapshots = disk.snapshots.keys().cloned().map(Some);
            let points: Vec<Name> = [None]
                .into_iter()
                .chain(snapshots)
                .map(|point| (name.clone(), point))
                .collect();
            points
        };
        self.disks.iter().flat_map(of).collect()
    }

    /// The disk of a name, and what its snapshot holds, if it is one.
    fn find(&self, name: &Name) -> Option<(&Disk, Option<&Content>)> {
        let disk = self.disks.get(&name.0)?;
        match &name.1 {
            None => Some((
                disk,
                match &disk.state {
                    State::Live(_) => None,
                    State::Still(content) => Some(content),
                },
            )),
            Some(snapshot) => Some((disk, Some(&disk.snapshots.get(snapshot)?.content))),
        }
    }

    /// The family of a name's stamps.
    pub fn family(&self, name: &Name) -> Option<u64> {
        self.find(name).map(|(disk, _)| disk.family)
    }

    /// Whether it is not yet known what exactly a name holds, although nobody writes to it.
    pub fn is_open(&self, name: &Name) -> bool {
        matches!(self.find(name), Some((_, Some(Content::Of { .. }))))
    }

    /// What is wrong with what was found under a name, if anything. `before` is the world before the command under way;
    /// `kept` what must be there of disks of before.
    pub fn wrong(
        &self,
        before: &Self,
        name: &Name,
        found: &[Value],
        promise: Promise,
    ) -> Option<String> {
        let told = |what: String| {
            let point = name.1.as_ref().map(|name| format!("@{name}"));
            Some(format!("{}{}: {what}", name.0, point.unwrap_or_default()))
        };
        let Some((disk, content)) = self.find(name) else {
            return told("it is not of this world".into());
        };
        let problem = match (content, disk.history()) {
            (None, None) => None,
            (None, Some(history)) => {
                if found.len() as u64 != disk.sectors {
                    return told(format!("{} sectors, not {}", found.len(), disk.sectors));
                }
                history.wrong(0, found, history.marks(promise))
            }
            (Some(content), _) => content.wrong(before, found, promise),
        };
        problem.and_then(told)
    }
}

impl Content {
    /// How many sectors that are, if it is known by itself.
    pub fn sectors(&self) -> Option<u64> {
        match self {
            Self::Pinned(values) => Some(values.len() as u64),
            Self::Of { .. } => None,
        }
    }

    /// The same on a disk of another size.
    pub fn resized(&self, sectors: u64) -> Self {
        match self {
            Self::Pinned(values) if values.len() as u64 != sectors => {
                let mut values = values.to_vec();
                values.resize(sectors as usize, Value::Zero);
                Self::pinned(values)
            }
            content => content.clone(),
        }
    }

    /// Exactly this.
    pub fn pinned(values: Vec<Value>) -> Self {
        Self::Pinned(Arc::new(values))
    }

    /// What is wrong with what was found, if anything.
    fn wrong(&self, before: &World, found: &[Value], promise: Promise) -> Option<String> {
        match self {
            Self::Pinned(values) => {
                let len = (values.len() != found.len())
                    .then(|| format!("{} sectors, not {}", found.len(), values.len()));
                let mut pairs = (0..).zip(values.iter().zip(found));
                len.or_else(|| {
                    let (sector, (must, is)) = pairs.find(|(_, (must, is))| must != is)?;
                    Some(format!(
                        "sector {sector} holds {is:?}, and held {must:?} before"
                    ))
                })
            }
            Self::Of {
                disk,
                flushed,
                acknowledged,
            } => {
                let marks = match promise {
                    Promise::Flushed => flushed,
                    Promise::Acknowledged => acknowledged,
                };
                let history = before.disks.get(disk).and_then(|disk| disk.history());
                match history {
                    None => Some(format!("{disk} is not there to compare with")),
                    Some(history) => history.wrong(0, found, marks),
                }
            }
        }
    }
}

/// The oracle of a run.
#[derive(Clone, Debug, Default)]
pub struct Oracle {
    /// The last event.
    now: Instant,
    /// What is there; while a command is under way, what was there before it.
    pub world: World,
    /// What will be there if the command under way succeeds.
    pub next: Option<World>,
}

impl Oracle {
    /// The next instant.
    fn tick(&mut self) -> Instant {
        self.now += 1;
        self.now
    }

    /// The disk in both worlds.
    fn both(&mut self, disk: &str) -> impl Iterator<Item = &mut History> {
        let worlds = [Some(&mut self.world), self.next.as_mut()];
        let disks = worlds
            .into_iter()
            .flatten()
            .filter_map(|world| world.disk_mut(disk));
        disks.filter_map(Disk::history_mut)
    }

    /// These sectors are about to get this value. Returns what names the request.
    pub fn issue(&mut self, disk: &str, sectors: Range<u64>, value: Value) -> Instant {
        let issued = self.tick();
        for history in self.both(disk) {
            for entries in &mut history.sectors[sectors.start as usize..sectors.end as usize] {
                entries.push(Entry {
                    value,
                    issued,
                    ended: Instant::MAX,
                });
            }
        }
        issued
    }

    /// The request that was issued then has ended, for these sectors: well or not, as durable or not.
    pub fn end(
        &mut self,
        disk: &str,
        issued: Instant,
        sectors: Range<u64>,
        ok: bool,
        stable: bool,
    ) {
        let now = self.tick();
        for history in self.both(disk) {
            for sector in sectors.start as usize..sectors.end as usize {
                let mut entries = history.sectors[sector].iter_mut();
                let entry = entries.find(|entry| entry.issued == issued);
                entry.expect("it was issued").ended = now;
                if ok {
                    let mark = &mut history.acknowledged.0[sector];
                    *mark = (*mark).max(issued);
                }
                if ok && stable {
                    let mark = &mut history.flushed.0[sector];
                    *mark = (*mark).max(issued);
                }
            }
        }
    }

    /// What is acknowledged now: what a flush that is about to be issued covers, and what a read that is about to be issued
    /// must not be older than.
    pub fn marks(&self, disk: &str) -> Marks {
        let history = self.world.disks.get(disk).and_then(|disk| disk.history());
        history.map_or_else(Marks::default, |history| history.acknowledged.clone())
    }

    /// The flush that was issued with these marks was acknowledged.
    pub fn flushed(&mut self, disk: &str, marks: &Marks) {
        for history in self.both(disk) {
            history.flushed.raise(marks);
        }
    }

    /// What is wrong with sectors that were read by a request that was issued with these marks, if anything.
    pub fn wrong_read(
        &self,
        disk: &str,
        first: u64,
        found: &[Value],
        marks: &Marks,
    ) -> Option<String> {
        let history = self.world.disks.get(disk).and_then(|disk| disk.history());
        history?.wrong(first, found, marks)
    }

    /// Forgets what can be found by nobody any more. No request of the disk may be under way.
    pub fn forget(&mut self, disk: &str) {
        if self.next.is_none() {
            self.both(disk).for_each(History::forget);
        }
    }

    /// A command is about to be given: what is there if it succeeds.
    pub fn begin(&mut self, next: World) {
        self.next = Some(next);
    }

    /// It was refused.
    pub fn refused(&mut self) {
        self.next = None;
    }

    /// It has succeeded. Returns the names of which it is to be found out what they hold; `pin` tells.
    pub fn done(&mut self) -> Vec<Name> {
        let Some(next) = &self.next else {
            return Vec::new();
        };
        let names = next.names().into_iter();
        names.filter(|name| next.is_open(name)).collect()
    }

    /// After `done`: this was found. Returns what is wrong with it, if anything; then `settle` ends it.
    pub fn pin(&mut self, name: &Name, found: Vec<Value>) -> Option<String> {
        let next = self.next.as_mut()?;
        // What was acknowledged is in it, and durable.
        let wrong = next.wrong(&self.world, name, &found, Promise::Acknowledged);
        self.learn(name, found);
        wrong
    }

    /// This is what a name of the world after the command holds.
    pub fn learn(&mut self, name: &Name, found: Vec<Value>) {
        let disk = self.next.as_mut().and_then(|next| next.disk_mut(&name.0));
        let Some(disk) = disk else {
            return;
        };
        let content = Content::pinned(found);
        // What an immutable or multiattach volume is made of is what it holds at the instant of the command.
        if matches!(disk.floor, Some(Content::Of { .. })) {
            disk.floor = Some(content.clone());
        }
        match &name.1 {
            None => disk.state = State::Still(content),
            Some(snapshot) => {
                if let Some(snapshot) = disk.snapshots.get_mut(snapshot) {
                    snapshot.content = content;
                }
            }
        }
    }

    /// The world of after the command is what is there from now on.
    pub fn settle(&mut self) {
        if let Some(next) = self.next.take() {
            self.world = next;
        }
        for disk in self.world.disks.values_mut() {
            if let State::Still(Content::Pinned(values)) = &disk.state {
                let history = History::new(values);
                Arc::make_mut(disk).state = State::Live(history);
            }
        }
    }

    /// This disk holds these values, durably: it was read and flushed after a crash.
    pub fn reset(&mut self, disk: &str, values: &[Value]) {
        if let Some(disk) = self.world.disk_mut(disk) {
            disk.state = State::Live(History::new(values));
        }
    }
}
