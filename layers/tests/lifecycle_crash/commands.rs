//! The commands on the tree, each with what it makes of the world.

use std::collections::BTreeSet;
use std::sync::Arc;

use stratablk_layers::catalog::{VolumeKind, Way};
use stratablk_layers::lifecycle::{DeleteOptions, Phase, ResizeOptions, RestoreOptions};
use stratablk_layers::store::{Selection, VolumeSource};
use stratablk_layers::units::SECTOR_BYTES;

use crate::oracle::{Value, stamp};
use crate::run::{Base, Run, Shape};
use crate::trace;
use crate::tree::{Content, Disk, Snapshot, World};

/// Volumes, beyond which one is deleted rather than made.
const DISKS_MAX: usize = 8;
/// The same of a broad tree.
const BROAD: usize = 20;
/// Snapshots of the chain of a deep tree.
const DEEP: u64 = 30;
/// Snapshots of a volume, beyond which they are deleted rather than taken.
const SNAPSHOTS_MAX: usize = 7;
/// Sectors of the largest disk.
const SECTORS_MAX: u64 = 420;

/// Whether snapshots are taken of volumes of a type.
fn takes_snapshots(kind: VolumeKind) -> bool {
    kind == VolumeKind::Normal
}

/// Whether a volume of a type starts from what it held at some instant, again and again.
fn starts_anew(kind: VolumeKind) -> bool {
    matches!(kind, VolumeKind::Immutable | VolumeKind::Multiattach)
}

impl Run {
    /// What the tree grows from.
    pub fn set_up(&mut self) {
        self.create_on_base(VolumeKind::Normal);
        self.create_empty(VolumeKind::Normal);
        for disk in self.disks(|_| true) {
            self.start_guests(&disk);
        }
        match self.shape {
            Shape::Any => {}
            Shape::Deep => self.deepen(),
            Shape::Broad => self.broaden(),
        }
    }

    /// A chain of many snapshots, with some data in each.
    fn deepen(&mut self) {
        let Some(disk) = self.disks(|_| true).first().cloned() else {
            return;
        };
        for _ in 0..DEEP {
            for _ in 0..2 {
                self.guests.lock().unwrap().batch(3);
            }
            self.guests.lock().unwrap().poll_all();
            self.store().write_back_step(64);
            self.snapshot_of(&BTreeSet::from([disk.clone()]), false);
        }
    }

    /// A snapshot with many clones.
    fn broaden(&mut self) {
        let Some(disk) = self.disks(|_| true).first().cloned() else {
            return;
        };
        self.snapshot_of(&BTreeSet::from([disk.clone()]), false);
        let Some(snapshot) = self.snapshots_of(&disk).first().cloned() else {
            return;
        };
        for _ in 0..BROAD {
            self.clone_of(&disk, Some(&snapshot));
        }
    }

    /// Disks that a test may use.
    fn disks(&self, wanted: impl Fn(&Disk) -> bool) -> Vec<String> {
        let world = self.world();
        let disks = world.disks.iter().filter(|(_, disk)| wanted(disk));
        disks.map(|(name, _)| name.clone()).collect()
    }

    /// The snapshots of a disk.
    fn snapshots_of(&self, disk: &str) -> Vec<String> {
        self.world().disks[disk].snapshots.keys().cloned().collect()
    }

    /// Some snapshot.
    fn any_snapshot(&mut self) -> Option<(String, String)> {
        let with = self.disks(|disk| !disk.snapshots.is_empty());
        let disk = self.pick(&with)?;
        let snapshots = self.snapshots_of(&disk);
        Some((disk, self.pick(&snapshots)?))
    }

    /// Ends the guests of a disk; or not, and then a command that needs that must be refused, which this returns.
    fn make_idle(&mut self, disks: &BTreeSet<String>) -> bool {
        let busy = self.guests.lock().unwrap().disks();
        let busy: Vec<&String> = busy.intersection(disks).collect();
        if busy.is_empty() {
            return false;
        }
        if self.random.chance(16) {
            return true;
        }
        for disk in busy {
            self.stop_guests(disk);
        }
        false
    }

    /// Complains if a command that must be refused was not.
    fn expect<T>(&self, what: &str, done: Option<&T>, refused: bool) {
        if refused && done.is_some() {
            self.violation(format!("{what} was done that had to be refused"));
        }
    }

    /// A random command.
    pub fn tree_command(&mut self) {
        let many = self.world().disks.len();
        let crowded = many > DISKS_MAX && self.shape != Shape::Broad || many > BROAD + 3;
        match self.random.below(100) {
            0..18 => self.snapshot(),
            18..38 => self.delete_snapshot(),
            38..47 => self.restore(),
            _ if crowded => self.delete_volume(),
            47..53 => {
                if let Some((disk, snapshot)) = self.any_snapshot() {
                    self.clone_of(&disk, Some(&snapshot));
                }
            }
            53..58 => {
                let disks = self.disks(|_| true);
                if let Some(disk) = self.pick(&disks) {
                    self.clone_of(&disk, None);
                }
            }
            58..60 => {
                let kind = self.any_kind();
                self.create_empty(kind);
            }
            60..62 => {
                let kind = self.any_kind();
                self.create_on_base(kind);
            }
            62..64 => self.import(),
            64..69 => self.delete_volume(),
            69..74 => self.set_kind(),
            74..79 => self.machine_starts(),
            79..82 => self.arm(),
            82..86 => self.give(),
            86..89 => self.take_back(),
            89..96 => self.resize(),
            _ => self.flatten(),
        }
    }

    /// A snapshot of some volumes, or of all.
    fn snapshot(&mut self) {
        let disks = self.disks(|disk| takes_snapshots(disk.kind));
        let all = self.random.chance(40);
        let mut members: BTreeSet<String> = disks
            .iter()
            .filter(|_| all || self.random.chance(90))
            .cloned()
            .collect();
        if members.is_empty() {
            members.extend(self.pick(&disks));
        }
        let full = |disk: &String| self.snapshots_of(disk).len() > SNAPSHOTS_MAX;
        if members.iter().any(full) && self.random.chance(224) {
            self.delete_snapshot();
        } else if !members.is_empty() {
            self.snapshot_of(&members, all);
        }
    }

    /// A snapshot of these volumes.
    fn snapshot_of(&mut self, members: &BTreeSet<String>, all: bool) {
        let number = self.fresh();
        let name = format!("s{number}");
        let mut next = self.world();
        for member in members {
            let disk = next.disk_mut(member).unwrap();
            let content = disk.content(member);
            if starts_anew(disk.kind) {
                disk.floor = Some(content.clone());
            }
            let group = number;
            disk.snapshots
                .insert(name.clone(), Snapshot { group, content });
        }
        let selection = if all {
            Selection::All
        } else {
            Selection::Volumes(members.iter().cloned().collect())
        };
        let what = format!("{name} of {selection:?}");
        self.groups.insert(number, members.len());
        self.command("snapshot create", &what, next, |store| {
            store.snapshot(&name, &selection)
        });
    }

    /// A snapshot's name goes; what becomes of its data is said in many ways.
    fn delete_snapshot(&mut self) {
        let Some((disk, snapshot)) = self.any_snapshot() else {
            return;
        };
        let ways = [Way::Up, Way::Down, Way::InPlace, Way::Copy];
        let into_base = self.random.chance(24);
        let options = DeleteOptions {
            push_down: self.random.chance(64),
            into_base,
            way: (!into_base && self.random.chance(96)).then(|| ways[self.random.index(4)]),
            rate: None,
        };
        let what = format!("{disk}@{snapshot} {options:?}");
        if self.random.chance(64) {
            let world = self.world();
            self.command("snapshot delete --dry-run", &what, world, |store| {
                store.plan_delete_snapshot(&disk, &snapshot, options)
            });
        }
        let mut next = self.world();
        next.disk_mut(&disk).unwrap().snapshots.remove(&snapshot);
        let family = next.disks[&disk].family;
        let done = self.command("snapshot delete", &what, next, |store| {
            store.delete_snapshot(&disk, &snapshot, options)
        });
        if done.is_some()
            && into_base
            && let Some(base) = self.bases.iter_mut().find(|base| base.family == family)
        {
            base.spoiled = true;
        }
    }

    /// A volume, or all of a group, goes on from a snapshot.
    fn restore(&mut self) {
        let Some((disk, snapshot)) = self.any_snapshot() else {
            return;
        };
        let keep = self.random.chance(96).then(|| format!("k{}", self.fresh()));
        let only = self.random.chance(64);
        let world = self.world();
        let group = world.disks[&disk].snapshots[&snapshot].group;
        let mut next = world.clone();
        let mut members = BTreeSet::new();
        let kept = self.fresh();
        for (name, has) in &world.disks {
            let of_group = has.snapshots.values().find(|has| has.group == group);
            let Some(content) = of_group.map(|has| has.content.clone()) else {
                continue;
            };
            if only && *name != disk {
                continue;
            }
            members.insert(name.clone());
            let changed = next.disk_mut(name).unwrap();
            if let Some(keep) = &keep {
                let content = has.content(name);
                let group = kept;
                changed
                    .snapshots
                    .insert(keep.clone(), Snapshot { group, content });
            }
            changed.restore(content);
        }
        self.groups.insert(kept, members.len());
        let options = RestoreOptions { keep, only };
        let whole = self.groups.get(&group).copied().unwrap_or(0);
        let in_part = !options.only && members.len() < whole;
        let refused = self.make_idle(&members) || in_part;
        // What was under way has ended since.
        let next = self.refresh(next);
        let what = format!("{disk}@{snapshot} {options:?}, all: {members:?}");
        let done = self.command("snapshot restore", &what, next, |store| {
            store.restore(&disk, &snapshot, &options)
        });
        self.expect("a restore", done.as_ref(), refused);
        if let Some(report) = done {
            let restored: BTreeSet<String> = report.volumes.into_iter().collect();
            if restored != members {
                self.violation(format!("{restored:?} were restored instead of {members:?}"));
            }
        }
        self.start_some(&members);
    }

    /// A world that was made before guests were ended, with what they did last.
    fn refresh(&self, mut next: World) -> World {
        let world = self.world();
        for (name, disk) in &world.disks {
            if let Some(changed) = next.disk_mut(name) {
                changed.catch_up(name, disk);
            }
        }
        next
    }

    /// Lets guests work again on some of these.
    fn start_some(&mut self, disks: &BTreeSet<String>) {
        if self.has_failed() {
            return;
        }
        let (busy, world) = (self.guests.lock().unwrap().disks(), self.world());
        for disk in disks {
            if world.disks.contains_key(disk) && !busy.contains(disk) && self.random.chance(160) {
                self.start_guests(disk);
            }
        }
    }

    /// A clone of a snapshot, or of what a volume holds now.
    fn clone_of(&mut self, disk: &str, snapshot: Option<&str>) {
        let name = format!("v{}", self.fresh());
        let mut next = self.world();
        let from = next.disks[disk].clone();
        let (source, content) = match snapshot {
            Some(snapshot) => (
                VolumeSource::Snapshot {
                    volume: disk.to_owned(),
                    snapshot: snapshot.to_owned(),
                },
                from.snapshots[snapshot].content.clone(),
            ),
            None => (
                VolumeSource::Volume(disk.to_owned()),
                if from.kind == VolumeKind::Multiattach {
                    from.floor.clone().unwrap()
                } else {
                    from.content(disk)
                },
            ),
        };
        let sectors = content.sectors().unwrap_or(from.sectors);
        let kind = self.any_kind();
        next.disks.insert(
            name.clone(),
            Arc::new(Disk::new(from.family, sectors, content).of_kind(kind)),
        );
        let command = match snapshot {
            Some(_) => "clone of a snapshot",
            None => "clone of a volume",
        };
        let what = format!("{name} of {source:?} as {kind:?}");
        self.command(command, &what, next, |store| {
            store.create_volume_of(&name, &source, kind)
        });
        self.start_some(&BTreeSet::from([name]));
    }

    /// Some type, mostly the usual one.
    fn any_kind(&mut self) -> VolumeKind {
        match self.random.below(16) {
            0 => VolumeKind::Immutable,
            1 => VolumeKind::Writethrough,
            2 => VolumeKind::Multiattach,
            3 => VolumeKind::Readonly,
            _ => VolumeKind::Normal,
        }
    }

    /// An empty disk.
    fn create_empty(&mut self, kind: VolumeKind) {
        let number = self.fresh();
        let name = format!("v{number}");
        let sectors = 20 + self.random.below(200);
        let content = Content::pinned(vec![Value::Zero; sectors as usize]);
        let disk = Disk::new(number, sectors, content).of_kind(kind);
        let mut next = self.world();
        next.disks.insert(name.clone(), Arc::new(disk));
        let source = VolumeSource::Size(sectors * SECTOR_BYTES);
        let what = format!("{name} of {sectors} sectors as {kind:?}");
        self.command("volume create", &what, next, |store| {
            store.create_volume_of(&name, &source, kind)
        });
    }

    /// A disk over a raw image.
    fn create_on_base(&mut self, kind: VolumeKind) {
        let good: Vec<usize> = (0..self.bases.len())
            .filter(|index| !self.bases[*index].spoiled)
            .collect();
        let Some(index) = self.pick(&good) else {
            return;
        };
        let Base {
            path,
            family,
            values,
            ..
        } = &self.bases[index];
        let (path, family, values) = (path.clone(), *family, values.clone());
        let name = format!("v{}", self.fresh());
        let disk = Disk::new(family, values.len() as u64, Content::pinned(values)).of_kind(kind);
        let mut next = self.world();
        next.disks.insert(name.clone(), Arc::new(disk));
        let what = format!("{name} over {} as {kind:?}", path.display());
        self.command("volume create --base", &what, next, |store| {
            store.create_volume_of(&name, &VolumeSource::Base(path), kind)
        });
        self.start_some(&BTreeSet::from([name]));
    }

    /// A disk with the content of a raw image, which a job copies.
    fn import(&mut self) {
        let number = self.fresh();
        let (name, path) = (format!("v{number}"), Self::image_path(number));
        let sectors = 20 + self.random.below(200);
        let mut values = Vec::new();
        let mut bytes = Vec::new();
        for sector in 0..sectors {
            // Some of it is empty.
            if self.random.chance(64) {
                values.push(Value::Zero);
                bytes.extend([0; SECTOR_BYTES as usize]);
            } else {
                values.push(Value::Stamp(1));
                bytes.extend(stamp(number, sector, 1));
            }
        }
        self.media.install(&path, &bytes).unwrap();
        let mut next = self.world();
        let disk = Disk::new(number, sectors, Content::pinned(values));
        next.disks.insert(name.clone(), Arc::new(disk));
        let what = format!("{name} of {sectors} sectors");
        self.command("import", &what, next, |store| store.import(&name, &path));
        self.start_some(&BTreeSet::from([name]));
    }

    /// A volume goes, with its snapshots.
    fn delete_volume(&mut self) {
        let disks = self.disks(|_| true);
        let Some(name) = self.pick(&disks).filter(|_| disks.len() > 2) else {
            return;
        };
        let mut next = self.world();
        next.disks.remove(&name);
        let members = BTreeSet::from([name.clone()]);
        let refused = self.make_idle(&members);
        let next = self.refresh(next);
        let done = self.command("volume delete", &name, next, |store| {
            store.delete_volume(&name)
        });
        self.expect("a deletion", done.as_ref(), refused);
    }

    /// Another type for a volume.
    fn set_kind(&mut self) {
        let disks = self.disks(|disk| disk.attached_from.is_none());
        let Some(name) = self.pick(&disks) else {
            return;
        };
        let kinds = [
            VolumeKind::Normal,
            VolumeKind::Immutable,
            VolumeKind::Immutable,
            VolumeKind::Writethrough,
            VolumeKind::Multiattach,
            VolumeKind::Readonly,
        ];
        let mut kind = kinds[self.random.index(kinds.len())];
        if self.world().disks[&name].kind != VolumeKind::Normal && self.random.chance(128) {
            kind = VolumeKind::Normal;
        }
        let members = BTreeSet::from([name.clone()]);
        let refused = self.make_idle(&members) && self.world().disks[&name].kind != kind;
        let mut next = self.world();
        let disk = next.disk_mut(&name).unwrap();
        if disk.kind != kind {
            let content = disk.content(&name);
            disk.turn_into(kind, content);
        }
        let what = format!("{name} {kind:?}");
        let done = self.command("volume set --type", &what, next, |store| {
            store.set_kind(&name, kind)
        });
        self.expect("a change of type", done.as_ref(), refused);
        self.start_some(&members);
    }

    /// A machine starts on a volume.
    fn machine_starts(&mut self) {
        let mut disks = self.disks(|disk| disk.kind == VolumeKind::Immutable);
        if disks.is_empty() || self.random.chance(16) {
            disks = self.disks(|_| true);
        }
        let Some(name) = self.pick(&disks) else {
            return;
        };
        let members = BTreeSet::from([name.clone()]);
        self.make_idle(&members);
        let mut next = self.world();
        let disk = next.disk_mut(&name).unwrap();
        disk.machine_starts();
        self.command("machine start", &name, next, |store| {
            store.machine_starts(&name)
        });
        self.start_some(&members);
    }

    /// The next start of a machine resets a volume, or does not.
    fn arm(&mut self) {
        let disks = self.disks(|disk| disk.kind == VolumeKind::Immutable);
        let Some(name) = self.pick(&disks) else {
            return;
        };
        let armed = self.random.chance(200);
        let mut next = self.world();
        next.disk_mut(&name).unwrap().armed = armed;
        let what = format!("{name} {armed}");
        self.command("arm", &what, next, |store| store.arm(&name, armed));
    }

    /// An attachment of a multiattach volume.
    fn give(&mut self) {
        let disks = self.disks(|disk| disk.kind == VolumeKind::Multiattach);
        let Some(from) = self.pick(&disks) else {
            return;
        };
        let mut next = self.world();
        let source = next.disks[&from].clone();
        let asked = self
            .random
            .chance(128)
            .then(|| format!("a{}", self.fresh()));
        let name = asked.clone().unwrap_or_else(|| {
            let mut names = (1..).map(|number| format!("{from}-{number}"));
            names.find(|name| !next.disks.contains_key(name)).unwrap()
        });
        let content = source.floor.as_ref().unwrap().resized(source.sectors);
        let mut disk = Disk::new(source.family, source.sectors, content);
        disk.attached_from = Some(from.clone());
        next.disks.insert(name.clone(), Arc::new(disk));
        let what = format!("{from}, as {asked:?}");
        let given = self.command("give an attachment", &what, next, |store| {
            store.give_attachment(&from, asked.as_deref())
        });
        if let Some(given) = given
            && (given.volume.name != name || !given.new)
        {
            self.violation(format!("{given:?} was given instead of {name}"));
        }
        self.start_some(&BTreeSet::from([name]));
    }

    /// An attachment ends.
    fn take_back(&mut self) {
        let disks = self.disks(|disk| disk.attached_from.is_some());
        let Some(name) = self.pick(&disks) else {
            return;
        };
        let keep = self.random.chance(128).then(|| {
            if self.random.chance(64) {
                name.clone()
            } else {
                format!("v{}", self.fresh())
            }
        });
        let members = BTreeSet::from([name.clone()]);
        // Snapshots do not go with it.
        let named = keep.is_none() && !self.snapshots_of(&name).is_empty();
        let refused = self.make_idle(&members) || named;
        let mut next = self.world();
        let disk = next.disks.remove(&name).unwrap();
        if let Some(keep) = &keep {
            let mut kept = Disk::clone(&disk);
            kept.attached_from = None;
            next.disks.insert(keep.clone(), Arc::new(kept));
        }
        let what = format!("{name}, kept as {keep:?}");
        let done = self.command("take an attachment", &what, next, |store| {
            store.take_attachment(&name, keep.as_deref())
        });
        self.expect("the end of an attachment", done.as_ref(), refused);
    }

    /// Another size: more while guests work, less when they do not.
    fn resize(&mut self) {
        let disks = self.disks(|_| true);
        let Some(name) = self.pick(&disks) else {
            return;
        };
        let old = self.world().disks[&name].sectors;
        let sectors = if self.random.chance(160) || old < 3 {
            (old + 1 + self.random.below(60)).min(SECTORS_MAX.max(old))
        } else {
            1 + self.random.below(old - 1)
        };
        let members = BTreeSet::from([name.clone()]);
        let refused = sectors < old && self.make_idle(&members);
        let mut next = self.world();
        next.disk_mut(&name).unwrap().resize(sectors);
        let options = ResizeOptions {
            shrink: sectors < old,
            force: self.random.chance(200),
        };
        let what = format!("{name} from {old} to {sectors} sectors, {options:?}");
        let done = self.command("volume resize", &what, next, |store| {
            store.resize(&name, sectors * SECTOR_BYTES, options)
        });
        self.expect("a shrinking", done.as_ref(), refused);
        self.start_some(&members);
    }

    /// A volume is made independent of what lies below it.
    fn flatten(&mut self) {
        let disks = self.disks(|_| true);
        if let Some(name) = self.pick(&disks) {
            let world = self.world();
            self.command("flatten", &name, world, |store| store.flatten(&name));
        }
    }

    /// Somebody interferes with a job.
    pub fn control_job(&mut self) {
        let jobs = self.store().jobs();
        for job in &jobs {
            if job.phase == Phase::Failed {
                self.violation(format!("a job failed on a good disk: {job:?}"));
                return;
            }
        }
        let under_way: Vec<_> = jobs
            .into_iter()
            .filter(|job| job.phase != Phase::Done)
            .collect();
        let Some(job) = self.pick(&under_way) else {
            return;
        };
        let world = self.world();
        let what = format!("{:?}", job.id);
        trace(|| format!("{job:?}"));
        let id = job.id;
        match self.random.below(7) {
            0 | 1 => {
                self.command("job pause", &what, world, |store| store.pause_job(id));
            }
            2..5 => {
                self.command("job resume", &what, world, |store| store.resume_job(id));
            }
            5 => {
                self.command("job cancel", &what, world, |store| store.cancel_job(id));
            }
            _ => {
                let rate = self.random.chance(128).then_some(1 << 30);
                self.command("job limit", &what, world, |store| store.limit_job(id, rate));
            }
        }
    }
}
