//! A turn of what scrubs and takes checksums: a piece of one layer.
//!
//! Layers that a job works on are left alone: their data moves. What is read between two turns may have been changed by a job
//! that came and went; so nothing is believed of a layer before it was made sure, with the command lock held, that its map is
//! still the one that was read.

use std::collections::BTreeSet;
use std::sync::{Arc, Weak};
use std::time::Instant;

use crate::catalog::{JobId, LayerState};
use crate::error::{Error, Result};
use crate::file::{File, OpenMode};
use crate::format::sums::{Extent, SumsHeader};
use crate::lifecycle::{BadLayer, Phase, ScrubReport};
use crate::map::SectorSet;
use crate::mapfile::{MapFile, data_path};
use crate::ops::collect::jobs_on;
use crate::ops::jobs::rate::Bucket;
use crate::ops::merge::{Patience, Turn};
use crate::store::{Store, now_ns};
use crate::sumfile::{self, Found, SumsReader, SumsWriter};
use crate::units::{CLUSTER_SECTORS, Generation, LayerId, SECTOR_BYTES};
use crate::verify::{self, Mismatch, Scan, Verification};

use super::NAMED_MAX;

/// Bytes that are read in one turn.
const PIECE_BYTES: u64 = 1 << 20;
/// Bytes that are read in one turn however low the rate.
const LIMITED_BYTES_MIN: u64 = 64 << 10;
/// So often a layer is begun anew because it changed meanwhile.
const BEGINS_MAX: u32 = 3;

/// What is known from one turn to the next.
#[derive(Debug, Default)]
pub(crate) struct Scrubber {
    /// Whether all layers were looked at once.
    looked: bool,
    /// Layers that need checksums.
    missing: BTreeSet<LayerId>,
    /// The layer at work.
    work: Option<Work>,
    /// Keeps it to its rate.
    bucket: Bucket,
    /// The next turn of whoever keeps to the rate.
    due: Option<Instant>,
}

/// A layer at work.
#[derive(Debug)]
struct Work {
    /// The layer.
    layer: LayerId,
    /// The scrub that it is done for; `None`: it was sealed.
    of: Option<JobId>,
    /// The number of the map that was read.
    incarnation: u64,
    /// How often it was begun.
    begins: u32,
    /// What is done.
    kind: Kind,
}

/// What is done with a layer.
#[derive(Debug)]
enum Kind {
    /// Its checksums are taken.
    Take(Box<Scan>, Box<SumsWriter>),
    /// It is held against them.
    Verify(Box<Verify>),
}

/// A layer that is held against its checksums.
#[derive(Debug)]
struct Verify {
    /// Reads and compares.
    verification: Verification,
    /// What was damaged when it began.
    before: Option<Arc<SectorSet>>,
    /// What is damaged, of what was read so far.
    found: SectorSet,
    /// What nobody knows of, of what was read so far.
    unknown: SectorSet,
    /// Frames are trimmed again when nobody reads as before this generation.
    settle: Option<(Generation, SectorSet)>,
    /// Whether all was read.
    is_read: bool,
}

/// What comes after a turn.
enum Next {
    /// More of this layer.
    Goes(Work, u64),
    /// Nothing at the moment.
    Waits(Work),
    /// The layer is done.
    Done,
    /// It has to be begun anew: something changed.
    Again(Work),
}

/// Why a layer is left alone.
enum Obstacle {
    /// It is gone, or it is none to look at.
    Gone,
    /// A job works on it.
    Job(JobId),
}

impl Store {
    /// A turn. Whoever is patient keeps to the rate.
    pub(crate) fn scrub_turn(&self, scrubber: &mut Scrubber, patience: Patience) -> Turn {
        let now = Instant::now();
        if patience == Patience::Wait && scrubber.due.is_some_and(|due| due > now) {
            return Turn::Waits;
        }
        if !scrubber.looked {
            scrubber.looked = true;
            self.look_at_all(scrubber);
        }
        let sealed = std::mem::take(&mut self.jobs.board().scrubs.sealed);
        scrubber.missing.extend(sealed);
        let (turn, bytes, rate) = self.scrub_piece(scrubber);
        scrubber.due = Some(now + scrubber.bucket.took(bytes, rate, now));
        let at_work = scrubber.work.as_ref();
        let at_work = at_work.is_some_and(|work| matches!(work.kind, Kind::Take(..)));
        self.jobs.board().scrubs.waiting = scrubber.missing.len() + usize::from(at_work);
        turn
    }

    /// The rest of a turn. Returns how it ended, how much was read, and to what rate that is to be kept.
    fn scrub_piece(&self, scrubber: &mut Scrubber) -> (Turn, u64, Option<u64>) {
        let work = match scrubber.work.take() {
            Some(work) if self.goes_on(&work) => work,
            stale => {
                if let Some(stale) = stale {
                    self.put_back(scrubber, stale);
                }
                match self.next_work(scrubber) {
                    Ok(Some(work)) => work,
                    Ok(None) => return (Turn::Idle, 0, None),
                    // It was said why.
                    Err(()) => return (Turn::Aside, 0, None),
                }
            }
        };
        let rate = self.scrub_rate(work.of);
        let most = match rate {
            Some(rate) => PIECE_BYTES.min((rate / 4).max(LIMITED_BYTES_MIN)),
            None => PIECE_BYTES,
        };
        let (layer, of, begins) = (work.layer, work.of, work.begins);
        let next = match &work.kind {
            Kind::Take(..) => self.take_piece(work, most),
            Kind::Verify(..) => self.verify_piece(work, most),
        };
        let bytes = match next {
            Ok(Next::Goes(work, bytes)) => {
                scrubber.work = Some(work);
                bytes
            }
            Ok(Next::Waits(work)) => {
                scrubber.work = Some(work);
                return (Turn::Waits, 0, rate);
            }
            Ok(Next::Done) => {
                scrubber.missing.remove(&layer);
                0
            }
            Ok(Next::Again(work)) if begins < BEGINS_MAX => {
                match self.begin(work.layer, of, begins + 1) {
                    Ok(work) => scrubber.work = work,
                    Err(error) => self.left_out(layer, of, &error.to_string()),
                }
                0
            }
            Ok(Next::Again(_)) => {
                self.left_out(layer, of, "it was changed again and again meanwhile");
                0
            }
            Err(error) => {
                scrubber.missing.remove(&layer);
                sumfile::discard(&self.media, layer);
                self.left_out(layer, of, &error.to_string());
                0
            }
        };
        if of.is_some() {
            self.jobs.board().moved(bytes);
        }
        (Turn::Aside, bytes, rate)
    }

    /// Looks which layers have no checksums, and what an earlier scrub found.
    fn look_at_all(&self, scrubber: &mut Scrubber) {
        let layers: Vec<LayerId> = {
            let inner = self.inner();
            let rows = inner.catalog.state().layers.values();
            rows.filter(|row| row.state == LayerState::Sealed && row.base.is_none())
                .map(|row| row.id)
                .collect()
        };
        for layer in layers {
            self.look_for_bad(layer);
            if !sumfile::exists(&self.media, layer) {
                scrubber.missing.insert(layer);
            }
        }
    }

    /// Whether the layer at work is still to be looked at, and may be.
    fn goes_on(&self, work: &Work) -> bool {
        let wanted = match work.of {
            None => true,
            Some(id) => {
                let board = self.jobs.board();
                board.scrubs.next().is_some_and(|scrub| scrub.row.id == id)
            }
        };
        wanted && self.obstacle(work.layer).is_none()
    }

    /// What keeps a layer from being looked at. A job that has not begun to change it, or only copies from it, does not: as
    /// long as there are checksums, they are those of the data.
    fn obstacle(&self, layer: LayerId) -> Option<Obstacle> {
        let job = {
            let inner = self.inner();
            let state = inner.catalog.state();
            let row = state.layers.get(&layer);
            let fits = row.is_some_and(|row| row.state == LayerState::Sealed && row.base.is_none());
            if !fits {
                return Some(Obstacle::Gone);
            }
            jobs_on(state, layer).first().map(|job| job.id)
        };
        let job = job.filter(|_| !sumfile::exists(&self.media, layer));
        job.map(Obstacle::Job)
    }

    /// A job that works on a layer, or is to.
    fn job_on(&self, layer: LayerId) -> Option<JobId> {
        let inner = self.inner();
        let jobs = jobs_on(inner.catalog.state(), layer);
        jobs.first().map(|job| job.id)
    }

    /// A layer that cannot go on now is looked at from its beginning later.
    fn put_back(&self, scrubber: &mut Scrubber, work: Work) {
        if let Kind::Take(..) = work.kind {
            // What was begun is removed when it is begun anew; if it never is, `check` names it.
            scrubber.missing.insert(work.layer);
        }
        if let Some(id) = work.of
            && let Some(scrub) = self.jobs.board().scrubs.rows.get_mut(&id)
        {
            scrub.layers.push_front(work.layer);
        }
    }

    /// The rate of a scrub, or of what is done by itself.
    fn scrub_rate(&self, of: Option<JobId>) -> Option<u64> {
        match of {
            None => self.options.sums_rate,
            Some(id) => {
                let board = self.jobs.board();
                board.scrubs.rows.get(&id).and_then(|scrub| scrub.row.rate)
            }
        }
    }

    /// Takes up the next layer: of the oldest scrub, or one that needs checksums. `Err`: that one is not to be, and it was said
    /// why.
    fn next_work(&self, scrubber: &mut Scrubber) -> std::result::Result<Option<Work>, ()> {
        let next = {
            let mut board = self.jobs.board();
            let held_from = board.held_from;
            let scrub = board.scrubs.next().map(|scrub| scrub.row.id);
            let scrub = scrub.filter(|id| held_from.is_none_or(|held| *id < held));
            scrub.map(|id| {
                let scrub = board.scrubs.rows.get_mut(&id);
                (id, scrub.and_then(|scrub| scrub.layers.pop_front()))
            })
        };
        let (layer, of) = match next {
            Some((id, Some(layer))) => (layer, Some(id)),
            Some((id, None)) => {
                self.end_of_scrub(id);
                return Err(());
            }
            None => match scrubber.missing.pop_first() {
                Some(layer) => (layer, None),
                None => return Ok(None),
            },
        };
        if let Some(id) = of {
            self.show_progress(id, layer);
        }
        match self.obstacle(layer) {
            // Whoever ends the job says that it needs checksums.
            Some(Obstacle::Job(_)) if of.is_none() => Err(()),
            Some(Obstacle::Job(job)) => {
                let what = format!("job {} works on it", job.0);
                self.left_out(layer, of, &what);
                Err(())
            }
            Some(Obstacle::Gone) => {
                self.forget_gone();
                self.report(of, |report| {
                    report.layers_total = report.layers_total.saturating_sub(1)
                });
                Err(())
            }
            None => match self.begin(layer, of, 1) {
                Ok(Some(work)) => Ok(Some(work)),
                Ok(None) => Err(()),
                Err(error) => {
                    self.left_out(layer, of, &error.to_string());
                    Err(())
                }
            },
        }
    }

    /// Tells how much is before a scrub that takes up a layer.
    fn show_progress(&self, id: JobId, layer: LayerId) {
        let layers: Vec<LayerId> = {
            let board = self.jobs.board();
            if board.running == Some(id) {
                return;
            }
            let scrub = board.scrubs.rows.get(&id);
            let layers = scrub.map(|scrub| scrub.layers.iter().copied().collect());
            layers.unwrap_or_default()
        };
        let left = layers.into_iter().chain([layer]);
        let left = left.map(|layer| self.allocated(layer)).sum();
        let mut board = self.jobs.board();
        let row = board.scrubs.rows.get(&id).map(|scrub| scrub.row.clone());
        if let Some(row) = row {
            board.began(&row, left);
        }
    }

    /// Changes what a scrub reports.
    fn report(&self, of: Option<JobId>, change: impl FnOnce(&mut ScrubReport)) {
        let mut board = self.jobs.board();
        if let Some(scrub) = of.and_then(|id| board.scrubs.rows.get_mut(&id)) {
            change(&mut scrub.report);
        }
    }

    /// A layer was not looked at, or not to its end.
    fn left_out(&self, layer: LayerId, of: Option<JobId>, why: &str) {
        if self
            .obstacle(layer)
            .is_some_and(|what| matches!(what, Obstacle::Gone))
        {
            return;
        }
        match of {
            None => self.maintenance.note(format!(
                "layer {layer}: its checksums are not taken until it is scrubbed: {why}"
            )),
            Some(_) => self.report(of, |report| {
                report.left_out_total += 1;
                if report.left_out.len() < NAMED_MAX {
                    report.left_out.push((layer, why.to_owned()));
                }
            }),
        }
    }

    /// Takes a layer up. `None`: there is nothing to do.
    fn begin(&self, layer: LayerId, of: Option<JobId>, begins: u32) -> Result<Option<Work>> {
        let contents = MapFile::read(&self.media, layer)?;
        let (set, incarnation) = (Arc::new(contents.set), contents.incarnation);
        let extent = Extent::of(&set);
        let before = self.look_for_bad(layer);
        let sums = match self.usable_sums(layer, of, incarnation, &extent)? {
            Usable::Sums(sums) => sums,
            Usable::Leave => return Ok(None),
            Usable::Take if before.is_some() => {
                return Err(Error::Corrupt {
                    path: self.media.display_path(&data_path(layer)),
                    what: "some of it is known to be, and its checksums are lost: restore the layer's directory from a backup"
                        .into(),
                });
            }
            Usable::Take => {
                let header = SumsHeader {
                    store: self.id(),
                    layer,
                    incarnation,
                    extent,
                    taken_ns: now_ns(),
                };
                let path = data_path(layer);
                // What was just written is in memory still, and that is what was meant.
                let file = self
                    .media
                    .open(&path, OpenMode::ReadOnly, false)
                    .map_err(self.io("open", &path))?;
                let command = self.command();
                if let Some(job) = self.job_on(layer) {
                    if of.is_some() {
                        self.left_out(layer, of, &format!("job {} works on it", job.0));
                    }
                    return Ok(None);
                }
                if self.obstacle(layer).is_some() {
                    return Ok(None);
                }
                let writer = SumsWriter::create(&self.media, header)?;
                drop(command);
                let kind = Kind::Take(Box::new(Scan::new(file, set)), Box::new(writer));
                return Ok(Some(Work {
                    layer,
                    of,
                    incarnation,
                    begins,
                    kind,
                }));
            }
        };
        let (file, direct) = verify::open_uncached(&self.media, layer)
            .map_err(self.io("open", &data_path(layer)))?;
        self.check_same_file(layer, &file)?;
        self.report(of, |report| report.through_page_cache |= !direct);
        let verify = Verify {
            verification: Verification::new(file, set, sums),
            before,
            found: SectorSet::empty(),
            unknown: SectorSet::empty(),
            settle: None,
            is_read: false,
        };
        Ok(Some(Work {
            layer,
            of,
            incarnation,
            begins,
            kind: Kind::Verify(Box::new(verify)),
        }))
    }

    /// What is looked at must be the file that readers have open: one that took its name meanwhile says nothing of it.
    fn check_same_file(&self, layer: LayerId, file: &Arc<dyn File>) -> Result<()> {
        let path = data_path(layer);
        let known = self.inner().layers.get(&layer).and_then(Weak::upgrade);
        let Some(known) = known else {
            return Ok(());
        };
        let of = |file: &Arc<dyn File>| file.identity().map_err(self.io("stat", &path));
        if of(known.data())? == of(file)? {
            return Ok(());
        }
        Err(Error::Busy {
            what: format!(
                "{} was replaced by another file while it is in use; restart the daemon, or write into the file instead",
                self.media.display_path(&path).display()
            ),
        })
    }

    /// The checksums of a layer, if they are those of its map.
    fn usable_sums(
        &self,
        layer: LayerId,
        of: Option<JobId>,
        incarnation: u64,
        extent: &Extent,
    ) -> Result<Usable> {
        Ok(match sumfile::open(&self.media, layer)? {
            Found::None => Usable::Take,
            Found::Newer(what) => {
                self.left_out(
                    layer,
                    of,
                    &format!("its checksums are a newer version's: {what}"),
                );
                Usable::Leave
            }
            Found::Damaged(what) => {
                self.sums_damaged(layer, of, &what);
                Usable::Take
            }
            Found::Sums(sums) if sums.header.store != self.id() => {
                self.sums_damaged(layer, of, "they are those of another store");
                Usable::Take
            }
            Found::Sums(sums)
                if (sums.header.incarnation, &sums.header.extent) != (incarnation, extent) =>
            {
                self.maintenance.note(format!(
                    "layer {layer}: its checksums are those of an earlier map, and are taken anew"
                ));
                Usable::Take
            }
            Found::Sums(_) if of.is_none() => Usable::Leave,
            Found::Sums(sums) => Usable::Sums(sums),
        })
    }

    /// Checksums cannot be used.
    fn sums_damaged(&self, layer: LayerId, of: Option<JobId>, what: &str) {
        self.maintenance
            .note(format!("layer {layer}: its checksums are damaged: {what}"));
        self.report(of, |report| {
            if report.damaged_sums.len() < NAMED_MAX {
                report.damaged_sums.push(layer);
            }
        });
    }

    /// Whether a layer is still what was read. The caller holds the command lock.
    fn is_unchanged(&self, work: &Work) -> Result<bool> {
        if self.obstacle(work.layer).is_some() {
            return Ok(false);
        }
        let now = MapFile::read_incarnation(&self.media, work.layer)?;
        Ok(now == work.incarnation)
    }

    /// Takes the checksums of a piece.
    fn take_piece(&self, mut work: Work, most: u64) -> Result<Next> {
        let Kind::Take(scan, writer) = &mut work.kind else {
            return Ok(Next::Done);
        };
        let summed = scan.next_piece(most);
        let mut sums = Vec::with_capacity(summed.len());
        let mut bytes = 0;
        for one in &summed {
            let Some(sum) = one.sum else {
                let path = data_path(work.layer);
                return Err(Error::Corrupt {
                    path: self.media.display_path(&path),
                    what: format!("cluster {} cannot be read", one.cluster.0),
                });
            };
            sums.push(sum);
            bytes += u64::from(one.held.0.count_ones()) * SECTOR_BYTES;
        }
        if !summed.is_empty() {
            writer.push(&self.media, &sums)?;
            let of = work.of;
            self.report(of, |report| report.bytes += bytes);
            return Ok(Next::Goes(work, bytes));
        }
        writer.complete(&self.media)?;
        let _command = self.command();
        if !self.is_unchanged(&work)? {
            return Ok(Next::Again(work));
        }
        let of = work.of;
        if let Kind::Take(_, writer) = work.kind {
            writer.name(&self.media)?;
        }
        self.report(of, |report| {
            report.layers += 1;
            report.taken += 1;
        });
        Ok(Next::Done)
    }

    /// Holds a piece against its checksums.
    fn verify_piece(&self, mut work: Work, most: u64) -> Result<Next> {
        let Kind::Verify(verify) = &mut work.kind else {
            return Ok(Next::Done);
        };
        if let Some((generation, bad)) = &verify.settle {
            if !self.clock.quiescent_for_reads(*generation) {
                return Ok(Next::Waits(work));
            }
            // Frames that were being filled when it was found.
            self.trim_bad(work.layer, bad);
            verify.settle = None;
            return Ok(Next::Goes(work, 0));
        }
        if verify.is_read {
            return self.verified(work);
        }
        let piece = verify.verification.next_piece(most);
        let (of, bytes) = (work.of, piece.bytes);
        self.report(of, |report| report.bytes += bytes);
        verify.is_read = piece.is_last;
        for (cluster, held) in &piece.unknown {
            verify::add(&mut verify.unknown, *cluster, *held);
        }
        if piece.mismatches.is_empty() {
            return Ok(Next::Goes(work, bytes));
        }
        let _command = self.command();
        if !self.is_unchanged(&work)? {
            return Ok(Next::Again(work));
        }
        self.damaged(&mut work, &piece.mismatches)?;
        Ok(Next::Goes(work, bytes))
    }

    /// Data is not what it was: mends it, or sees to it that it is not served. The caller holds the command lock.
    fn damaged(&self, work: &mut Work, mismatches: &[Mismatch]) -> Result<()> {
        let (layer, of) = (work.layer, work.of);
        let Kind::Verify(verify) = &mut work.kind else {
            return Ok(());
        };
        let mut fresh = SectorSet::empty();
        let mut mended = 0;
        let mut failure = None;
        for one in mismatches {
            let read_again = || verify.verification.sum(one.cluster, one.held);
            match self.mend(layer, one, read_again) {
                Ok(true) => mended += 1,
                Ok(false) => verify::add(&mut fresh, one.cluster, one.held),
                Err(error) => {
                    verify::add(&mut fresh, one.cluster, one.held);
                    failure.get_or_insert(error);
                }
            }
        }
        if mended > 0 {
            self.maintenance.note(format!(
                "layer {layer}: {mended} clusters were damaged on the medium and were mended from the cache"
            ));
            self.report(of, |report| report.mended += mended);
        }
        if let Some(error) = failure {
            self.maintenance.note(format!(
                "layer {layer}: damage could not be mended: {error}"
            ));
        }
        if fresh.data_sectors() == 0 {
            return Ok(());
        }
        verify.found = fresh.over(&verify.found);
        let all = match &verify.before {
            Some(before) => verify.found.over(before),
            None => verify.found.clone(),
        };
        self.trim_bad(layer, &fresh);
        let written = self.set_bad(layer, &all);
        verify.settle = Some((self.clock.advance(), fresh));
        written
    }

    /// A layer was held against its checksums to its end.
    fn verified(&self, work: Work) -> Result<Next> {
        let Kind::Verify(verify) = &work.kind else {
            return Ok(Next::Done);
        };
        let (layer, of) = (work.layer, work.of);
        if !verify.verification.is_complete() {
            return Err(Error::Invalid {
                field: "scrub",
                what: format!(
                    "{} of {} checksums of layer {layer} were looked at: this is a defect of stratablk",
                    verify.verification.sums.handed_out(),
                    verify.verification.sums.header.extent.clusters
                ),
            });
        }
        let _command = self.command();
        if !self.is_unchanged(&work)? {
            return Ok(Next::Again(work));
        }
        // What was damaged before and could not be looked at now stays so.
        let mut bad = verify.found.clone();
        if let Some(before) = &verify.before {
            for run in verify.unknown.data_runs() {
                let first = run.start.cluster();
                let count = run.end().0.div_ceil(CLUSTER_SECTORS) - first.0;
                bad = before.within(first, count).over(&bad);
            }
        }
        let was = self.look_for_bad(layer);
        if was.as_deref().map_or(0, SectorSet::data_sectors) != 0 || bad.data_sectors() > 0 {
            self.set_bad(layer, &bad)?;
        }
        if bad.data_sectors() > 0 {
            self.say_bad(layer, of, &bad);
        }
        if verify.verification.sums.damaged_blocks > 0 {
            let blocks = verify.verification.sums.damaged_blocks;
            self.sums_damaged(layer, of, &format!("{blocks} blocks of them"));
            if bad.data_sectors() == 0 {
                // Taken anew: nobody can know what was there before.
                sumfile::remove(&self.media, layer)?;
                self.want_sums([layer]);
            }
        }
        self.report(of, |report| report.layers += 1);
        Ok(Next::Done)
    }

    /// Says what is damaged of a layer.
    fn say_bad(&self, layer: LayerId, of: Option<JobId>, bad: &SectorSet) {
        let found = BadLayer {
            layer,
            volumes: self.volumes_through(layer),
            bytes: bad.data_sectors() * SECTOR_BYTES,
            ranges: bad.data_runs().take(NAMED_MAX).collect(),
        };
        let first = found.ranges.first().map_or(0, |range| range.start.0);
        self.maintenance.note(format!(
            "layer {layer}: {} bytes of its data are damaged on the medium, the first at byte {} of the disk; \
             reads of them fail; it is part of {}",
            found.bytes,
            first * SECTOR_BYTES,
            if found.volumes.is_empty() {
                "no volume".to_owned()
            } else {
                found.volumes.join(", ")
            }
        ));
        self.report(of, |report| {
            report.bad_bytes += found.bytes;
            if report.bad.len() < NAMED_MAX {
                report.bad.push(found);
            }
        });
    }

    /// All layers of a scrub were looked at.
    fn end_of_scrub(&self, id: JobId) {
        let mut board = self.jobs.board();
        let report = board.scrubs.rows.get(&id).map(|scrub| scrub.report.clone());
        let error = report.and_then(|report| report.failure());
        let phase = if error.is_some() {
            Phase::Failed
        } else {
            Phase::Done
        };
        board.end_scrub(id, phase, error);
        if board.running == Some(id) {
            board.running = None;
        }
    }
}

/// What can be done with the checksums that there are.
enum Usable {
    /// The data is held against them.
    Sums(SumsReader),
    /// They are taken.
    Take,
    /// Nothing.
    Leave,
}
