//! What the sectors of a test image hold: every word differs from every other, so that misplaced data shows.

/// Bytes of a sector.
pub const SECTOR: usize = 512;

/// The content of sectors, as the image below a test's disk holds them.
pub fn base(sector: u64, count: u64) -> Vec<u8> {
    stamped(0, sector, count)
}

/// Content of sectors that depends on a version, for writes: version 0 is the image's own.
pub fn stamped(version: u64, sector: u64, count: u64) -> Vec<u8> {
    let words = SECTOR as u64 / 8;
    (sector * words..(sector + count) * words)
        .flat_map(|word| mix(word ^ (version << 48)).to_le_bytes())
        .collect()
}

/// Spreads the bits of a number over all 64 (the finaliser of SplitMix64).
fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Checks that bytes are what they should be, and names the first that is not.
///
/// # Panics
/// When they differ.
#[track_caller]
pub fn assert_same(actual: &[u8], expected: &[u8], what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}: lengths");
    let Some(at) = actual.iter().zip(expected).position(|(a, b)| a != b) else {
        return;
    };
    let end = actual.len().min(at + 8);
    panic!(
        "{what}: byte {} of sector {} is wrong: {:02x?} instead of {:02x?}",
        at % SECTOR,
        at / SECTOR,
        &actual[at..end],
        &expected[at..end],
    );
}
