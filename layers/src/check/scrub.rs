//! The data of sealed layers against their checksums, in a store that nobody uses. Nothing is changed: what is found is
//! reported, and a daemon that scrubs the layer then remembers it.

use std::sync::Arc;

use super::{FIX_RESTORE, Report, Severity};
use crate::badfile;
use crate::error::Error;
use crate::file::Media;
use crate::format::sums::Extent;
use crate::map::set::SectorSet;
use crate::mapfile::MapHeader;
use crate::sumfile::{self, Found};
use crate::units::SECTOR_BYTES;
use crate::verify::{self, Verification};

/// Bytes that are read at once.
const PIECE_BYTES: u64 = 1 << 20;
/// Runs of damaged sectors that are named.
const NAMED_MAX: usize = 20;

/// What becomes of checksums that cannot be used.
const FIX_TAKE: &str = "nothing; they are taken when the daemon next scrubs the layer";

/// Tells what an earlier scrub found damaged of a sealed layer.
pub(super) fn known_bad(media: &Arc<dyn Media>, header: &MapHeader, report: &mut Report) {
    let (what, fix) = match badfile::read(media, header.store, header.layer) {
        Ok(None) => return,
        Ok(Some(bad)) => (
            format!(
                "a scrub has found {} bytes of its data damaged; reads of them fail",
                bad.data_sectors() * SECTOR_BYTES
            ),
            "write them into the layer's data from a backup, then scrub it; only that ends the errors",
        ),
        Err(error @ (Error::Corrupt { .. } | Error::Unsupported { .. })) => (
            format!(
                "what a scrub has found damaged of its data is lost, so all reads of it fail: {error}"
            ),
            "start the daemon, which scrubs the layer by itself: what it finds in order is served again",
        ),
        Err(error) => (
            format!("what a scrub has found damaged of its data cannot be known: {error}"),
            "let the file be opened",
        ),
    };
    report.add(Severity::Error, Some(header.layer), what, fix);
}

/// Holds a sealed layer against its checksums.
pub(super) fn check(
    media: &Arc<dyn Media>,
    header: &MapHeader,
    set: &SectorSet,
    incarnation: u64,
    report: &mut Report,
) {
    let layer = Some(header.layer);
    let sums = match sumfile::open(media, header.layer) {
        Ok(Found::Sums(sums)) => sums,
        Ok(Found::None) => {
            let what = "it has no checksums, so its data cannot be verified";
            return report.add(Severity::Note, layer, what, FIX_TAKE);
        }
        Ok(Found::Newer(what)) => {
            let fix = "use the newer version that wrote them";
            return report.add(Severity::Warning, layer, format!("checksums: {what}"), fix);
        }
        Ok(Found::Damaged(what)) => {
            let what = format!("its checksums are damaged: {what}");
            return report.add(Severity::Warning, layer, what, FIX_TAKE);
        }
        Err(error) => return report.add(Severity::Error, layer, error.to_string(), FIX_RESTORE),
    };
    let said = &sums.header;
    if said.store != header.store || !said.belongs_to(incarnation, &Extent::of(set)) {
        let what = "its checksums are those of another map, so its data cannot be verified";
        return report.add(Severity::Warning, layer, what, FIX_TAKE);
    }
    let file = match verify::open_uncached(media, header.layer) {
        Ok((file, direct)) => {
            report.through_page_cache |= !direct;
            file
        }
        Err(error) => {
            let what = format!("its data cannot be read: {error}");
            return report.add(Severity::Error, layer, what, FIX_RESTORE);
        }
    };
    let mut verification = Verification::new(file, Arc::new(set.clone()), sums);
    let mut bad = SectorSet::empty();
    loop {
        let piece = verification.next_piece(PIECE_BYTES);
        if piece.is_last {
            break;
        }
        report.scrubbed_bytes += piece.bytes;
        for one in piece.mismatches {
            verify::add(&mut bad, one.cluster, one.held);
        }
    }
    report.scrubbed_layers += 1;
    let blocks = verification.sums.damaged_blocks;
    if blocks > 0 {
        let what = format!("{blocks} blocks of its checksums are damaged");
        report.add(Severity::Warning, layer, what, FIX_TAKE);
    }
    if !verification.is_complete() {
        let what = "not all of its checksums were looked at: this is a defect of stratablk";
        report.add(Severity::Error, layer, what, "");
    }
    if bad.data_sectors() > 0 {
        let runs = bad.data_runs().take(NAMED_MAX).map(|run| {
            format!(
                "{} to {}",
                run.start.0 * SECTOR_BYTES,
                run.end().0 * SECTOR_BYTES
            )
        });
        let what = format!(
            "{} bytes of its data are not what they were when it was sealed: bytes {}",
            bad.data_sectors() * SECTOR_BYTES,
            runs.collect::<Vec<_>>().join(", ")
        );
        report.add(Severity::Error, layer, what, FIX_RESTORE);
    }
}
