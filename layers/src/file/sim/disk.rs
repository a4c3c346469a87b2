//! One simulated file: what reads see, what the medium holds, and the changes between the two.

use std::sync::Arc;

use super::content::{Content, SECTOR};
use super::faults::Fate;

/// A change of a file that no sync covered yet.
#[derive(Clone, Debug)]
pub(super) enum Change {
    /// Whole sectors; `len` if the file grew to it.
    Sectors {
        first: u64,
        bytes: Arc<[u8]>,
        len: Option<u64>,
    },
    /// Whole sectors of zeroes.
    Clear { first: u64, count: u64 },
    /// A new length.
    Len(u64),
}

impl Change {
    /// Whether it says anything about the file's length.
    fn changes_len(&self) -> bool {
        match self {
            Self::Sectors { len, .. } => len.is_some(),
            Self::Clear { .. } => false,
            Self::Len(_) => true,
        }
    }

    /// Makes the change as far as `survives` lets each sector, and the length if `with_len`.
    fn apply(&self, content: &mut Content, with_len: bool, mut survives: impl FnMut() -> bool) {
        match self {
            Self::Sectors { first, bytes, len } => {
                for (sector, bytes) in (*first..).zip(bytes.chunks(SECTOR)) {
                    if survives() {
                        content.put(sector, bytes);
                    }
                }
                if let (true, Some(len)) = (with_len, *len) {
                    content.len = content.len.max(len);
                }
            }
            Self::Clear { first, count } => content.clear_some(*first, *count, survives),
            Self::Len(len) => {
                if with_len {
                    content.set_len(*len);
                }
            }
        }
    }
}

/// See the module's text.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    /// What the medium holds.
    durable: Content,
    /// What reads see.
    view: Content,
    /// Changes after the last sync, in order. Applied to `durable` they give `view`, unless pages were lost.
    unsynced: Vec<Change>,
    /// How many changes came before these.
    synced: u64,
    /// Last change of the content.
    pub mtime_ns: i64,
    /// The path that it was created or last renamed to.
    pub path: Arc<str>,
}

impl Disk {
    /// A file that holds these bytes durably.
    pub(super) fn new(path: Arc<str>, content: Content, mtime_ns: i64) -> Self {
        let durable = content.clone();
        Self {
            durable,
            view: content,
            unsynced: Vec::new(),
            synced: 0,
            mtime_ns,
            path,
        }
    }

    /// What reads see.
    pub(super) fn view(&self) -> &Content {
        &self.view
    }

    /// Makes a change, not durably.
    fn change(&mut self, change: Change) {
        change.apply(&mut self.view, true, || true);
        self.unsynced.push(change);
    }

    /// The change that a write would be.
    pub(super) fn write_change(&self, offset: u64, data: &[u8]) -> Change {
        let (first, bytes) = self.view.with_written(offset, data);
        let end = offset + data.len() as u64;
        Change::Sectors {
            first,
            bytes: bytes.into(),
            len: (end > self.view.len).then_some(end),
        }
    }

    /// Writes.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        if !data.is_empty() {
            self.change(self.write_change(offset, data));
        }
    }

    /// Writes those sectors of `data` that `survives` lets.
    pub(super) fn write_some(
        &mut self,
        offset: u64,
        data: &[u8],
        mut survives: impl FnMut() -> bool,
    ) {
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let to_border = SECTOR - usize::try_from(at % SECTOR as u64).unwrap_or(0);
            let (part, tail) = rest.split_at(to_border.min(rest.len()));
            if survives() {
                self.write(at, part);
            }
            at += part.len() as u64;
            rest = tail;
        }
    }

    /// Punches. The parts of sectors at its ends are written as zeroes.
    pub(super) fn punch(&mut self, offset: u64, len: u64) {
        for change in self.punch_changes(offset, len) {
            self.change(change);
        }
    }

    /// The changes that a punch would be. It never changes the length.
    pub(super) fn punch_changes(&self, offset: u64, len: u64) -> Vec<Change> {
        let mut changes = Vec::new();
        let end = offset
            .saturating_add(len)
            .min(self.view.len.next_multiple_of(SECTOR as u64));
        if offset >= end {
            return changes;
        }
        let (first, last) = (offset.div_ceil(SECTOR as u64), end / SECTOR as u64);
        let edge = |from: u64, to: u64| {
            let zeroes = vec![0; usize::try_from(to - from).unwrap_or(0)];
            let (first, bytes) = self.view.with_written(from, &zeroes);
            Change::Sectors {
                first,
                bytes: bytes.into(),
                len: None,
            }
        };
        if first > last {
            changes.push(edge(offset, end));
            return changes;
        }
        let (head, tail) = (first * SECTOR as u64, last * SECTOR as u64);
        if offset < head {
            changes.push(edge(offset, head));
        }
        if first < last {
            changes.push(Change::Clear {
                first,
                count: last - first,
            });
        }
        if tail < end {
            changes.push(edge(tail, end));
        }
        changes
    }

    /// Sets the length.
    pub(super) fn set_len(&mut self, len: u64) {
        if len != self.view.len {
            self.change(Change::Len(len));
        }
    }

    /// The moment up to which a sync that begins now covers the changes.
    pub(super) fn sync_mark(&self) -> u64 {
        self.synced + self.unsynced.len() as u64
    }

    /// How many of the unsynced changes lie before a mark.
    fn covered(&self, mark: u64) -> usize {
        usize::try_from(mark.saturating_sub(self.synced))
            .unwrap_or(0)
            .min(self.unsynced.len())
    }

    /// Makes everything before the mark durable.
    pub(super) fn sync(&mut self, mark: u64) {
        let covered = self.covered(mark);
        for change in self.unsynced.drain(..covered) {
            change.apply(&mut self.durable, true, || true);
            self.synced += 1;
        }
    }

    /// A failed sync after which the unsynced sectors count as clean: see `FaultEffect::LostPages`.
    pub(super) fn lose_pages(&mut self, mark: u64, fate: &mut Fate) {
        let covered = self.covered(mark);
        fate.draw_share();
        let lost: Vec<Change> = self.unsynced.drain(..covered).collect();
        for change in &lost {
            change.apply(&mut self.durable, true, || fate.survives());
            self.synced += 1;
        }
        // Pages that were evicted since come back as the medium has them.
        for change in &lost {
            if let Change::Sectors { first, bytes, .. } = change {
                for sector in *first..*first + (bytes.len() / SECTOR) as u64 {
                    if fate.survives() {
                        self.view.put(sector, &self.durable.sector(sector));
                    }
                }
            }
        }
    }

    /// The file as found after a crash. `under_way` are the changes that were not complete, in any order.
    pub(super) fn after_crash(&self, under_way: &[Change], fate: &mut Fate) -> Self {
        let path = Arc::clone(&self.path);
        if self.unsynced.is_empty() && under_way.is_empty() {
            return Self::new(path, self.durable.clone(), self.mtime_ns);
        }
        fate.draw_share();
        let changes = || self.unsynced.iter().chain(under_way);
        // A file's lengths are changes of metadata, which a journal keeps in order.
        let mut lens = fate.prefix(changes().filter(|change| change.changes_len()).count());
        let mut content = self.durable.clone();
        for change in changes() {
            let with_len = change.changes_len() && lens > 0;
            lens -= usize::from(with_len);
            change.apply(&mut content, with_len, || fate.survives());
        }
        content.set_len(content.len);
        Self::new(path, content, self.mtime_ns)
    }

    /// Changes bytes under everybody's feet, durably: rot.
    pub(super) fn rot(&mut self, offset: u64, data: &[u8]) {
        for content in [&mut self.durable, &mut self.view] {
            let (first, bytes) = content.with_written(offset, data);
            for (sector, bytes) in (first..).zip(bytes.chunks(SECTOR)) {
                content.put(sector, bytes);
            }
            content.set_len(content.len);
        }
    }
}
