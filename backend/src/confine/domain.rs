//! The files that each kind of thread may open, by Landlock.
//!
//! Rules cannot be widened once they are in force, and the control socket names images and sockets later than that. So
//! there are two ways, and the operator's `--allow` chooses:
//! - Without it, the control side may read any file that its user may, write to files that are there (`--into-base`), and
//!   make and remove sockets; but make other files, directories and links in its own directories only, and execute nothing.
//! - With `--allow` or `--allow-read`, only these directories, its own, and those of the images and sockets that the store
//!   remembered when the daemon started.
//!
//! Threads that guests and front-ends reach need no choice: an attachment knows its volume's image and its socket when it
//! starts, and workers open nothing.

use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    PathFdError, RestrictionStatus, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
    make_bitflags,
};

use super::Role;

/// The newest version of Landlock whose rights are handled here; an older kernel takes those that it knows.
const KNOWN: ABI = ABI::V6;

/// What the host says of itself, where the C library, the Rust runtime or SQLite look: to be read by all that open files.
const SYSTEM: [&str; 5] = [
    "/dev/urandom",
    "/etc/group",
    "/proc/meminfo",
    "/proc/sys/kernel/random/boot_id",
    "/sys/devices/system/cpu",
];

/// Where the daemon's files lie.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Places {
    /// The store.
    pub store: PathBuf,
    /// Where the cache's memory file lies.
    pub cache: Option<PathBuf>,
    /// The control socket.
    pub control: PathBuf,
    /// Directories that the operator allows, to read and write images in and to make sockets.
    pub allow: Vec<PathBuf>,
    /// Directories that the operator allows, to read images in.
    pub allow_read: Vec<PathBuf>,
    /// Directories of the images that the store remembers.
    pub bases: Vec<PathBuf>,
    /// Directories of the sockets that the store remembers.
    pub sockets: Vec<PathBuf>,
}

impl Places {
    /// Whether the operator says where images and sockets may be.
    pub fn are_bounded(&self) -> bool {
        !self.allow.is_empty() || !self.allow_read.is_empty()
    }
}

/// To read images, and look for them.
const READ: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ReadFile | ReadDir});
/// To make and remove the names of sockets.
const SOCKETS: BitFlags<AccessFs> = make_bitflags!(AccessFs::{MakeSock | RemoveFile});
/// The images and sockets of an operator: to read and write images that are there, to make and remove sockets.
const USE: BitFlags<AccessFs> =
    make_bitflags!(AccessFs::{ReadFile | ReadDir | WriteFile | MakeSock | RemoveFile});
/// The store.
const OWN: BitFlags<AccessFs> = make_bitflags!(AccessFs::{
    ReadFile | ReadDir | WriteFile | Truncate | MakeReg | MakeDir | MakeSock | RemoveFile | RemoveDir | Refer
});
/// The directory of the cache's memory file.
const CACHE: BitFlags<AccessFs> =
    make_bitflags!(AccessFs::{ReadFile | WriteFile | Truncate | MakeReg | RemoveFile});

/// What lies beneath a path, and what may be done with it.
type Grant<'a> = (&'a Path, BitFlags<AccessFs>);

/// What a thread may do with files.
fn grants<'a>(role: Role<'a>, places: &'a Places) -> Vec<Grant<'a>> {
    let system = SYSTEM.iter().map(|path| (Path::new(path), READ));
    let store = (places.store.as_path(), OWN);
    match role {
        Role::Worker | Role::Files => Vec::new(),
        Role::Attachment { socket } => system
            .chain([store])
            .chain(parent(socket).map(|dir| (dir, AccessFs::RemoveFile.into())))
            .collect(),
        Role::Control | Role::Work => {
            let mut all: Vec<Grant<'a>> = vec![store];
            all.extend(places.cache.as_deref().map(|dir| (dir, CACHE)));
            all.extend(parent(Some(&places.control)).map(|dir| (dir, SOCKETS)));
            if places.are_bounded() {
                all.extend(system);
                let beneath = |dirs: &'a [PathBuf], access| {
                    dirs.iter().map(move |dir| (dir.as_path(), access))
                };
                all.extend(beneath(&places.allow, USE));
                all.extend(beneath(&places.allow_read, READ));
                all.extend(beneath(&places.bases, READ));
                all.extend(beneath(&places.sockets, SOCKETS));
            } else {
                all.push((Path::new("/"), USE));
            }
            all
        }
    }
}

/// The directory of a path.
fn parent(path: Option<&Path>) -> Option<&Path> {
    path?.parent().filter(|dir| !dir.as_os_str().is_empty())
}

/// The oldest version of Landlock that is of use: the first one forbids links from one directory to another, with which layers
/// are joined, whatever is granted.
const NEEDED: ABI = ABI::V2;

/// Whether this kernel has Landlock.
pub(super) fn probe() -> io::Result<()> {
    // Rules that are made and not put in force.
    Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(NEEDED))
        .and_then(Ruleset::create)
        .map(drop)
        .map_err(io::Error::other)
}

/// Rules that forbid all that Landlock can, before anything is granted.
fn rules() -> Result<Ruleset, landlock::RulesetError> {
    Ruleset::default()
        .handle_access(AccessFs::from_all(KNOWN))?
        .handle_access(AccessNet::from_all(KNOWN))
}

/// Confines this thread, and those that it starts, to the files that its work takes.
pub(super) fn enter(role: Role<'_>, places: Option<&Places>) -> io::Result<()> {
    let none = Places::default();
    let unknown = places.is_none() && !matches!(role, Role::Worker | Role::Files);
    if unknown {
        return Err(io::Error::other("nobody has said where the files lie"));
    }
    let status = restrict(role, &grants(role, places.unwrap_or(&none)))?;
    // Where there is no Landlock the log has said so at the start.
    if status.ruleset == RulesetStatus::NotEnforced {
        tracing::debug!(?role, "not confined by Landlock");
    }
    Ok(())
}

/// Puts the rules in force.
fn restrict(role: Role<'_>, grants: &[Grant<'_>]) -> io::Result<RestrictionStatus> {
    let failed = io::Error::other::<landlock::RulesetError>;
    let scope = match role {
        // A service manager may listen in the abstract name space.
        Role::Control | Role::Work => Scope::Signal.into(),
        Role::Attachment { .. } | Role::Worker | Role::Files => Scope::from_all(KNOWN),
    };
    let mut created = rules()
        .and_then(|rules| rules.scope(scope))
        .and_then(Ruleset::create)
        .map_err(failed)?;
    for (path, access) in grants {
        let fd = match PathFd::new(path) {
            Ok(fd) => fd,
            Err(PathFdError::OpenCall { source, .. }) => {
                // What is not there now cannot be opened later; whoever tries is told.
                tracing::debug!(path = %path.display(), "not granted: {source}");
                continue;
            }
            Err(error) => return Err(io::Error::other(error)),
        };
        created = created
            .add_rule(PathBeneath::new(fd, *access))
            .map_err(failed)?;
    }
    created.restrict_self().map_err(failed)
}
