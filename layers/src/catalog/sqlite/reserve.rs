//! Space that is kept for what makes space: deleting something on a disk that is full to the last block begins with a commit to
//! the catalog, which needs a few blocks. They are kept in a file beside the catalog, which such a commit gives up.
//!
//! Best effort. Whoever is quicker may take what is given up; and a store without the file is as good as any.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Its name in the store's directory.
const RESERVE_NAME: &str = "reserve";
/// Bytes kept: a rollback journal and new pages for a delete of many layers.
const RESERVE_BYTES: usize = 256 << 10;

/// The reserve of a catalog.
fn of(catalog: &Path) -> PathBuf {
    catalog.with_file_name(RESERVE_NAME)
}

/// Makes the reserve, if it is not there and there is room.
pub(super) fn keep(catalog: &Path) {
    let path = of(catalog);
    let file = fs::File::options().write(true).create_new(true).open(&path);
    let Ok(mut file) = file else {
        return;
    };
    // Not a hole, and not what a file system could store in less.
    let bytes: Vec<u8> = (0..RESERVE_BYTES as u64 / 8)
        .flat_map(|n| (n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
        .collect();
    if io::Write::write_all(&mut file, &bytes).is_err() {
        let _ = fs::remove_file(&path);
    }
}

/// Gives the reserve up. Returns whether there was one.
pub(super) fn give_up(catalog: &Path) -> bool {
    fs::remove_file(of(catalog)).is_ok()
}
