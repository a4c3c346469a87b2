//! The journal: records of 32 bytes in groups, each group closed by a commit record.

use super::header::{Header, LayerKind, MapHeader, MapState};
use super::{Encoder, FormatError, field, field_u32, field_u64};
use crate::map::record::{MapRecord, RecordKind};
use crate::map::set::SectorSet;
use crate::units::{Cluster, Epoch, Sector, SectorMask, SectorRange};

/// Bytes of a record.
pub const RECORD_BYTES: usize = 32;

// Where the fields of a record lie, and its kinds, as in FORMAT.md.
const AT_KIND: usize = 4;
const AT_PADDING: usize = 5;
const AT_SEQUENCE: usize = 8;
const AT_START: usize = 16;
const AT_COUNT: usize = 24;
const KIND_DATA: u8 = 1;
const KIND_ZERO: u8 = 2;
const KIND_COMMIT: u8 = 3;

/// What a record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Sectors change.
    Change(MapRecord),
    /// The group ends.
    Commit {
        /// Which group of the file: 1 for the first.
        epoch: Epoch,
        /// How many changes it has.
        records: u64,
    },
}

/// The part of every record's CRC that is not in the record: the layer and the incarnation of its map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seed(u32);

impl Seed {
    /// The seed of the records of this map.
    pub fn of(header: &Header) -> Self {
        let crc = crc32c::crc32c(header.map.layer.0.as_bytes());
        Self(crc32c::crc32c_append(
            crc,
            &header.incarnation.to_le_bytes(),
        ))
    }
}

/// The bytes of a record.
pub fn encode(seed: Seed, sequence: u64, entry: &Entry) -> [u8; RECORD_BYTES] {
    let (kind, start, count) = match entry {
        Entry::Change(record) => {
            let kind = match record.kind {
                RecordKind::Data => KIND_DATA,
                RecordKind::Zero => KIND_ZERO,
            };
            (kind, record.range.start.0, record.range.count)
        }
        Entry::Commit { epoch, records } => (KIND_COMMIT, epoch.0, *records),
    };
    let mut out = Encoder(Vec::with_capacity(RECORD_BYTES));
    out.put(AT_KIND, &[kind]);
    out.put(AT_SEQUENCE, &sequence.to_le_bytes());
    out.put(AT_START, &start.to_le_bytes());
    out.put(AT_COUNT, &count.to_le_bytes());
    let mut bytes = [0; RECORD_BYTES];
    bytes.copy_from_slice(&out.finish(RECORD_BYTES));
    let (crc_place, rest) = bytes.split_at_mut(AT_KIND);
    crc_place.copy_from_slice(&crc32c::crc32c_append(seed.0, rest).to_le_bytes());
    bytes
}

/// What 32 bytes of a journal are.
enum Slot {
    /// Never a record of this map, or no longer.
    Invalid,
    /// The checksum is right and the content is not: not torn, but wrong.
    Malformed {
        /// Its sequence.
        sequence: u64,
        /// What is wrong.
        what: String,
    },
    /// A record.
    Record {
        /// Its sequence.
        sequence: u64,
        /// What it says.
        entry: Entry,
    },
}

impl Slot {
    /// Tells what these bytes are.
    fn decode(seed: Seed, bytes: &[u8; RECORD_BYTES]) -> Self {
        // No field can be missing in an array of 32 bytes; if one were, the slot would be no record.
        Self::try_decode(seed, bytes).unwrap_or(Self::Invalid)
    }

    /// The same, with the fields that cannot be missing as errors.
    fn try_decode(seed: Seed, bytes: &[u8; RECORD_BYTES]) -> Result<Self, FormatError> {
        let [kind] = field(bytes, AT_KIND)?;
        let (_, covered) = bytes.split_at(AT_KIND);
        // Kind 0 is what bytes never written have, so it never counts as a record, whatever its checksum.
        if kind == 0 || field_u32(bytes, 0)? != crc32c::crc32c_append(seed.0, covered) {
            return Ok(Self::Invalid);
        }
        let sequence = field_u64(bytes, AT_SEQUENCE)?;
        let (start, count) = (field_u64(bytes, AT_START)?, field_u64(bytes, AT_COUNT)?);
        let malformed = |what: String| Ok(Self::Malformed { sequence, what });
        if field::<3>(bytes, AT_PADDING)? != [0; 3] {
            return malformed("padding that is not zero".into());
        }
        let change = |kind| match SectorRange::new(Sector(start), count) {
            Some(range) if count > 0 => Ok(Self::Record {
                sequence,
                entry: Entry::Change(MapRecord { kind, range }),
            }),
            _ => malformed(format!("{count} sectors from {start}")),
        };
        match kind {
            KIND_DATA => change(RecordKind::Data),
            KIND_ZERO => change(RecordKind::Zero),
            KIND_COMMIT => Ok(Self::Record {
                sequence,
                entry: Entry::Commit {
                    epoch: Epoch(start),
                    records: count,
                },
            }),
            _ => malformed(format!("kind {kind}")),
        }
    }
}

/// How a journal ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JournalEnd {
    /// Changes that were kept, not counting commit records.
    pub records: u64,
    /// The last good commit; 0 if there is none.
    pub epoch: Epoch,
    /// The sequence that the next record has.
    pub next_sequence: u64,
    /// The first byte after the last good commit: where the next group goes.
    pub end: u64,
    /// Bytes of a torn tail, up to the last that is not zero.
    pub dropped_bytes: u64,
}

impl JournalEnd {
    /// The end of a journal in which nothing was written yet.
    pub(crate) fn empty(header: &Header) -> Self {
        Self {
            records: 0,
            epoch: Epoch(0),
            next_sequence: 1,
            end: header.checkpoint.journal_offset(),
            dropped_bytes: 0,
        }
    }
}

/// The changes of the groups between two ends of a journal, in order. `bytes`: what the file has there.
///
/// # Errors
/// `Corrupt` if that is anything but whole groups that were written one after the other.
pub fn changes(
    seed: Seed,
    from: JournalEnd,
    to: JournalEnd,
    bytes: &[u8],
) -> Result<Vec<MapRecord>, FormatError> {
    let (slots, rest) = bytes.as_chunks::<RECORD_BYTES>();
    let mut changes = Vec::with_capacity(slots.len());
    let mut last = None;
    for (slot, expected) in slots.iter().zip(from.next_sequence..) {
        match Slot::decode(seed, slot) {
            Slot::Record { sequence, entry } if sequence == expected => {
                if let Entry::Change(change) = entry {
                    changes.push(change);
                }
                last = Some(entry);
            }
            _ => {
                let at = from.end + (expected - from.next_sequence) * RECORD_BYTES as u64;
                return Err(FormatError::corrupt(at, "no record where one was appended"));
            }
        }
    }
    let next = from.next_sequence + slots.len() as u64;
    let whole = match last {
        None => from.epoch == to.epoch,
        Some(Entry::Commit { epoch, .. }) => epoch == to.epoch,
        Some(Entry::Change(_)) => false,
    };
    if whole && rest.is_empty() && next == to.next_sequence {
        Ok(changes)
    } else {
        Err(FormatError::corrupt(
            from.end,
            format!(
                "{} bytes that are not the groups that were appended",
                bytes.len()
            ),
        ))
    }
}

/// What was found behind the first slot that is no record.
#[derive(Debug)]
struct Search {
    /// The byte of that slot.
    stop: u64,
    /// The sequence of a commit of the very next epoch: the group that may be torn.
    torn_commit: Option<u64>,
    /// The first proof that the group was whole once: where, and what.
    proof: Option<(u64, String)>,
    /// The newest commit found.
    newest: Option<Epoch>,
}

/// Reads a journal in pieces, from its start to the end of the file, and applies its groups to a set.
///
/// INVARIANT: `good` describes the journal up to its last commit; `set` has exactly the groups up to there.
#[derive(Debug)]
pub struct Replay {
    /// Of the records' CRC.
    seed: Seed,
    /// What the map says of its layer.
    map: MapHeader,
    /// The checkpoint, and the committed groups.
    set: SectorSet,
    /// Up to the last commit.
    good: JournalEnd,
    /// Changes of a group whose commit was not read yet.
    open: Vec<MapRecord>,
    /// The byte of the file that `feed` gets next.
    offset: u64,
    /// Bytes fed that are not a whole slot yet.
    partial: Vec<u8>,
    /// The first byte after the last that is not zero.
    nonzero_end: u64,
    /// Set when reading has stopped.
    search: Option<Search>,
    /// Something that no crash can leave behind.
    error: Option<FormatError>,
}

impl Replay {
    /// Starts at the journal's first byte. `set` is what the checkpoint holds.
    pub fn new(header: &Header, set: SectorSet) -> Self {
        let good = JournalEnd::empty(header);
        Self {
            seed: Seed::of(header),
            map: header.map.clone(),
            set,
            good,
            open: Vec::new(),
            offset: good.end,
            partial: Vec::new(),
            nonzero_end: good.end,
            search: None,
            error: None,
        }
    }

    /// Takes the next bytes of the file.
    pub fn feed(&mut self, mut bytes: &[u8]) {
        if !self.partial.is_empty() {
            let missing = RECORD_BYTES
                .saturating_sub(self.partial.len())
                .min(bytes.len());
            let (head, rest) = bytes.split_at(missing);
            self.partial.extend_from_slice(head);
            bytes = rest;
            if let Some(slot) = self.partial.first_chunk::<RECORD_BYTES>().copied() {
                self.partial.clear();
                self.slot(&slot);
            }
        }
        let (slots, rest) = bytes.as_chunks::<RECORD_BYTES>();
        for slot in slots {
            self.slot(slot);
        }
        self.partial.extend_from_slice(rest);
    }

    /// Takes the next slot.
    fn slot(&mut self, bytes: &[u8; RECORD_BYTES]) {
        let at = self.offset;
        self.offset = at.saturating_add(RECORD_BYTES as u64);
        if *bytes == [0; RECORD_BYTES] {
            // The commonest slot of all: what lies between the journal and the end of the file.
            self.stop(at);
            return;
        }
        self.nonzero(at, bytes);
        if self.error.is_some() {
            return;
        }
        let slot = Slot::decode(self.seed, bytes);
        if let Some(search) = &mut self.search {
            search.slot(at, slot, self.good.epoch);
            return;
        }
        let expected = self
            .good
            .next_sequence
            .saturating_add(self.open.len() as u64);
        match slot {
            Slot::Record { sequence, entry } if sequence == expected => self.record(at, entry),
            Slot::Malformed { sequence, what } if sequence == expected => {
                self.error = Some(FormatError::corrupt(
                    at,
                    format!("a journal record with {what}"),
                ));
            }
            slot => {
                self.stop(at);
                if let Some(search) = &mut self.search {
                    search.slot(at, slot, self.good.epoch);
                }
            }
        }
    }

    /// Remembers where the last byte is that is not zero.
    fn nonzero(&mut self, at: u64, bytes: &[u8]) {
        if let Some(last) = bytes.iter().rposition(|byte| *byte != 0) {
            self.nonzero_end = at.saturating_add(last as u64).saturating_add(1);
        }
    }

    /// No more records from here on, only proofs of damage.
    fn stop(&mut self, at: u64) {
        if self.search.is_none() {
            self.search = Some(Search {
                stop: at,
                torn_commit: None,
                proof: None,
                newest: None,
            });
        }
    }

    /// Takes the next record.
    fn record(&mut self, at: u64, entry: Entry) {
        match entry {
            Entry::Change(change) => {
                if change.range.end().0 > self.map.sectors_end() {
                    self.error = Some(FormatError::corrupt(
                        at,
                        format!(
                            "a journal record of {} sectors from {} on a disk of {}",
                            change.range.count, change.range.start, self.map.size
                        ),
                    ));
                    return;
                }
                self.open.push(change);
            }
            Entry::Commit { epoch, records } => {
                let (next, open) = (
                    Epoch(self.good.epoch.0.saturating_add(1)),
                    self.open.len() as u64,
                );
                if epoch != next || records != open {
                    self.error = Some(FormatError::corrupt(
                        at,
                        format!(
                            "commit {} of {records} records where commit {} of {open} was expected",
                            epoch.0, next.0
                        ),
                    ));
                    return;
                }
                for change in &self.open {
                    self.set.apply(change);
                }
                if let Some(cluster) = partly_zero(&self.open, &self.set) {
                    self.error = Some(FormatError::corrupt(
                        at,
                        format!(
                            "commit {} leaves cluster {} with sectors that are zero and others that are absent",
                            epoch.0, cluster.0
                        ),
                    ));
                    return;
                }
                self.open.clear();
                self.good = JournalEnd {
                    records: self.good.records.saturating_add(records),
                    epoch,
                    next_sequence: self
                        .good
                        .next_sequence
                        .saturating_add(records)
                        .saturating_add(1),
                    end: self.offset,
                    dropped_bytes: 0,
                };
            }
        }
    }

    /// The file has ended.
    ///
    /// # Errors
    /// `Corrupt` if something is there that no crash can have left.
    pub fn finish(mut self) -> Result<(SectorSet, JournalEnd), FormatError> {
        let partial = std::mem::take(&mut self.partial);
        self.nonzero(self.offset, &partial);
        if let Some(error) = self.error {
            return Err(error);
        }
        let (good, start) = (self.good, self.good.end);
        if self.map.state == MapState::Sealed && (self.nonzero_end > start || good.epoch.0 > 0) {
            let what = match self.map.kind {
                LayerKind::Differencing => "bytes after the checkpoint of a sealed map",
                LayerKind::RawBase(_) => "bytes after the header of a raw base's map",
            };
            return Err(FormatError::corrupt(start, what));
        }
        if let Some(Search {
            stop,
            proof: Some((at, proof)),
            newest,
            ..
        }) = self.search
        {
            let last = newest.map_or(0, |epoch| epoch.0);
            let next = good.epoch.0.saturating_add(1);
            return Err(FormatError::corrupt(
                stop,
                format!(
                    "a journal record is damaged: {proof} at byte {at} proves that commit {next} was whole once; \
                     lost: commits {next} to {}, which is {} bytes from byte {start}; commits up to {} ({} records) are good",
                    last.max(next),
                    self.nonzero_end.saturating_sub(start),
                    good.epoch.0,
                    good.records,
                ),
            ));
        }
        Ok((
            self.set,
            JournalEnd {
                dropped_bytes: self.nonzero_end.saturating_sub(start),
                ..good
            },
        ))
    }
}

/// A cluster in which these changes left some sectors zero and others absent. Only where a run of zeroes begins or ends
/// inside of a cluster can there be one.
fn partly_zero(changes: &[MapRecord], set: &SectorSet) -> Option<Cluster> {
    changes
        .iter()
        .filter(|change| change.kind == RecordKind::Zero)
        .flat_map(|change| [change.range.start, change.range.end()])
        .filter(|edge| edge.index_in_cluster() != 0)
        .map(Sector::cluster)
        .find(|cluster| {
            let (data, zero) = set.cluster(*cluster);
            zero != SectorMask::NONE && data.0 | zero.0 != SectorMask::ALL.0
        })
}

impl Search {
    /// Looks at a slot behind the stop, with `good` the last good commit.
    fn slot(&mut self, at: u64, slot: Slot, good: Epoch) {
        let (sequence, commit) = match slot {
            Slot::Invalid => return,
            Slot::Malformed { sequence, .. } => (sequence, None),
            Slot::Record {
                sequence,
                entry: Entry::Commit { epoch, .. },
            } => (sequence, Some(epoch)),
            Slot::Record { sequence, .. } => (sequence, None),
        };
        self.newest = self.newest.max(commit);
        let next = good.0.saturating_add(1);
        let proof = match commit {
            Some(epoch) if epoch.0 > next => Some(format!("commit {}", epoch.0)),
            _ if self.torn_commit.is_some_and(|torn| sequence > torn) => {
                Some(format!("record {sequence}, behind commit {next},"))
            }
            _ => None,
        };
        if self.proof.is_none()
            && let Some(proof) = proof
        {
            self.proof = Some((at, proof));
        }
        if commit == Some(Epoch(next)) {
            self.torn_commit = self.torn_commit.max(Some(sequence));
        }
    }
}
