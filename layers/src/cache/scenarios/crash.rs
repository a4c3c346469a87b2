//! The end of the process before each store of the protocol, and what the next process makes of the frames.
//!
//! Single-threaded: an operation runs with a fuse (`sync::fused`) that ends it before its k-th store, for every k, be it of
//! a word of a set or of a byte of a frame. In pairs: a second operation runs over what the first one left unfinished, as it
//! would if the first one's thread had just lost its processor, and ends before its j-th store. Then `recover`, and all of
//! this must be true:
//!
//! - one frame a key, no lock and no fill left, every way usable;
//! - what was acknowledged and is in no file is in its frame, dirty, word for word;
//! - what is clean is what the file has;
//! - no sector but those that were being written or zeroed is anything else than it was.

use std::collections::{BTreeMap, BTreeSet};

use super::*;

use crate::map::fault::plant_here;
use crate::sync::fused::{stores, with_fuse};

/// Sectors of a frame, all of them.
const ALL: SectorMask = SectorMask::ALL;
/// A frame with dirty sectors (the first two), and all others clean.
const DIRTY: FrameKey = key(1, 0);
/// A clean frame.
const CLEAN: FrameKey = key(1, 1);
/// A frame that is being filled, with one dirty sector.
const FILLING: FrameKey = key(1, 2);
/// Clusters that have no frame.
const ABSENT: [FrameKey; 2] = [key(1, 3), key(1, 4)];
/// Frames of another layer: one dirty, two clean.
const OTHERS: [FrameKey; 3] = [key(2, 0), key(2, 1), key(2, 2)];
/// Ways that take part.
const FREE: usize = 6;

/// What the process does when it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    /// Overwrites a dirty sector.
    WriteDirtySector,
    /// Writes a clean sector of a dirty frame.
    WriteOtherSector,
    /// Writes a clean frame.
    WriteCleanFrame,
    /// Writes a cluster that has no frame, over another one's.
    WriteAbsent,
    /// Writes a frame that is being filled.
    WriteFilling,
    /// Claims a frame for a cluster that has none.
    Claim,
    /// Claims one and fills it.
    Fill,
    /// Ends the fill under way.
    Insert,
    /// Gives it up.
    Abandon,
    /// Zeroes a dirty cluster.
    Trim,
    /// Zeroes all of it but a sector that was written since.
    TrimPart,
    /// Zeroes a cluster that is being filled.
    TrimFilling,
    /// Writes a frame back.
    WriteBack,
    /// Drops the other layer.
    Drop,
}

/// All of them.
const OPS: [Op; 14] = [
    Op::WriteDirtySector,
    Op::WriteOtherSector,
    Op::WriteCleanFrame,
    Op::WriteAbsent,
    Op::WriteFilling,
    Op::Claim,
    Op::Fill,
    Op::Insert,
    Op::Abandon,
    Op::Trim,
    Op::TrimPart,
    Op::TrimFilling,
    Op::WriteBack,
    Op::Drop,
];

/// A process and what the outside knows of it.
struct Process {
    /// Its frames and files.
    world: Arc<World>,
    /// The fill under way.
    ticket: Option<Ticket>,
    /// What was acknowledged of each sector that was written.
    latest: BTreeMap<(u64, usize), u32>,
    /// Versions that may be in a sector, since a request was under way.
    perhaps: BTreeMap<(u64, usize), u32>,
    /// Sectors that may be gone, since they were zeroed or dropped, or being so.
    gone: BTreeSet<(u64, usize)>,
    /// Operations that did not end.
    unfinished: Vec<Op>,
}

impl Process {
    /// One that has been at work for a while.
    fn new() -> Self {
        let world = World::new(FREE);
        let mut latest = BTreeMap::new();
        let mut write = |key: FrameKey, mask| {
            assert!(world.write(key, mask, 2));
            latest.extend(sectors(mask).map(|sector| ((key.word(), sector), 2)));
        };
        for key in [DIRTY, CLEAN, OTHERS[1], OTHERS[2]] {
            assert!(world.fill(key, ALL).is_some());
        }
        write(DIRTY, BOTH);
        write(OTHERS[0], ONE);
        let ticket = world.claim(FILLING, ALL);
        assert!(ticket.is_some());
        write(FILLING, OTHER);
        Self {
            world,
            ticket,
            latest,
            perhaps: BTreeMap::new(),
            gone: BTreeSet::new(),
            unfinished: Vec::new(),
        }
    }

    /// What an operation writes, as version 3 (or a fourth one).
    fn writes(op: Op) -> Option<(FrameKey, SectorMask, u32)> {
        match op {
            Op::WriteDirtySector => Some((DIRTY, ONE, 3)),
            Op::WriteOtherSector => Some((DIRTY, SectorMask::span(2, 2), 4)),
            Op::WriteCleanFrame => Some((CLEAN, BOTH, 3)),
            Op::WriteAbsent => Some((ABSENT[0], BOTH, 3)),
            Op::WriteFilling => Some((FILLING, BOTH, 3)),
            _ => None,
        }
    }

    /// What an operation takes away.
    fn takes(op: Op) -> Vec<(FrameKey, SectorMask)> {
        match op {
            Op::Trim => vec![(DIRTY, ALL)],
            Op::TrimPart => vec![(DIRTY, SectorMask(!OTHER.0))],
            Op::TrimFilling => vec![(FILLING, ALL)],
            Op::Drop => OTHERS.map(|key| (key, ALL)).to_vec(),
            _ => Vec::new(),
        }
    }

    /// Carries an operation out.
    fn run(&mut self, op: Op) {
        let world = Arc::clone(&self.world);
        if let Some((key, mask, version)) = Self::writes(op) {
            assert!(world.write(key, mask, version), "no way is left");
            return;
        }
        match op {
            Op::Claim => drop(world.claim(ABSENT[1], ALL)),
            Op::Fill => drop(world.fill(ABSENT[1], ALL)),
            Op::Insert => {
                if let Some(ticket) = self.ticket.take() {
                    world.insert(ticket, ALL, world.read_file(FILLING, ALL));
                }
            }
            Op::Abandon => {
                if let Some(ticket) = self.ticket.take() {
                    world.sets().abandon(ticket);
                }
            }
            Op::WriteBack => drop(world.write_back(DIRTY)),
            Op::Drop => drop(world.sets().drop_layer(OTHERS[0].layer())),
            _ => {
                for (key, mask) in Self::takes(op) {
                    world.sets().trim(key, || SectorMask(!mask.0));
                }
            }
        }
    }

    /// Carries an operation out up to a store. Returns whether it came to its end, and was acknowledged.
    fn run_up_to(&mut self, op: Op, stores: u64) -> bool {
        let done = with_fuse(stores, || self.run(op)).is_some();
        if !done {
            self.unfinished.push(op);
        }
        if let Some((key, mask, version)) = Self::writes(op) {
            let written = sectors(mask).map(|sector| ((key.word(), sector), version));
            let known = if done {
                &mut self.latest
            } else {
                &mut self.perhaps
            };
            known.extend(written);
        }
        for (key, mask) in Self::takes(op) {
            let sectors = sectors(mask).map(|sector| (key.word(), sector));
            self.gone.extend(sectors);
        }
        done
    }

    /// The next process takes over.
    fn recover(&self) -> Vec<(FrameKey, SectorMask)> {
        let mut dirty = Vec::new();
        let hand_on = |key, mask| dirty.push((key, mask));
        let damaged = self.world.sets().recover(|_| true, &[], hand_on);
        assert_eq!(damaged, 0, "a frame that cannot be where it is");
        dirty
    }

    /// Fails unless the next process has found what it must find.
    fn assert_recovered(&self, handed_on: &[(FrameKey, SectorMask)]) {
        let set = &self.world.sets[0];
        assert_eq!(set.lock.load(Ordering::Relaxed), 0, "a lock is left");
        let mut dirty = Vec::new();
        for way in 0..WAYS {
            let key = FrameKey::from_word(set.keys[way].load(Ordering::Relaxed));
            let state = State(set.states[way].load(Ordering::Relaxed));
            assert!(!state.is_locked(), "a lock is left");
            assert!(!state.is_filling() && !state.is_spoiled(), "a fill is left");
            assert!(state.valid().contains(state.dirty()));
            assert_eq!(
                key == FrameKey::NONE,
                state.valid() == SectorMask::NONE,
                "a key without a frame"
            );
            if state.dirty() != SectorMask::NONE {
                dirty.push((key, state.dirty()));
            }
        }
        assert_eq!(dirty, handed_on, "every dirty frame is handed on");
        for key in [DIRTY, CLEAN, FILLING]
            .into_iter()
            .chain(ABSENT)
            .chain(OTHERS)
        {
            let state = self.world.state(key);
            for sector in 0..SECTORS {
                self.assert_sector(key, state, sector);
            }
        }
        for way in FREE..WAYS {
            assert_eq!(
                self.world.latest_in_frame(key(9, way as u64), 0),
                Some(FIRST)
            );
        }
    }

    /// The same for one sector.
    fn assert_sector(&self, key: FrameKey, state: Option<State>, sector: usize) {
        let at = (key.word(), sector);
        let mask = SectorMask(1 << sector);
        let latest = self.latest.get(&at).copied().unwrap_or(FIRST);
        let perhaps = self.perhaps.get(&at).copied();
        let in_file = u32::try_from(self.world.file(key, sector).load(Ordering::Relaxed)).unwrap();
        let held = state.filter(|state| state.valid().contains(mask));
        if let Some(state) = held
            && state.dirty().contains(mask)
        {
            let index = self.world.index(key).unwrap();
            let mut page = [0; SECTORS * WORDS];
            self.world.load(index, mask, &mut page);
            let words = &page[sector * WORDS..(sector + 1) * WORDS];
            let mixed = words.iter().any(|word| *word != words[0]);
            let may_mix = perhaps.is_some() && self.latest.contains_key(&at);
            assert!(
                !mixed || may_mix,
                "a sector that nobody was writing is mixed"
            );
            for word in words {
                let version = version(key, sector, &[*word]);
                assert!(
                    version == latest || Some(version) == perhaps,
                    "{key:?} sector {sector}: version {version} is in a dirty frame instead of {latest}"
                );
            }
            return;
        }
        if held.is_some() {
            assert_eq!(
                self.world.latest_in_frame(key, sector),
                Some(in_file),
                "what is clean is what the file has"
            );
        }
        assert!(
            in_file == latest || Some(in_file) == perhaps || self.gone.contains(&at),
            "{key:?} sector {sector}: what was acknowledged ({latest}) is lost, the file has {in_file}"
        );
    }

    /// The front-end submits again what was not completed.
    fn submit_again(&mut self) {
        self.ticket = None;
        let mut unfinished = std::mem::take(&mut self.unfinished);
        // A fill is no request: nobody would end it. Writes go first: until then what they were writing may be a mix.
        unfinished.retain(|op| *op != Op::Claim);
        unfinished.sort_by_key(|op| Self::writes(*op).is_none());
        for op in unfinished {
            assert!(self.run_up_to(op, u64::MAX), "nobody is in the way");
        }
        self.perhaps.clear();
    }

    /// Fails unless all ways can be used for something else, once they are clean.
    fn assert_usable(&self) {
        for key in [DIRTY, CLEAN, FILLING]
            .into_iter()
            .chain(ABSENT)
            .chain(OTHERS)
        {
            assert!(self.world.write_back(key), "nobody changes it");
        }
        let claim = |cluster| self.world.claim(key(7, cluster as u64), ALL);
        let claims: Vec<Ticket> = (0..FREE).map_while(claim).collect();
        assert_eq!(claims.len(), FREE, "a way is lost");
        for ticket in claims {
            self.world.sets().abandon(ticket);
        }
        assert!(self.world.write(DIRTY, ALL, 9));
        assert_eq!(self.world.latest(DIRTY, 7), 9);
    }
}

impl World {
    /// Where the frame of a key is.
    fn index(&self, key: FrameKey) -> Option<FrameIndex> {
        let keys = self.sets[0].keys.iter();
        let way = keys
            .map(|word| word.load(Ordering::Relaxed))
            .position(|word| word == key.word())?;
        Some(FrameIndex { set: 0, way })
    }

    /// Which version of a sector its frame has; fails if it is mixed.
    fn latest_in_frame(&self, key: FrameKey, sector: usize) -> Option<u32> {
        let mask = SectorMask(1 << sector);
        let mut page = [0; SECTORS * WORDS];
        self.load(self.index(key)?, mask, &mut page);
        versions(key, mask, &page)[sector]
    }
}

/// The stores before which an operation ends: all of them, or those near the start, the end and the middle, since the bytes
/// of a
/// frame are all alike.
fn ends(op: Op, all: bool) -> Vec<u64> {
    let mut process = Process::new();
    let count = stores(|| process.run(op));
    let near = 12;
    (0..=count)
        .filter(|at| all || *at < near || at + near > count || *at == count / 2)
        .collect()
}

/// Whether this is a long run.
fn is_long() -> bool {
    std::env::var_os("STRATABLK_LONG").is_some()
}

/// An operation ends before any of its stores, the next process takes over (and ends itself while it does so), and the
/// front-end
/// submits the request again.
fn crash_in(op: Op) {
    let mut seen = 0;
    for end in ends(op, true) {
        let mut process = Process::new();
        let done = process.run_up_to(op, end);
        seen += u32::from(!done);
        let handed_on = process.recover();
        process.assert_recovered(&handed_on);
        process.submit_again();
        let handed_on = process.recover();
        process.assert_recovered(&handed_on);
        process.assert_usable();
    }
    assert!(seen > 0, "the operation has stores");
}

/// An operation and the recovery after it end before any of their stores.
fn crash_in_recovery(op: Op) {
    for end in ends(op, is_long()) {
        for stores in 0.. {
            let mut process = Process::new();
            process.run_up_to(op, end);
            let done = with_fuse(stores, || process.recover()).is_some();
            let handed_on = process.recover();
            process.assert_recovered(&handed_on);
            process.submit_again();
            process.assert_usable();
            if done {
                break;
            }
        }
    }
}

/// Two operations end before any of their stores, the second one over what the first one left.
fn crash_in_two(first: Op, second: Op) {
    for end in ends(first, is_long()) {
        for other_end in ends(second, is_long()) {
            let mut process = Process::new();
            process.run_up_to(first, end);
            process.run_up_to(second, other_end);
            let handed_on = process.recover();
            process.assert_recovered(&handed_on);
            process.submit_again();
            process.assert_usable();
        }
    }
}

#[test]
fn a_crash_before_any_store_loses_nothing() {
    OPS.into_iter().for_each(crash_in);
}

#[test]
fn a_crash_before_any_store_of_a_recovery_loses_nothing() {
    OPS.into_iter().for_each(crash_in_recovery);
}

#[test]
fn a_crash_before_any_store_of_two_operations_loses_nothing() {
    for first in OPS {
        for second in OPS.into_iter().filter(|second| *second != first) {
            crash_in_two(first, second);
        }
    }
}

#[test]
fn frames_of_unknown_layers_are_dropped() {
    let process = Process::new();
    let mut dirty = Vec::new();
    let known = |layer| layer != OTHERS[0].layer();
    let hand_on = |key: FrameKey, _| dirty.push(key);
    assert_eq!(process.world.sets().recover(known, &[], hand_on), 0);
    assert!(OTHERS.iter().all(|key| process.world.state(*key).is_none()));
    assert!(dirty.contains(&DIRTY) && !dirty.contains(&OTHERS[0]));
    process.assert_usable();
}

#[test]
fn keys_that_cannot_be_where_they_are_are_dropped() {
    let sets: [Set; 64] = std::array::from_fn(|_| Set::default());
    let all = Sets::new(&sets, 7);
    let mut tally = Tally::default();
    for cluster in 0..20 {
        let written = all.write(key(1, cluster), ONE, true, &mut tally, |_| {}, |_| {});
        assert_eq!(written, Write::Done { dirtied: true });
    }
    let home = sets
        .iter()
        .position(|set| set.keys[0].load(Ordering::Relaxed) == key(1, 3).word())
        .unwrap();
    let put = |set: usize, way: usize, state: u64| {
        sets[set].keys[way].store(key(1, 3).word(), Ordering::Relaxed);
        sets[set].states[way].store(state, Ordering::Relaxed);
    };
    // A second time in its own set, dirty; in others, dirty, clean, and with bits that mean nothing.
    put(home, 5, 0x0101);
    put((home + 32) % 64, 1, 0x0101);
    put((home + 40) % 64, 2, 0x00ff);
    put((home + 41) % 64, 2, u64::MAX);
    let mut found = Vec::new();
    let damaged = all.recover(|_| true, &[], |key, mask| found.push((key, mask)));
    assert_eq!((damaged, found.len()), (3, 20));
    assert_eq!(all.count(), (20, 20));
}

#[test]
#[should_panic(expected = "a mix of two versions in a sector")]
fn caught_keep_torn() {
    let _planted = plant_here(Fault::KeepTorn);
    crash_in(Op::WriteCleanFrame);
}

#[test]
#[should_panic(expected = "a fill is left")]
fn caught_keep_filling() {
    let _planted = plant_here(Fault::KeepFilling);
    crash_in(Op::Claim);
}

#[test]
#[should_panic(expected = "a sector that nobody was writing is mixed")]
fn caught_masks_before_bytes() {
    let _planted = plant_here(Fault::MasksBeforeBytes);
    crash_in(Op::WriteOtherSector);
}
