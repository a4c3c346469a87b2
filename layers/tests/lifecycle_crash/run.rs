//! A random life of a store: guests, commands on the tree, jobs and crashes, from a seed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};

use stratablk_layers::canary::Canary;
use stratablk_layers::catalog::CatalogState;
use stratablk_layers::catalog::memory::{CommitPoint, MemoryCatalog, MemoryDisk};
use stratablk_layers::error::Error;
use stratablk_layers::file::Media;
use stratablk_layers::file::sim::{Event, Random, SimMedia, Survival};
use stratablk_layers::store::{Store, StoreOptions};
use stratablk_layers::units::StoreId;

use crate::disk::Queue;
use crate::found::{self, Image, Looks, small_cache};
use crate::guests::Guests;
use crate::oracle::{Promise, Value, stamp};
use crate::tidy;
use crate::trace;
use crate::tree::{Name, Oracle, World};
use crate::watch::{Activity, Images, Shared, Watch};

/// Turns after which a run that does not end is one that hangs.
const HANGS: u64 = 20_000;
/// Raw images of the user's.
const BASES: u64 = 3;

/// The form of the tree, beside what chance makes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Whatever comes.
    Any,
    /// A chain of 30 snapshots to begin with.
    Deep,
    /// A snapshot with 20 clones to begin with.
    Broad,
}

/// How a run goes.
pub struct Plan {
    /// What is broken on purpose.
    pub canary: Option<Canary>,
    /// How the store is set up.
    pub options: StoreOptions,
    /// Whether requests overlap.
    pub overlap: bool,
    /// The form of the tree.
    pub shape: Shape,
    /// Steps.
    pub steps: u64,
    /// One in so many crash points is looked at.
    pub rarity: u64,
}

impl Plan {
    /// With a cache that fits nothing, or little, or all, by the seed.
    pub fn of(seed: u64) -> Self {
        let options = match seed % 5 {
            0 => small_cache(1, None),
            1 => small_cache(2, Some(5)),
            2 => small_cache(4, Some(16)),
            3 => small_cache(24, None),
            _ => small_cache(64, Some(64)),
        };
        let shape = match seed % 9 {
            2 => Shape::Deep,
            6 => Shape::Broad,
            _ => Shape::Any,
        };
        Self {
            canary: None,
            options,
            overlap: (seed / 5).is_multiple_of(2),
            shape,
            steps: 600,
            rarity: 64,
        }
    }
}

/// What a run found and did.
#[derive(Default)]
pub struct Outcome {
    /// Images examined.
    pub images: Images,
    /// What was wrong.
    pub violations: Vec<String>,
    /// Requests of guests that ended.
    pub requests: u64,
    /// Steps of jobs.
    pub job_steps: u64,
    /// Crashes that the run went on from, and those of them that were in the midst of something.
    pub crashes: (u64, u64),
    /// Commands by what they were: done, and refused.
    pub commands: BTreeMap<&'static str, (u64, u64)>,
}

impl Outcome {
    /// Adds another one's figures.
    pub fn add(&mut self, other: Self) {
        self.images.add(&other.images);
        self.violations.extend(other.violations);
        self.requests += other.requests;
        self.job_steps += other.job_steps;
        self.crashes.0 += other.crashes.0;
        self.crashes.1 += other.crashes.1;
        for (what, (done, refused)) in other.commands {
            let counts = self.commands.entry(what).or_default();
            counts.0 += done;
            counts.1 += refused;
        }
    }
}

/// A raw image of the user's.
pub struct Base {
    /// Where it is.
    pub path: PathBuf,
    /// Its stamps.
    pub family: u64,
    /// What it holds.
    pub values: Vec<Value>,
    /// Whether the user has let it be changed.
    pub spoiled: bool,
}

/// A run.
pub struct Run {
    pub random: Random,
    pub media: SimMedia,
    durable: MemoryDisk,
    store: Option<Arc<Store>>,
    pub shared: Shared,
    pub guests: Arc<Mutex<Guests>>,
    pub bases: Vec<Base>,
    /// Names and families that were given out.
    named: u64,
    /// How many snapshots each group has had from the start.
    pub groups: BTreeMap<u64, usize>,
    pub shape: Shape,
    steps: u64,
    pub outcome: Outcome,
}

impl Run {
    /// A run from a seed.
    pub fn new(seed: u64, plan: Plan) -> Self {
        #[cfg(feature = "canary")]
        stratablk_layers::canary::set(plan.canary);
        let _ = plan.canary;
        let mut random = Random::new(seed ^ 0x5eed);
        let media = SimMedia::new(seed);
        let mut bases = Vec::new();
        for family in 0..BASES {
            let sectors = 40 + random.below(260);
            let bytes: Vec<u8> = (0..sectors)
                .flat_map(|sector| stamp(family, sector, 1))
                .collect();
            let path = PathBuf::from(format!("/images/base{family}.raw"));
            media.install(&path, &bytes).unwrap();
            bases.push(Base {
                path,
                family,
                values: vec![Value::Stamp(1); sectors as usize],
                spoiled: false,
            });
        }
        let id = StoreId(uuid::Uuid::from_u64_pair(1, seed));
        let durable = MemoryDisk::new(CatalogState::empty(id));
        let shared = Arc::new(Mutex::new(Watch {
            seed,
            oracle: Oracle::default(),
            violations: Vec::new(),
            images: Images::default(),
            random: Random::new(seed ^ 0x1ace),
            activity: Activity::default(),
            options: plan.options,
            durable: durable.clone(),
            store: Weak::new(),
            wanted: false,
            successor: None,
            rarity: plan.rarity,
        }));
        let guests = Guests::new(seed, Arc::clone(&shared), plan.overlap);
        let mut run = Self {
            random,
            media: media.clone(),
            durable: durable.clone(),
            store: None,
            shared,
            guests: Arc::new(Mutex::new(guests)),
            bases,
            named: 0,
            groups: BTreeMap::new(),
            shape: plan.shape,
            steps: plan.steps,
            outcome: Outcome::default(),
        };
        let catalog = Box::new(MemoryCatalog::open(&durable).unwrap());
        let options = run.shared.lock().unwrap().options.clone();
        let store = Store::simulated(Arc::new(media), catalog, options).unwrap();
        run.take(Arc::new(store));
        run
    }

    /// Goes on with this store.
    fn take(&mut self, store: Arc<Store>) {
        {
            let mut watch = self.shared.lock().unwrap();
            watch.store = Arc::downgrade(&store);
            watch.durable = self.durable.clone();
        }
        let seed = self.random.number();
        observe(
            &self.media,
            seed,
            &self.shared,
            Arc::downgrade(&self.guests),
        );
        let marker = self.media.clone();
        self.durable.set_observer(move |point| match point {
            CommitPoint::Before => marker.mark("before a commit of the catalog"),
            CommitPoint::After => marker.mark("after a commit of the catalog"),
        });
        store.set_job_step_bytes(self.step_bytes());
        self.store = Some(store);
    }

    /// What a job moves before it is committed: disks are small here.
    fn step_bytes(&mut self) -> u64 {
        const STEPS: [u64; 4] = [4096, 3 * 4096, 10 * 4096, 1 << 20];
        STEPS[self.random.index(STEPS.len())]
    }

    /// The store.
    pub fn store(&self) -> Arc<Store> {
        Arc::clone(self.store.as_ref().unwrap())
    }

    /// Whether something was wrong.
    pub fn has_failed(&self) -> bool {
        !self.shared.lock().unwrap().violations.is_empty()
    }

    /// Notes that something was wrong.
    pub fn violation(&self, what: String) {
        self.shared.lock().unwrap().violation(what);
    }

    /// A number that was not given out yet, for a name or a family.
    pub fn fresh(&mut self) -> u64 {
        self.named += 1;
        self.named + BASES
    }

    /// What is there.
    pub fn world(&self) -> World {
        self.shared.lock().unwrap().oracle.world.clone()
    }

    /// Gives a command that leads to `next` if it succeeds.
    pub fn command<T>(
        &mut self,
        kind: &'static str,
        what: &str,
        next: World,
        act: impl FnOnce(&Store) -> Result<T, Error>,
    ) -> Option<T> {
        if self.has_failed() {
            return None;
        }
        let store = self.store();
        trace(|| format!("{kind} {what}"));
        let before = {
            let mut watch = self.shared.lock().unwrap();
            watch.oracle.begin(next);
            let activity = Activity::Command(format!("{kind} {what}"));
            std::mem::replace(&mut watch.activity, activity)
        };
        let busy = self.guests.lock().unwrap().disks();
        let result = act(&store);
        trace(|| format!("{kind} {what}: {:?}", result.as_ref().err()));
        let counts = self.outcome.commands.entry(kind).or_default();
        match result {
            Ok(done) => {
                counts.0 += 1;
                self.settle();
                self.shared.lock().unwrap().activity = before;
                Some(done)
            }
            Err(error) => {
                counts.1 += 1;
                let mut watch = self.shared.lock().unwrap();
                watch.oracle.refused();
                // Nobody but a guest may keep a volume from a command.
                let told = error.to_string();
                let in_use = told.contains("in use by a machine");
                let by_guest = busy.iter().any(|disk| told.contains(&format!("{disk:?}")));
                let refusal = is_refusal(&error) && (by_guest || !in_use);
                if !refusal {
                    watch.violation(format!("{error} ({error:?})"));
                }
                watch.activity = before;
                None
            }
        }
    }

    /// A command has succeeded: finds out what still holds several values by what is known, as a power cut would leave it.
    fn settle(&mut self) {
        let names = self.shared.lock().unwrap().oracle.done();
        if !names.is_empty()
            && let Err(problem) = self.pin(&names)
        {
            self.violation(problem);
        }
        self.shared.lock().unwrap().oracle.settle();
    }

    /// Looks what these names hold.
    fn pin(&self, names: &[Name]) -> Result<(), String> {
        let image = Image {
            media: self.media.crash_image_with(Survival::Nothing),
            catalog: self.durable.crash_image(),
            arena: None,
            options: small_cache(24, None),
            promise: Promise::Flushed,
        };
        let store = found::open(image, |_, _| {})?;
        let mut looks = Looks::default();
        for name in names {
            let family = {
                let watch = self.shared.lock().unwrap();
                let next = watch.oracle.next.as_ref();
                next.and_then(|next| next.family(name)).unwrap()
            };
            let found = found::read(&store, name, family, None, &mut looks)?;
            if let Some(wrong) = self.shared.lock().unwrap().oracle.pin(name, found) {
                return Err(format!(
                    "acknowledged, and after a power cut at once: {wrong}"
                ));
            }
        }
        Ok(())
    }

    /// Lets some guests of a disk work.
    pub fn start_guests(&mut self, disk: &str) {
        use stratablk_layers::catalog::VolumeKind;
        let kind = self.world().disks[disk].kind;
        let read_only = matches!(kind, VolumeKind::Readonly | VolumeKind::Multiattach);
        let volume = match self.store().open_volume(disk) {
            Ok(volume) => volume,
            Err(error) => {
                self.violation(format!("{disk} does not open: {error}"));
                return;
            }
        };
        for _ in 0..1 + self.random.below(3) {
            let queue = Queue::new(volume.context(read_only).unwrap());
            self.guests.lock().unwrap().add(disk, read_only, queue);
        }
    }

    /// Ends the guests of a disk in order.
    pub fn stop_guests(&mut self, disk: &str) {
        let mut turns = 0;
        while self.guests.lock().unwrap().under_way_of(disk) > 0 {
            self.guests.lock().unwrap().poll_all();
            self.store().write_back_step(8);
            turns += 1;
            if turns == HANGS {
                self.violation(format!("requests of {disk} hang"));
                // What they use must outlive them.
                panic!("{:?}", self.shared.lock().unwrap().violations);
            }
        }
        self.guests.lock().unwrap().stop(disk);
    }

    /// Ends all guests in order.
    fn stop_all(&mut self) {
        let disks = self.guests.lock().unwrap().disks();
        for disk in disks {
            self.stop_guests(&disk);
        }
    }

    /// Runs it to its end.
    pub fn run(mut self) -> Outcome {
        self.set_up();
        let mut crash_at = self.next_crash();
        for step in 0..self.steps {
            if self.has_failed() {
                break;
            }
            if step == crash_at {
                self.shared.lock().unwrap().wanted = true;
            }
            self.step();
            self.media.mark("a step");
            // Some time is given for an instant in the midst of something.
            if step >= crash_at + 20 || self.shared.lock().unwrap().successor.is_some() {
                self.crash();
                crash_at = step + self.next_crash();
            }
        }
        if !self.has_failed()
            && let Err(problem) = self.end()
        {
            self.violation(format!("at the end: {problem}"));
        }
        self.media.clear_observer();
        self.guests.lock().unwrap().abandon();
        self.store = None;
        let mut watch = self.shared.lock().unwrap();
        self.outcome.images = watch.images;
        self.outcome.violations = std::mem::take(&mut watch.violations);
        self.outcome.requests = self.guests.lock().unwrap().ended;
        self.outcome
    }

    /// Steps to the next crash that the run goes on from.
    fn next_crash(&mut self) -> u64 {
        60 + self.random.below(200)
    }

    /// One step: a batch of requests, a look at what has ended, a step of a job, or a command.
    fn step(&mut self) {
        match self.random.below(100) {
            0..36 => self.guests.lock().unwrap().batch(4),
            36..52 => self.guests.lock().unwrap().poll_all(),
            52..59 => {
                const CLUSTERS: [usize; 5] = [1, 2, 3, 7, 64];
                let clusters = CLUSTERS[self.random.index(CLUSTERS.len())];
                trace(|| format!("write back {clusters} clusters"));
                self.store().write_back_step(clusters);
            }
            59..75 => self.job_steps(),
            75..80 => self.change_guests(),
            80..82 => self.checkpoint(),
            82..85 => self.control_job(),
            _ => self.tree_command(),
        }
    }

    /// Some steps of jobs, with requests between and in them.
    fn job_steps(&mut self) {
        let store = self.store();
        self.shared.lock().unwrap().activity = Activity::Job;
        for _ in 0..1 + self.random.below(12) {
            trace(|| "a step of a job".into());
            if !store.job_step() || self.has_failed() {
                break;
            }
            self.outcome.job_steps += 1;
            if self.random.chance(64) {
                self.guests.lock().unwrap().interrupt();
            }
        }
        self.shared.lock().unwrap().activity = Activity::Guests;
    }

    /// Starts or ends the guests of a disk.
    fn change_guests(&mut self) {
        let busy = self.guests.lock().unwrap().disks();
        let all: Vec<String> = self.world().disks.keys().cloned().collect();
        let Some(disk) = self.pick(&all) else {
            return;
        };
        if busy.contains(&disk) {
            if self.random.chance(64) {
                self.stop_guests(&disk);
            }
        } else if busy.len() < 4 {
            self.start_guests(&disk);
        }
    }

    /// One of these.
    pub fn pick<T: Clone>(&mut self, from: &[T]) -> Option<T> {
        let index = self.random.index(from.len());
        from.get(index).cloned()
    }

    /// A checkpoint of a disk.
    fn checkpoint(&mut self) {
        let all: Vec<String> = self.world().disks.keys().cloned().collect();
        if let Some(disk) = self.pick(&all) {
            let world = self.world();
            self.command("checkpoint", &disk, world, |store| {
                store.checkpoint_volume(&disk)
            });
        }
    }

    /// The daemon or the host dies, perhaps in the midst of something; the run goes on with what is left.
    fn crash(&mut self) {
        let (image, oracle) = {
            let mut watch = self.shared.lock().unwrap();
            watch.wanted = false;
            match watch.successor.take() {
                Some(successor) => {
                    self.outcome.crashes.1 += 1;
                    successor
                }
                None => {
                    let choice = watch.random.number();
                    let (image, what) = watch.crash(&self.media, choice).unwrap();
                    trace(|| format!("the run goes on from here: {what}"));
                    (image, watch.oracle.clone())
                }
            }
        };
        if self.has_failed() {
            return;
        }
        self.outcome.crashes.0 += 1;
        // What is left behind ends in order, unseen: it is on this thread as well.
        self.media.clear_observer();
        self.stop_all();
        self.store = None;
        if let Err(problem) = self.go_on(image, oracle) {
            self.violation(format!("when the run went on after a crash: {problem}"));
        }
    }

    /// Goes on with what is left, after a look at all of it.
    fn go_on(&mut self, image: Image, oracle: Oracle) -> Result<(), String> {
        let promise = image.promise;
        self.media = image.media.clone();
        self.durable = image.catalog.clone();
        let store = found::open(image, |_, _| {})?;
        tidy::after_start(&self.media, &self.durable.state())?;
        let mut looks = Looks::default();
        let random = &mut self.random;
        let seen = found::look(&store, &oracle, promise, usize::MAX, random, &mut looks)?;
        looks.remove(&store)?;
        // What was read is there for good from now on.
        store
            .flush_all()
            .map_err(|error| format!("it cannot be flushed: {error}"))?;
        {
            let mut watch = self.shared.lock().unwrap();
            watch.oracle = oracle;
            watch.activity = Activity::Guests;
            if !seen.is_next {
                watch.oracle.refused();
            }
            // Some contents are known for the first time.
            for (name, values) in &seen.values {
                let is_open = |next: &World| next.is_open(name);
                if watch.oracle.next.as_ref().is_some_and(is_open) {
                    watch.oracle.learn(name, values.clone());
                }
            }
            watch.oracle.settle();
            for ((disk, point), values) in &seen.values {
                if point.is_none() {
                    watch.oracle.reset(disk, values);
                }
            }
        }
        self.take(store);
        for _ in 0..2 {
            self.change_guests();
        }
        Ok(())
    }

    /// Lets everything end, and then removes everything: nothing may be left.
    fn end(&mut self) -> Result<(), String> {
        self.stop_all();
        let store = self.store();
        let (oracle, world) = {
            let watch = self.shared.lock().unwrap();
            (watch.oracle.clone(), watch.oracle.world.clone())
        };
        let mut looks = Looks::default();
        let promise = Promise::Acknowledged;
        let most = usize::MAX;
        let seen = found::look(&store, &oracle, promise, most, &mut self.random, &mut looks)?;
        looks.remove(&store)?;
        self.shared.lock().unwrap().activity = Activity::Job;
        let steps = found::finish_jobs(&store, &world, &seen.values, &mut self.random)?;
        self.outcome.job_steps += steps;
        self.shared.lock().unwrap().activity = Activity::Guests;
        tidy::after_jobs(&self.media, &self.durable.state())?;
        let again = found::look(&store, &oracle, promise, most, &mut self.random, &mut looks)?;
        if let Some((name, _)) = again
            .values
            .iter()
            .find(|(name, values)| seen.values.get(*name) != Some(*values))
        {
            return Err(format!("{name:?} reads differently after the jobs"));
        }
        looks.remove(&store)?;
        self.remove_all()?;
        found::finish_jobs(&store, &world, &BTreeMap::new(), &mut self.random)?;
        tidy::after_jobs(&self.media, &self.durable.state())?;
        let state = self.durable.state();
        if !state.layers.is_empty() || !state.jobs.is_empty() {
            return Err(format!(
                "of an empty store {} layers and {} jobs are left",
                state.layers.len(),
                state.jobs.len()
            ));
        }
        self.check_bases()
    }

    /// The user's files are what they were, but for those that were to be changed.
    fn check_bases(&self) -> Result<(), String> {
        use stratablk_layers::file::OpenMode;
        for base in self.bases.iter().filter(|base| !base.spoiled) {
            let mut bytes = vec![0; base.values.len() * 512];
            let file = self.media.open(&base.path, OpenMode::ReadOnly, false);
            let read = file.and_then(|file| file.read_at(&mut bytes, 0));
            read.map_err(|error| format!("{}: {error}", base.path.display()))?;
            for (sector, bytes) in (0..).zip(bytes.chunks_exact(512)) {
                if bytes != stamp(base.family, sector, 1) {
                    return Err(format!("{} was written", base.path.display()));
                }
            }
        }
        Ok(())
    }

    /// Deletes all volumes, in any order, those first that others do not hold.
    fn remove_all(&mut self) -> Result<(), String> {
        let mut turns = 0;
        loop {
            let disks: Vec<String> = self.world().disks.keys().cloned().collect();
            let Some(disk) = self.pick(&disks) else {
                return Ok(());
            };
            let mut next = self.world();
            next.disks.remove(&disk);
            if next
                .disks
                .values()
                .any(|other| other.attached_from.as_deref() == Some(&disk))
            {
                continue;
            }
            self.command("volume delete", &disk, next, |store| {
                store.delete_volume(&disk)
            });
            if self.has_failed() {
                return Ok(());
            }
            turns += 1;
            if turns > 10_000 {
                return Err(format!("{disk} cannot be deleted"));
            }
            if self.random.chance(64) {
                self.job_steps();
            }
        }
    }

    /// A path of a raw image that does not exist yet.
    pub fn image_path(number: u64) -> PathBuf {
        Path::new("/images").join(format!("image{number}.raw"))
    }
}

/// Whether a command may end so on a good host.
fn is_refusal(error: &Error) -> bool {
    matches!(
        error,
        Error::Busy { .. }
            | Error::Invalid { .. }
            | Error::Exists { .. }
            | Error::NotFound {
                kind: "volume" | "image",
                ..
            }
    )
}

/// Examines images at crash points from now on, and lets guests go on there if they lie in a command: as threads do.
fn observe(media: &SimMedia, seed: u64, shared: &Shared, guests: Weak<Mutex<Guests>>) {
    let shared = Arc::clone(shared);
    let mut random = Random::new(seed);
    let mut waits = 0;
    media.set_observer(Box::new(move |media, point| {
        shared.lock().unwrap().look(media, point);
        let waiting = point.event == Event::Waiting;
        waits = if waiting { waits + 1 } else { 0 };
        if waits == HANGS {
            let watch = shared.lock().unwrap();
            panic!("seed {}: {:?} waits forever", watch.seed, watch.activity);
        }
        if !waiting && !random.chance(96) {
            return;
        }
        if let Some(guests) = guests.upgrade()
            && let Ok(mut guests) = guests.try_lock()
        {
            trace(|| "meanwhile".into());
            guests.interrupt();
            if waiting {
                guests.poll_all();
            }
        }
    }));
}
