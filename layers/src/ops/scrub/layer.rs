//! One layer: its checksums are taken, or its data is held against them, a piece at a time.
//!
//! What is read between two turns may have been changed by a job that came and went; so nothing is believed of a layer before
//! it was made sure, with the command lock held, that its map is still the one that was read.

use std::sync::{Arc, Weak};

use crate::badfile::bad_path;
use crate::catalog::JobId;
use crate::error::{Error, Result};
use crate::file::{File, OpenMode};
use crate::format::sums::{Extent, SumsHeader};
use crate::lifecycle::BadLayer;
use crate::map::SectorSet;
use crate::mapfile::{MapFile, data_path};
use crate::store::{Store, now_ns};
use crate::sumfile::{self, Found, SumsReader, SumsWriter};
use crate::units::{CLUSTER_SECTORS, Generation, LayerId, SECTOR_BYTES};
use crate::verify::{self, Mismatch, Scan, Verification};

use super::NAMED_MAX;

/// A layer at work.
#[derive(Debug)]
pub(super) struct Work {
    /// The layer.
    pub layer: LayerId,
    /// The scrub that it is done for; `None`: it was sealed.
    pub of: Option<JobId>,
    /// The number of the map that was read.
    pub incarnation: u64,
    /// How often it was begun.
    pub begins: u32,
    /// What is done.
    pub kind: Kind,
}

/// What is done with a layer.
#[derive(Debug)]
pub(super) enum Kind {
    /// Its checksums are taken.
    Take(Box<Scan>, Box<SumsWriter>),
    /// It is held against them.
    Verify(Box<Verify>),
}

/// A layer that is held against its checksums.
#[derive(Debug)]
pub(super) struct Verify {
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
pub(super) enum Next {
    /// More of this layer.
    Goes(Work, u64),
    /// Nothing at the moment.
    Waits(Work),
    /// The layer is done.
    Done,
    /// It has to be begun anew: something changed.
    Again(Work),
}

impl Store {
    /// Takes a layer up. `None`: there is nothing to do.
    pub(super) fn begin(
        &self,
        layer: LayerId,
        of: Option<JobId>,
        begins: u32,
    ) -> Result<Option<Work>> {
        let contents = MapFile::read(&self.media, layer)?;
        let (set, incarnation) = (Arc::new(contents.set), contents.incarnation);
        let extent = Extent::of(&set);
        let before = self.look_for_bad(layer)?;
        let sums = match self.usable_sums(layer, of, incarnation, &extent)? {
            Usable::Sums(sums) => sums,
            Usable::Leave => return Ok(None),
            Usable::Take if before.is_some() => {
                return Err(self.cannot_be_told(layer));
            }
            Usable::Take => {
                let header = SumsHeader {
                    store: self.id(),
                    layer,
                    incarnation,
                    successor: 0,
                    extent,
                    taken_ns: now_ns(),
                };
                let path = data_path(layer);
                // What was just written is in memory still, and that is what was meant.
                let file = self
                    .media
                    .open(&path, OpenMode::ReadOnly, false)
                    .map_err(self.io("open", &path))?;
                // DURABILITY: what a job that has stopped has written where this layer is hidden, or given back of it, must not
                // be undone by a power cut when checksums say what is there now.
                file.sync_data().map_err(self.io("sync", &path))?;
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

    /// Some of a layer's data is damaged, or may be, and there is nothing to hold it against.
    fn cannot_be_told(&self, layer: LayerId) -> Error {
        if self.damage.is_lost(layer) {
            return Error::Corrupt {
                path: self.media.display_path(&bad_path(layer)),
                what: "it says what is damaged of its layer, whose checksums are lost too: restore the layer's directory from \
                       a backup, or remove this file, to take the data as it is, and restart the daemon"
                    .into(),
            };
        }
        Error::Corrupt {
            path: self.media.display_path(&data_path(layer)),
            what: "some of it is known to be, and its checksums are lost: restore the layer's directory from a backup"
                .into(),
        }
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
            Found::Sums(sums) if !sums.header.belongs_to(incarnation, extent) => {
                self.maintenance.note(format!(
                    "layer {layer}: its checksums are those of an earlier map, and are taken anew"
                ));
                Usable::Take
            }
            Found::Sums(_) if of.is_none() && !self.damage.is_lost(layer) => Usable::Leave,
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
    pub(super) fn take_piece(&self, mut work: Work, most: u64) -> Result<Next> {
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
    pub(super) fn verify_piece(&self, mut work: Work, most: u64) -> Result<Next> {
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
        self.damaged(&mut work, &piece.mismatches);
        Ok(Next::Goes(work, bytes))
    }

    /// Data is not what it was: mends it, or sees to it that it is not served. The caller holds the command lock.
    fn damaged(&self, work: &mut Work, mismatches: &[Mismatch]) {
        let (layer, of) = (work.layer, work.of);
        let Kind::Verify(verify) = &mut work.kind else {
            return;
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
            return;
        }
        verify.found = fresh.over(&verify.found);
        let all = match &verify.before {
            Some(before) => verify.found.over(before),
            None => verify.found.clone(),
        };
        self.trim_bad(layer, &fresh);
        // Of what is lost nothing is served anyhow, and that is remembered until all of it was looked at.
        if !self.damage.is_lost(layer)
            && let Err(error) = self.set_bad(layer, &all)
        {
            self.maintenance.note(format!(
                "layer {layer}: that it is damaged is not remembered over a restart: {error}"
            ));
        }
        verify.settle = Some((self.clock.advance(), fresh));
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
        let lost = self.damage.is_lost(layer);
        if self.look_for_bad(layer)?.is_some() || bad.data_sectors() > 0 {
            self.set_bad(layer, &bad)?;
        }
        if bad.data_sectors() > 0 {
            self.say_bad(layer, of, &bad);
        } else if lost {
            self.maintenance.note(format!(
                "layer {layer}: a scrub found nothing damaged; it is served again"
            ));
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
