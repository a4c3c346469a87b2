//! The state behind a simulated media, under one lock.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::content::Content;
use super::crash::Flight;
use super::disk::Disk;
use super::faults::{Fate, FaultEffect, FaultPoint, Plan, Survival};
use super::names::{FIRST_INODE, Inode, Names};
use super::random::Random;
use crate::file::{FileIdentity, FileStat, OpenMode};

/// How an operation ended, and the path to tell an observer.
pub(super) type Ended<T> = (io::Result<T>, Arc<str>);

/// A file that somebody holds open.
#[derive(Clone, Copy, Debug)]
pub(super) struct OpenFile {
    pub(super) inode: Inode,
    pub(super) writable: bool,
}

/// Names that look random.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ids {
    seed: u64,
    given: u64,
}

impl Ids {
    /// One that was not given out before, nor will be after a crash.
    pub(super) fn fresh(&mut self) -> uuid::Uuid {
        self.given += 1;
        let mut random = Random::new(self.seed ^ self.given.rotate_left(32));
        let [high, low] = [random.number(), random.number()];
        uuid::Builder::from_random_bytes(*uuid::Uuid::from_u64_pair(high, low).as_bytes())
            .into_uuid()
    }
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct World {
    pub(super) random: Random,
    pub(super) plan: Plan,
    pub(super) names: Names,
    pub(super) disks: BTreeMap<Inode, Disk>,
    pub(super) next_inode: Inode,
    /// Where names for layers come from: the same ones in every run of a seed.
    pub(super) ids: Ids,
    pub(super) open: BTreeMap<i32, OpenFile>,
    next_token: i32,
    pub(super) flights: BTreeMap<u64, Flight>,
    pub(super) next_flight: u64,
    /// Counts changes; stands in for the time of day.
    pub(super) clock_ns: i64,
    /// Files at which unreachable ones are looked for.
    sweep_at: usize,
}

/// An error by number.
pub(super) fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

impl World {
    /// An empty store.
    pub(super) fn new(seed: u64) -> Self {
        Self {
            random: Random::new(seed),
            plan: Plan::default(),
            names: Names::new(),
            disks: BTreeMap::new(),
            next_inode: FIRST_INODE,
            ids: Ids { seed, given: 0 },
            open: BTreeMap::new(),
            next_token: 0,
            flights: BTreeMap::new(),
            next_flight: 0,
            clock_ns: 1,
            sweep_at: 64,
        }
    }

    fn tick(&mut self) -> i64 {
        self.clock_ns += 1;
        self.clock_ns
    }

    /// Opens a file: its token.
    pub(super) fn open(&mut self, path: &Path, mode: OpenMode) -> io::Result<(i32, bool)> {
        let created = mode == OpenMode::CreateNew;
        let inode = if created {
            self.create(path)?
        } else {
            self.names.find(path)?
        };
        if self.names.is_directory(inode) {
            return Err(errno(libc::EISDIR));
        }
        if !created {
            self.fail_by_plan(FaultPoint::Open, &path_text(path))?;
        }
        let token = self.next_token;
        self.next_token += 1;
        self.open.insert(
            token,
            OpenFile {
                inode,
                writable: mode != OpenMode::ReadOnly,
            },
        );
        Ok((token, created))
    }

    /// Makes an empty file.
    fn create(&mut self, path: &Path) -> io::Result<Inode> {
        let (directory, name) = self.names.find_parent(path)?;
        if self.names.get(directory, &name).is_some() {
            return Err(errno(libc::EEXIST));
        }
        let text = path_text(path);
        self.fail_by_plan(FaultPoint::Create, &text)?;
        let inode = self.fresh_inode();
        let now = self.tick();
        self.disks
            .insert(inode, Disk::new(text, Content::default(), now));
        self.names.add(directory, name, inode);
        Ok(inode)
    }

    fn fresh_inode(&mut self) -> Inode {
        let inode = self.next_inode;
        self.next_inode += 1;
        inode
    }

    /// Fails an operation that has no partial effects.
    fn fail_by_plan(&mut self, point: FaultPoint, path: &str) -> io::Result<()> {
        match self.plan.next(point, path) {
            None | Some(FaultEffect::ClaimSuccess) => Ok(()),
            Some(FaultEffect::NoSpace) => Err(errno(libc::ENOSPC)),
            Some(FaultEffect::Error | FaultEffect::LostPages) => Err(errno(libc::EIO)),
        }
    }

    /// Closes a file.
    pub(super) fn close(&mut self, token: i32) {
        self.open.remove(&token);
    }

    fn disk(&self, token: i32) -> io::Result<&Disk> {
        let open = self.open.get(&token).ok_or_else(|| errno(libc::EBADF))?;
        self.disks
            .get(&open.inode)
            .ok_or_else(|| errno(libc::EBADF))
    }

    pub(super) fn disk_mut(&mut self, token: i32) -> io::Result<&mut Disk> {
        let open = self.open.get(&token).ok_or_else(|| errno(libc::EBADF))?;
        self.disks
            .get_mut(&open.inode)
            .ok_or_else(|| errno(libc::EBADF))
    }

    pub(super) fn writable(&self, token: i32) -> io::Result<()> {
        let open = self.open.get(&token).ok_or_else(|| errno(libc::EBADF))?;
        if open.writable {
            Ok(())
        } else {
            Err(errno(libc::EBADF))
        }
    }

    /// The path of an open file; empty if there is none.
    pub(super) fn path(&self, token: i32) -> Arc<str> {
        self.disk(token)
            .map_or_else(|_| "".into(), |disk| Arc::clone(&disk.path))
    }

    /// Reads.
    pub(super) fn read(&mut self, token: i32, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let path = self.path(token);
        in_range(offset, buf.len() as u64)?;
        self.fail_by_plan(FaultPoint::Read, &path)?;
        self.disk(token)?.view().read(buf, offset);
        Ok(())
    }

    /// Writes, not durably.
    pub(super) fn write(&mut self, token: i32, buf: &[u8], offset: u64) -> Ended<()> {
        let path = self.path(token);
        (self.try_write(token, buf, offset, &path), path)
    }

    fn try_write(&mut self, token: i32, buf: &[u8], offset: u64, path: &str) -> io::Result<()> {
        self.writable(token)?;
        in_range(offset, buf.len() as u64)?;
        let effect = self.plan.next(FaultPoint::Write, path);
        let now = self.tick();
        let mut random = Random::new(self.random.number());
        let disk = self.disk_mut(token)?;
        disk.mtime_ns = now;
        match effect {
            None | Some(FaultEffect::ClaimSuccess) => {
                disk.write(offset, buf);
                Ok(())
            }
            Some(FaultEffect::NoSpace) => {
                let mut fit = random.below(buf.len().div_ceil(512) as u64);
                disk.write_some(offset, buf, || {
                    fit = fit.saturating_sub(1);
                    fit > 0
                });
                Err(errno(libc::ENOSPC))
            }
            Some(FaultEffect::Error | FaultEffect::LostPages) => {
                disk.write_some(offset, buf, || random.chance(128));
                Err(errno(libc::EIO))
            }
        }
    }

    /// Punches, not durably.
    pub(super) fn punch(&mut self, token: i32, offset: u64, len: u64) -> Ended<()> {
        let path = self.path(token);
        let result = self.writable(token).and_then(|()| {
            in_range(offset, len)?;
            self.fail_by_plan(FaultPoint::Punch, &path)?;
            let now = self.tick();
            let disk = self.disk_mut(token)?;
            disk.mtime_ns = now;
            disk.punch(offset, len);
            Ok(())
        });
        (result, path)
    }

    /// Sets a file's length, not durably.
    pub(super) fn set_len(&mut self, token: i32, len: u64) -> Ended<()> {
        let path = self.path(token);
        let result = self.writable(token).and_then(|()| {
            in_range(0, len)?;
            self.fail_by_plan(FaultPoint::SetLen, &path)?;
            let now = self.tick();
            let disk = self.disk_mut(token)?;
            disk.mtime_ns = now;
            disk.set_len(len);
            Ok(())
        });
        (result, path)
    }

    /// Length of an open file.
    pub(super) fn len(&self, token: i32) -> io::Result<u64> {
        Ok(self.disk(token)?.view().len)
    }

    /// As `File::data_ranges`.
    pub(super) fn data_ranges(
        &self,
        token: i32,
        from: u64,
        to: u64,
    ) -> io::Result<Vec<Range<u64>>> {
        Ok(self.disk(token)?.view().data_ranges(from, to))
    }

    /// What a sync that begins now covers.
    pub(super) fn sync_mark(&self, token: i32) -> u64 {
        self.disk(token).map_or(0, Disk::sync_mark)
    }

    /// Ends a sync that began at the mark.
    pub(super) fn sync(&mut self, token: i32, mark: u64) -> Ended<()> {
        let path = self.path(token);
        let effect = self.plan.next(FaultPoint::SyncData, &path);
        let seed = self.random.number();
        let result = self.disk_mut(token).and_then(|disk| match effect {
            None => {
                disk.sync(mark);
                Ok(())
            }
            Some(FaultEffect::ClaimSuccess) => Ok(()),
            Some(FaultEffect::NoSpace) => Err(errno(libc::ENOSPC)),
            Some(FaultEffect::Error) => Err(errno(libc::EIO)),
            Some(FaultEffect::LostPages) => {
                disk.lose_pages(mark, &mut Fate::new(Survival::Seeded(seed)));
                Err(errno(libc::EIO))
            }
        });
        (result, path)
    }

    /// Makes a directory.
    pub(super) fn create_dir(&mut self, path: &Path) -> io::Result<()> {
        let (directory, name) = self.names.find_parent(path)?;
        if self.names.get(directory, &name).is_some() {
            return Err(errno(libc::EEXIST));
        }
        self.fail_by_plan(FaultPoint::Create, &path_text(path))?;
        let inode = self.fresh_inode();
        self.names.add_directory(directory, name, inode);
        Ok(())
    }

    /// Renames.
    pub(super) fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let (from_directory, from_name) = self.names.find_parent(from)?;
        let (to_directory, to_name) = self.names.find_parent(to)?;
        let inode = self
            .names
            .get(from_directory, &from_name)
            .ok_or_else(|| errno(libc::ENOENT))?;
        let replaced = self.names.get(to_directory, &to_name);
        if replaced == Some(inode) {
            return Ok(());
        }
        if replaced.is_some_and(|replaced| self.names.is_directory(replaced)) {
            return Err(errno(libc::EISDIR));
        }
        let text = path_text(to);
        self.fail_by_plan(FaultPoint::Rename, &text)?;
        self.names
            .rename((from_directory, from_name), (to_directory, to_name), inode);
        if let Some(disk) = self.disks.get_mut(&inode) {
            disk.path = text;
        }
        Ok(())
    }

    /// Gives a file another name.
    pub(super) fn link(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let inode = self.names.find(from)?;
        if self.names.is_directory(inode) {
            return Err(errno(libc::EPERM));
        }
        let (directory, name) = self.names.find_parent(to)?;
        if self.names.get(directory, &name).is_some() {
            return Err(errno(libc::EEXIST));
        }
        self.fail_by_plan(FaultPoint::Create, &path_text(to))?;
        self.names.add(directory, name, inode);
        Ok(())
    }

    /// Removes a name of a file.
    pub(super) fn remove(&mut self, path: &Path) -> io::Result<()> {
        let (directory, name) = self.names.find_parent(path)?;
        let inode = self
            .names
            .get(directory, &name)
            .ok_or_else(|| errno(libc::ENOENT))?;
        if self.names.is_directory(inode) {
            return Err(errno(libc::EISDIR));
        }
        self.fail_by_plan(FaultPoint::Remove, &path_text(path))?;
        self.names.remove(directory, name);
        Ok(())
    }

    /// Removes a directory with all in it.
    pub(super) fn remove_dir_all(&mut self, path: &Path) -> io::Result<()> {
        let (directory, name) = self.names.find_parent(path)?;
        let inode = self
            .names
            .get(directory, &name)
            .ok_or_else(|| errno(libc::ENOENT))?;
        if !self.names.is_directory(inode) {
            return Err(errno(libc::ENOTDIR));
        }
        self.fail_by_plan(FaultPoint::Remove, &path_text(path))?;
        self.names.remove_all(directory, name, inode);
        Ok(())
    }

    /// Makes a directory's names durable.
    pub(super) fn sync_dir(&mut self, path: &Path) -> io::Result<()> {
        let directory = self.names.find(path)?;
        if !self.names.is_directory(directory) {
            return Err(errno(libc::ENOTDIR));
        }
        match self.plan.next(FaultPoint::SyncDir, &path_text(path)) {
            None => {}
            Some(FaultEffect::ClaimSuccess) => return Ok(()),
            Some(FaultEffect::NoSpace) => return Err(errno(libc::ENOSPC)),
            Some(FaultEffect::Error | FaultEffect::LostPages) => return Err(errno(libc::EIO)),
        }
        self.names.sync(directory);
        self.sweep();
        Ok(())
    }

    /// Forgets files that no name leads to and nobody has open, once there may be many.
    fn sweep(&mut self) {
        if self.disks.len() < self.sweep_at {
            return;
        }
        let mut reachable = self.names.reachable();
        self.names.forget_all_but(&reachable);
        reachable.extend(self.open.values().map(|open| open.inode));
        self.disks.retain(|inode, _| reachable.contains(inode));
        self.sweep_at = 2 * self.disks.len() + 64;
    }

    /// The names in a directory.
    pub(super) fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        self.names.list(self.names.find(path)?)
    }

    /// What is known of a file.
    pub(super) fn stat(&self, path: &Path) -> io::Result<FileStat> {
        let inode = self.names.find(path)?;
        let identity = FileIdentity {
            device: 0,
            inode: u64::from(inode),
        };
        Ok(match self.disks.get(&inode) {
            Some(disk) => FileStat {
                len: disk.view().len,
                mtime_ns: disk.mtime_ns,
                allocated: disk.view().allocated(),
                is_file: true,
                identity,
            },
            None => FileStat {
                len: 0,
                mtime_ns: 0,
                allocated: 0,
                is_file: false,
                identity,
            },
        })
    }

    /// Puts a durable file with a durable name, making directories on the way.
    pub(super) fn install(&mut self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut above: Vec<&Path> = path.ancestors().skip(1).collect();
        above.reverse();
        let mut changed = Vec::new();
        for directory in above {
            let inode = match self.names.find(directory) {
                Ok(inode) => inode,
                Err(_) => {
                    let (parent, name) = self.names.find_parent(directory)?;
                    let inode = self.fresh_inode();
                    self.names.add_directory(parent, name, inode);
                    inode
                }
            };
            changed.push(inode);
        }
        let (directory, name) = self.names.find_parent(path)?;
        let inode = self.fresh_inode();
        let now = self.tick();
        self.disks
            .insert(inode, Disk::new(path_text(path), Content::of(bytes), now));
        self.names.add(directory, name, inode);
        for directory in changed {
            self.names.sync(directory);
        }
        Ok(())
    }

    /// Changes bytes of a file durably and without a trace.
    pub(super) fn rot(&mut self, path: &Path, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let inode = self.names.find(path)?;
        let disk = self
            .disks
            .get_mut(&inode)
            .ok_or_else(|| errno(libc::EISDIR))?;
        disk.rot(offset, bytes);
        Ok(())
    }
}

/// A path as text, for faults and observers.
pub(super) fn path_text(path: &Path) -> Arc<str> {
    path.to_string_lossy().into()
}

/// Offsets are what a host's file offsets can be.
pub(super) fn in_range(offset: u64, len: u64) -> io::Result<()> {
    match offset.checked_add(len).map(i64::try_from) {
        Some(Ok(_)) => Ok(()),
        _ => Err(errno(libc::EINVAL)),
    }
}
