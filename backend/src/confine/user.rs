//! Who the daemon is, and what it may do by that: the switch to a user without privileges, and capabilities.
//!
//! The switch is made before anything is opened. Nothing that the daemon needs takes root: its store, its sockets'
//! directories and its cache belong to the user, or it is told at once what does not. A daemon that opened files first would
//! find out only at its next start, or when it makes the first layer, that they are not its own.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::Access;
use rustix::process::{DumpableBehavior, Gid, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::Role;
use super::accounts;

/// What the control side of a daemon that runs as root keeps: to open images and make sockets that belong to others, as the
/// person who started it expects of root.
const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER);
/// What must be there for the daemon to work in a store, if it is there at all.
const IN_STORE: [&str; 3] = ["catalog.db", "layers", "lock"];

/// Why the user was not switched.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// Only root can become somebody else.
    #[error(
        "--user {0}: only root can become another user; start the daemon as root, or as that user without --user"
    )]
    NotRoot(String),
    /// No such user.
    #[error("--user {0}: no such user in /etc/passwd; give a user's name or number")]
    NoSuchUser(String),
    /// No such group.
    #[error(
        "--user {user}: no group {group:?} in /etc/group; give NAME:GROUP with a group's name or number"
    )]
    NoSuchGroup {
        /// What was given.
        user: String,
        /// The part of it that is no group.
        group: String,
    },
    /// Root would remain root.
    #[error("--user {0}: that is root; give a user without privileges, or leave --user out")]
    IsRoot(String),
    /// The user cannot use the store.
    #[error("--user {user}: may not {what} {path}; as root: chown -R {user} {fix}")]
    NoAccess {
        /// The user.
        user: String,
        /// What it may not do.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What to give to the user.
        fix: PathBuf,
    },
    /// The host refused.
    #[error("--user {user}: {op}: {source}")]
    Host {
        /// The user.
        user: String,
        /// What was tried.
        op: &'static str,
        /// The host's answer.
        source: io::Error,
    },
}

/// Becomes the user `wanted` (`NAME` or `NAME:GROUP`), a member of its group and of `groups` and of no other, and checks
/// that it can use the store in `dir`. To be called while there is only one thread.
pub(super) fn switch(wanted: &str, dir: &Path, groups: &[u32]) -> Result<(), UserError> {
    let text = || wanted.to_owned();
    let host = |op| {
        move |source: io::Error| UserError::Host {
            user: text(),
            op,
            source,
        }
    };
    if !rustix::process::geteuid().is_root() {
        return Err(UserError::NotRoot(text()));
    }
    let (name, group) = match wanted.split_once(':') {
        Some((name, group)) => (name, Some(group)),
        None => (wanted, None),
    };
    let user = accounts::user(name).map_err(host("read /etc/passwd"))?;
    let user = user.ok_or_else(|| UserError::NoSuchUser(text()))?;
    let no_group = |group: &str| UserError::NoSuchGroup {
        user: text(),
        group: group.to_owned(),
    };
    let gid = match (group, user.gid) {
        (Some(group), _) => {
            let found = accounts::group(group).map_err(host("read /etc/group"))?;
            found.ok_or_else(|| no_group(group))?
        }
        (None, Some(gid)) => gid,
        (None, None) => return Err(no_group("")),
    };
    if user.uid == 0 {
        return Err(UserError::IsRoot(text()));
    }
    // These numbers mean "leave it as it is" to the kernel.
    if user.uid == u32::MAX || gid == u32::MAX {
        return Err(UserError::NoSuchUser(text()));
    }
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(gid));
    let members: Vec<Gid> = groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    // Groups first: a user without privileges may not change them. Each of these is for the calling thread, which is all.
    let errno = |op| move |errno: rustix::io::Errno| host(op)(errno.into());
    rustix::thread::set_thread_groups(&members).map_err(errno("set the groups"))?;
    rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(errno("set the group"))?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(errno("set the user"))?;
    check_store(dir).map_err(|(what, path)| UserError::NoAccess {
        user: text(),
        what,
        path,
        fix: dir.to_owned(),
    })?;
    tracing::info!(uid = user.uid, gid = gid.as_raw(), "running as {name}");
    Ok(())
}

/// Checks that this user can work in the store, or make it: what it may not do, and where.
fn check_store(dir: &Path) -> Result<(), (&'static str, PathBuf)> {
    let all = Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK;
    if !dir.exists() {
        let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        // `exists` is also false for what lies in a directory that one may not enter.
        return rustix::fs::access(parent, all).map_err(|_| ("make a store in", parent.to_owned()));
    }
    if rustix::fs::access(dir, all).is_err() {
        return Err(("use the store", dir.to_owned()));
    }
    let inside = IN_STORE.iter().map(|name| dir.join(name));
    match inside
        .filter(|path| path.exists())
        .find(|path| rustix::fs::access(path, Access::READ_OK | Access::WRITE_OK).is_err())
    {
        Some(path) => Err(("read and write", path)),
        None => Ok(()),
    }
}

/// No core files, which would hold guests' data, and no tracing by other processes of the same user.
pub(super) fn no_core_files() -> io::Result<()> {
    Ok(rustix::process::set_dumpable_behavior(
        DumpableBehavior::NotDumpable,
    )?)
}

/// Gives up all capabilities but those that the control side keeps, for good.
pub(super) fn shed_for_all() -> io::Result<()> {
    // Nobody can give us any of these by another program; without the privilege to say so, `no new privileges` does.
    for bit in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        if rustix::thread::remove_capability_from_bounding_set(capability).is_err() {
            break;
        }
    }
    rustix::thread::clear_ambient_capability_set()?;
    keep(KEPT)
}

/// Gives up the capabilities that this thread does not need.
pub(super) fn shed(role: Role<'_>) -> io::Result<()> {
    match role {
        Role::Control | Role::Work | Role::Attachment { .. } => keep(KEPT),
        Role::Worker | Role::Files => keep(CapabilitySet::empty()),
    }
}

/// Keeps, of what this thread has, these.
fn keep(wanted: CapabilitySet) -> io::Result<()> {
    let kept = rustix::thread::capabilities(None)?.permitted & wanted;
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: kept,
            permitted: kept,
            inheritable: CapabilitySet::empty(),
        },
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn a_store_that_cannot_be_used_is_told_before_it_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(check_store(dir.path()), Ok(()));
        assert_eq!(check_store(&dir.path().join("new")), Ok(()));
        let nowhere = dir.path().join("no/such");
        assert_eq!(
            check_store(&nowhere),
            Err(("make a store in", nowhere.parent().unwrap().to_owned()))
        );
    }
}
