//! What is under way in engines, and the world after a crash.

use std::collections::BTreeMap;

use super::disk::Change;
use super::faults::{Fate, Survival};
use super::names::Inode;
use super::observe::Event;
use super::random::Random;
use super::world::{Ended, World, errno, in_range};

/// A change that an engine has begun and not completed.
#[derive(Debug)]
pub(super) enum Flight {
    /// Bytes for an offset of an open file.
    Write {
        token: i32,
        offset: u64,
        bytes: Vec<u8>,
    },
    /// A range of an open file.
    Punch { token: i32, offset: u64, len: u64 },
}

impl World {
    /// The world as found after a crash at this instant.
    pub(super) fn after_crash(&self, survival: Survival) -> Self {
        let mut fate = Fate::new(survival);
        let names = self.names.after_crash(&mut fate);
        let reachable = names.reachable();
        let mut disks = BTreeMap::new();
        for (inode, disk) in &self.disks {
            if reachable.contains(inode) {
                let under_way = self.under_way(*inode, survival);
                disks.insert(*inode, disk.after_crash(&under_way, &mut fate));
            }
        }
        let seed = if let Survival::Seeded(seed) = survival {
            seed
        } else {
            0
        };
        let mut world = Self::new(seed);
        world.names = names;
        world.disks = disks;
        world.next_inode = self.next_inode;
        world.ids = self.ids;
        world.clock_ns = self.clock_ns;
        world
    }

    /// The world as found after its process was killed while the host goes on: all that was written is seen and what was
    /// not synced is still not durable. Of what engines had begun any part may be done.
    pub(super) fn after_kill(&self, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut world = Self::new(random.number());
        world.names = self.names.clone();
        world.disks = self.disks.clone();
        world.next_inode = self.next_inode;
        world.ids = self.ids;
        world.clock_ns = self.clock_ns;
        let mut flights: Vec<&Flight> = self.flights.values().collect();
        for end in (1..flights.len()).rev() {
            flights.swap(end, random.index(end + 1));
        }
        for flight in flights {
            let (Flight::Write { token, .. } | Flight::Punch { token, .. }) = flight;
            let open = self.open.get(token).filter(|open| open.writable);
            let Some(disk) = open.and_then(|open| world.disks.get_mut(&open.inode)) else {
                continue;
            };
            match flight {
                Flight::Write { offset, bytes, .. } => match random.below(3) {
                    0 => {}
                    1 => disk.write_some(*offset, bytes, || random.chance(128)),
                    _ => disk.write(*offset, bytes),
                },
                Flight::Punch { offset, len, .. } => {
                    if random.chance(128) {
                        disk.punch(*offset, *len);
                    }
                }
            }
        }
        world
    }

    /// The changes of a file that engines have begun and not completed.
    fn under_way(&self, inode: Inode, survival: Survival) -> Vec<Change> {
        let mut changes = Vec::new();
        if survival == Survival::Nothing {
            return changes;
        }
        let Some(disk) = self.disks.get(&inode) else {
            return changes;
        };
        let of_this = |token: &i32| {
            self.open
                .get(token)
                .is_some_and(|open| open.inode == inode && open.writable)
        };
        for flight in self.flights.values() {
            match flight {
                Flight::Write {
                    token,
                    offset,
                    bytes,
                } if of_this(token) => {
                    changes.push(disk.write_change(*offset, bytes));
                }
                Flight::Punch { token, offset, len } if of_this(token) => {
                    changes.extend(disk.punch_changes(*offset, *len));
                }
                Flight::Write { .. } | Flight::Punch { .. } => {}
            }
        }
        if let Survival::Seeded(seed) = survival {
            // They have no order among each other.
            let mut random = Random::new(seed);
            for end in (1..changes.len()).rev() {
                changes.swap(end, random.index(end + 1));
            }
        }
        changes
    }

    /// An engine's change begins. Some of a write's sectors may be changed from now on.
    pub(super) fn begin_flight(&mut self, flight: Flight) -> u64 {
        let some = self.random.chance(64);
        let mut random = Random::new(self.random.number());
        if let (
            true,
            Flight::Write {
                token,
                offset,
                bytes,
            },
        ) = (some, &flight)
            && self.writable(*token).is_ok()
            && in_range(*offset, bytes.len() as u64).is_ok()
            && let Ok(disk) = self.disk_mut(*token)
        {
            disk.write_some(*offset, bytes, || random.chance(128));
        }
        let number = self.next_flight;
        self.next_flight += 1;
        self.flights.insert(number, flight);
        number
    }

    /// An engine's change ends.
    pub(super) fn end_flight(&mut self, number: u64) -> (Event, Ended<()>) {
        match self.flights.remove(&number) {
            Some(Flight::Write {
                token,
                offset,
                bytes,
            }) => (Event::Written, self.write(token, &bytes, offset)),
            Some(Flight::Punch { token, offset, len }) => {
                (Event::Punched, self.punch(token, offset, len))
            }
            None => (Event::Written, (Err(errno(libc::EBADF)), "".into())),
        }
    }
}
