//! The bitmaps of a checkpoint, whose checksums are right: accepted or refused, and what is accepted keeps the rules of a set.
//!
//! Input: two bytes say how long the data bitmap is, the rest is the bitmap of zeroes.

use stratablk_layers::limits::DISK_SECTORS_MAX;
use stratablk_layers::map::set::SectorSet;
use stratablk_layers::units::{CLUSTER_SECTORS, SectorMask, SectorRange};

use crate::input::Input;
use crate::memory::peak;

/// Memory that any input may take, and how many times its length it may take beyond. An entry of a bitmap may be 12 bytes and
/// stand for 8 KiB of bits.
const MEMORY: (usize, usize) = (1 << 20, 4096);

/// One input.
///
/// # Panics
/// If a bad set is accepted, or a good one does not come out as it went in.
pub fn run(bytes: &[u8]) {
    let mut input = Input(bytes);
    let len = usize::from(input.u16());
    let data = input.bytes(len);
    let zero = input.0;
    let (read, peak) = peak(|| SectorSet::from_portable(data, zero));
    assert!(
        peak <= MEMORY.0 + MEMORY.1 * bytes.len(),
        "{} bytes take {peak}",
        bytes.len()
    );
    if let Ok(set) = read {
        judge(&set, DISK_SECTORS_MAX + CLUSTER_SECTORS);
    }
}

/// Checks that a set keeps its rules, ends at `end`, and can be written and read.
///
/// # Panics
/// If not.
pub fn judge(set: &SectorSet, end: u64) {
    let mut sectors = 0u64;
    let mut last = None::<SectorRange>;
    let mut runs: Vec<SectorRange> = set.data_runs().take(4096).collect();
    let data = runs.len();
    runs.extend(set.zero_runs().take(4096));
    for (place, run) in runs.iter().enumerate() {
        assert!(
            run.count > 0 && run.end().0 <= end,
            "{run:?} beyond sector {end}"
        );
        if let Some(last) = last.filter(|_| place != data) {
            assert!(last.end().0 < run.start.0, "{last:?}, {run:?}");
        }
        last = Some(*run);
        sectors += run.count;
        for sector in [run.start.0, run.end().0 - 1] {
            let cluster = stratablk_layers::units::Sector(sector).cluster();
            let (data, zero) = set.cluster(cluster);
            assert_eq!(data.0 & zero.0, 0, "data and zeroes in cluster {cluster:?}");
            assert!(
                zero == SectorMask::NONE || data.0 | zero.0 == SectorMask::ALL.0,
                "zeroes in a part of cluster {cluster:?}"
            );
        }
    }
    if runs.len() < 4096 {
        assert_eq!(sectors, set.data_sectors() + set.zero_sectors());
    }
    let (data, zero) = set.to_portable();
    let again = SectorSet::from_portable(&data, &zero).expect("what is written can be read");
    assert_eq!(&again, set);
}
