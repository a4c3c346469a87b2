//! Whether the daemon can reach a file that a command names, so that who sends it is told what to do, and not "permission
//! denied" by whatever comes upon it first. The kernel judges by itself.

use std::path::{Path, PathBuf};

use super::places;

/// What a command wants of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// To read an image.
    Read,
    /// To write an image that is there.
    Write,
    /// To make a socket.
    Socket,
}

/// Why a file is out of reach, in words for who named it; `None` if it is within.
pub fn refusal(path: &Path, want: Want) -> Option<String> {
    let places = places().filter(|places| places.are_bounded())?;
    let own = [places.store.clone()];
    let remembered: &[PathBuf] = match want {
        Want::Read => &places.bases,
        Want::Write => &[],
        Want::Socket => &places.sockets,
    };
    let readable: &[PathBuf] = match want {
        Want::Read => &places.allow_read,
        Want::Write | Want::Socket => &[],
    };
    let control: Vec<PathBuf> = match (want, places.control.parent()) {
        (Want::Socket, Some(dir)) => vec![dir.to_owned()],
        _ => Vec::new(),
    };
    let found = real(path);
    let within = [&places.allow, readable, remembered, &own, &control]
        .into_iter()
        .flatten()
        .any(|dir| found.starts_with(real(dir)));
    if within {
        return None;
    }
    let option = match want {
        Want::Read => "--allow-read",
        Want::Write | Want::Socket => "--allow",
    };
    let dir = found.parent().unwrap_or(&found).display();
    let leads = if found == path {
        String::new()
    } else {
        format!(" leads to {}, which", found.display())
    };
    Some(format!(
        "{}{leads} is outside the directories that the daemon may use; restart it with `{option} {dir}` as well",
        path.display()
    ))
}

/// Where a path leads, or would lead if its last part were there.
fn real(path: &Path) -> PathBuf {
    let there = path.canonicalize();
    let beside = || {
        let (dir, name) = (path.parent()?, path.file_name()?);
        Some(dir.canonicalize().ok()?.join(name))
    };
    there
        .ok()
        .or_else(beside)
        .unwrap_or_else(|| path.to_owned())
}
