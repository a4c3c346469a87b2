//! The simulated directories: names that lookups see, names that the medium holds, and the changes between the two.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Component, Path};
use std::sync::Arc;

use super::faults::Fate;

/// A file or a directory, whatever its names.
pub(super) type Inode = u32;

/// The directory that relative paths start from.
pub(super) const STORE_ROOT: Inode = 0;
/// The directory that absolute paths start from.
pub(super) const HOST_ROOT: Inode = 1;
/// The first number for anything else.
pub(super) const FIRST_INODE: Inode = 2;

/// The names in a directory. Copies share until changed.
type Entries = Arc<BTreeMap<Arc<str>, Inode>>;

/// One atomic change of names: each edit puts a name into a directory or takes it out.
#[derive(Clone, Debug)]
struct NameChange {
    edits: Vec<(Inode, Arc<str>, Option<Inode>)>,
}

/// One directory.
#[derive(Clone, Debug, Default)]
struct Directory {
    /// What the medium holds.
    durable: Entries,
    /// What lookups see.
    view: Entries,
}

/// All directories.
#[derive(Clone, Debug)]
pub(super) struct Names {
    directories: BTreeMap<Inode, Directory>,
    /// Not durable yet, in order.
    unsynced: Vec<NameChange>,
}

/// ENOENT.
fn not_found() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOENT)
}

impl Names {
    /// Two empty roots.
    pub(super) fn new() -> Self {
        let roots = [
            (STORE_ROOT, Directory::default()),
            (HOST_ROOT, Directory::default()),
        ];
        Self {
            directories: BTreeMap::from(roots),
            unsynced: Vec::new(),
        }
    }

    /// What a path leads to.
    pub(super) fn find(&self, path: &Path) -> io::Result<Inode> {
        let mut at = if path.is_absolute() {
            HOST_ROOT
        } else {
            STORE_ROOT
        };
        for component in path.components() {
            match component {
                Component::RootDir | Component::CurDir => {}
                Component::Normal(name) => {
                    let name = name.to_str().ok_or_else(not_found)?;
                    let directory = self.directories.get(&at);
                    let directory =
                        directory.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOTDIR))?;
                    at = directory.view.get(name).copied().ok_or_else(not_found)?;
                }
                Component::Prefix(_) | Component::ParentDir => {
                    return Err(io::ErrorKind::InvalidInput.into());
                }
            }
        }
        Ok(at)
    }

    /// The directory that a path's last name is in, and that name.
    pub(super) fn find_parent(&self, path: &Path) -> io::Result<(Inode, Arc<str>)> {
        let name = path.file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let parent = self.find(path.parent().unwrap_or(Path::new("")))?;
        if !self.is_directory(parent) {
            return Err(io::Error::from_raw_os_error(libc::ENOTDIR));
        }
        Ok((parent, name.into()))
    }

    /// Whether it is a directory.
    pub(super) fn is_directory(&self, inode: Inode) -> bool {
        self.directories.contains_key(&inode)
    }

    /// What a directory holds under a name.
    pub(super) fn get(&self, directory: Inode, name: &str) -> Option<Inode> {
        self.directories.get(&directory)?.view.get(name).copied()
    }

    /// The names in a directory, sorted.
    pub(super) fn list(&self, directory: Inode) -> io::Result<Vec<String>> {
        let directory = self.directories.get(&directory);
        let directory = directory.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOTDIR))?;
        Ok(directory.view.keys().map(ToString::to_string).collect())
    }

    /// Makes changes of names as one.
    fn change(&mut self, edits: Vec<(Inode, Arc<str>, Option<Inode>)>) {
        for (directory, name, inode) in &edits {
            if let Some(directory) = self.directories.get_mut(directory) {
                edit(&mut directory.view, name, *inode);
            }
        }
        self.unsynced.push(NameChange { edits });
    }

    /// Puts a name.
    pub(super) fn add(&mut self, directory: Inode, name: Arc<str>, inode: Inode) {
        self.change(vec![(directory, name, Some(inode))]);
    }

    /// Makes an empty directory known.
    pub(super) fn add_directory(&mut self, directory: Inode, name: Arc<str>, inode: Inode) {
        self.directories.insert(inode, Directory::default());
        self.add(directory, name, inode);
    }

    /// Takes a name out.
    pub(super) fn remove(&mut self, directory: Inode, name: Arc<str>) {
        self.change(vec![(directory, name, None)]);
    }

    /// Takes a directory out with all in it: from the inside to the outside, each name a change of its own.
    pub(super) fn remove_all(&mut self, parent: Inode, name: Arc<str>, inode: Inode) {
        let inner = self
            .directories
            .get(&inode)
            .map(|directory| Arc::clone(&directory.view));
        for (inner_name, inner_inode) in inner.iter().flat_map(|entries| entries.iter()) {
            self.remove_all(inode, Arc::clone(inner_name), *inner_inode);
        }
        self.remove(parent, name);
    }

    /// Moves a name, over another if there is one.
    pub(super) fn rename(&mut self, from: (Inode, Arc<str>), to: (Inode, Arc<str>), inode: Inode) {
        self.change(vec![(from.0, from.1, None), (to.0, to.1, Some(inode))]);
    }

    /// Makes the names in a directory durable. A rename from or to another directory takes that one's earlier changes with
    /// it, since each directory's changes become durable in order.
    pub(super) fn sync(&mut self, directory: Inode) {
        let mut needed = BTreeSet::from([directory]);
        let mut keep = vec![false; self.unsynced.len()];
        for (change, keep) in self.unsynced.iter().zip(&mut keep).rev() {
            *keep = change
                .edits
                .iter()
                .all(|(directory, ..)| !needed.contains(directory));
            if !*keep {
                needed.extend(change.edits.iter().map(|(directory, ..)| *directory));
            }
        }
        let mut keep = keep.into_iter();
        let directories = &mut self.directories;
        self.unsynced.retain(|change| {
            let keep = keep.next().unwrap_or(true);
            if !keep {
                make_durable(directories, change);
            }
            keep
        });
    }

    /// The directories as found after a crash. Of each directory's changes a prefix survives; a rename between two survives
    /// in both or in neither. What nothing leads to any more is left out.
    pub(super) fn after_crash(&self, fate: &mut Fate) -> Self {
        let mut directories = self.directories.clone();
        let mut left: BTreeMap<Inode, usize> = BTreeMap::new();
        for change in &self.unsynced {
            for (directory, ..) in &change.edits {
                *left.entry(*directory).or_default() += 1;
            }
        }
        for count in left.values_mut() {
            fate.draw_share();
            *count = fate.prefix(*count);
        }
        for change in &self.unsynced {
            let survives = change
                .edits
                .iter()
                .all(|(directory, ..)| left.get(directory).is_some_and(|left| *left > 0));
            for (directory, ..) in &change.edits {
                if let Some(left) = left.get_mut(directory) {
                    *left = if survives { left.saturating_sub(1) } else { 0 };
                }
            }
            if survives {
                make_durable(&mut directories, change);
            }
        }
        for directory in directories.values_mut() {
            directory.view = Arc::clone(&directory.durable);
        }
        let mut names = Self {
            directories,
            unsynced: Vec::new(),
        };
        let reachable = names.reachable();
        names
            .directories
            .retain(|inode, _| reachable.contains(inode));
        names
    }

    /// Everything that a name leads to, or may lead to after a crash.
    pub(super) fn reachable(&self) -> BTreeSet<Inode> {
        let mut reached = BTreeSet::from([STORE_ROOT, HOST_ROOT]);
        let mut todo = vec![STORE_ROOT, HOST_ROOT];
        while let Some(inode) = todo.pop() {
            let Some(directory) = self.directories.get(&inode) else {
                continue;
            };
            let changed = self.unsynced.iter().flat_map(|change| &change.edits);
            let added = changed
                .filter(|(at, ..)| *at == inode)
                .filter_map(|(.., added)| added.as_ref());
            for next in directory
                .view
                .values()
                .chain(directory.durable.values())
                .chain(added)
            {
                if reached.insert(*next) {
                    todo.push(*next);
                }
            }
        }
        reached
    }

    /// Forgets directories that nothing leads to, and what was changed in them.
    pub(super) fn forget_all_but(&mut self, reachable: &BTreeSet<Inode>) {
        self.directories
            .retain(|inode, _| reachable.contains(inode));
        self.unsynced.retain(|change| {
            change
                .edits
                .iter()
                .any(|(directory, ..)| reachable.contains(directory))
        });
    }
}

/// Puts a name or takes it out.
fn edit(entries: &mut Entries, name: &Arc<str>, inode: Option<Inode>) {
    let entries = Arc::make_mut(entries);
    match inode {
        Some(inode) => entries.insert(Arc::clone(name), inode),
        None => entries.remove(name),
    };
}

/// Makes a change on the medium.
fn make_durable(directories: &mut BTreeMap<Inode, Directory>, change: &NameChange) {
    for (directory, name, inode) in &change.edits {
        if let Some(directory) = directories.get_mut(directory) {
            edit(&mut directory.durable, name, *inode);
        }
    }
}
