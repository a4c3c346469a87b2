//! `stratablk-scale`: what several workers do at once, without rings and front-ends: each thread has a queue of one volume
//! and makes its own load. Also: how much memory the tables of a volume take.

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use serde_json::json;
use stratablk_layers::cache::CacheOptions;
use stratablk_layers::file::Segment;
use stratablk_layers::store::{Selection, Store, StoreOptions, VolumeSource};
use stratablk_layers::units::{SECTOR_BYTES, Sector};
use stratablk_layers::volume::{Durability, Operation, QueueContext, Volume};
use stratablk_tests::load::memory::DmaMemory;
use stratablk_tests::load::process::pin_to_cpu;
use stratablk_tests::load::random::Random;

/// Bytes of a request.
const BLOCK: usize = 4096;
/// Requests under way on each queue.
const DEPTH: usize = 32;
/// Batches between two looks at the clock.
const BATCHES: u32 = 64;
/// Bytes of a TiB.
const TIB: u64 = 1 << 40;

/// Measures how several threads share one store, or the memory of a volume's tables.
///
/// Example: stratablk-scale speed --dir /dev/shm/scale --cpus 0,1 --rw read
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// What to measure.
    #[arg(value_enum)]
    what: What,
    /// An empty directory for the store.
    #[arg(long)]
    dir: PathBuf,
    /// One thread on each of these CPUs, against one thread alone on one of them.
    #[arg(long, value_delimiter = ',', default_value = "0,1")]
    cpus: Vec<usize>,
    /// What the threads do.
    #[arg(long, value_enum, default_value_t = Load::Read)]
    rw: Load,
    /// Bytes of the disk. The tables of the worst layout are looked at on this much, which stands for a part of a large disk.
    #[arg(long, default_value_t = 256 << 20)]
    size: u64,
    /// How often both are measured.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Seconds of a measurement.
    #[arg(long, default_value_t = 0.7)]
    seconds: f64,
}

/// What to measure.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum What {
    /// Requests a second of one thread and of all.
    Speed,
    /// Bytes of the resolve tables.
    Tables,
}

/// What the threads do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Load {
    /// Random reads of 4 KiB.
    Read,
    /// Random writes of 4 KiB.
    Write,
    /// No store at all: copies of 4 KiB from random places of memory, which shows what the machine allows.
    Copy,
}

/// What went wrong, in words.
type Outcome<T> = Result<T, String>;

/// Anything's words.
fn words(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// A queue with the memory of its requests.
struct Queue {
    /// The queue; dropped before the memory.
    context: QueueContext,
    /// A buffer for each request.
    memory: DmaMemory,
    /// Which buffers are free.
    idle: Vec<usize>,
    /// Blocks of the disk.
    blocks: u64,
}

impl Queue {
    /// A queue of this volume.
    fn new(volume: &Arc<Volume>) -> Outcome<Self> {
        Ok(Self {
            context: volume.context(false).map_err(words)?,
            memory: DmaMemory::new(BLOCK * DEPTH).map_err(words)?,
            idle: (0..DEPTH).collect(),
            blocks: volume.capacity().0 * SECTOR_BYTES / BLOCK as u64,
        })
    }

    /// Starts a request in every free buffer, as long as `next` has a block; waits for some to end. Returns how many ended.
    fn batch(&mut self, write: bool, mut next: impl FnMut() -> Option<u64>) -> Outcome<u64> {
        self.context.begin_batch();
        while let Some(slot) = self.idle.pop() {
            let Some(block) = next() else {
                self.idle.push(slot);
                break;
            };
            let sector = Sector(block * (BLOCK as u64 / SECTOR_BYTES));
            let operation = if write {
                Operation::Write(sector)
            } else {
                Operation::Read(sector)
            };
            let segment = Segment {
                base: self.memory.pointer(slot * BLOCK, BLOCK),
                len: BLOCK,
            };
            #[expect(unsafe_code, reason = "plays a worker")]
            // SAFETY: the buffer is mapped until after the context is dropped, belongs to this request alone until its
            // completion is polled, and is only reached through this pointer.
            unsafe {
                self.context
                    .submit(operation, Durability::AfterFlush, &[segment], slot as u64);
            }
        }
        self.context.kick();
        let mut done = Vec::with_capacity(DEPTH);
        loop {
            self.context.poll(&mut done);
            if !done.is_empty() || self.context.under_way() == 0 {
                break;
            }
            self.context.wait(-1).map_err(words)?;
        }
        for ended in &done {
            ended
                .result
                .map_err(|error| format!("a request failed: {error:?}"))?;
            self.idle.extend(usize::try_from(ended.token));
        }
        Ok(done.len() as u64)
    }

    /// Does it for these blocks, to the end.
    fn all(&mut self, write: bool, blocks: impl Iterator<Item = u64>) -> Outcome<()> {
        let mut blocks = blocks.fuse();
        while self.batch(write, || blocks.next())? > 0 {}
        Ok(())
    }
}

/// What one thread does over and over.
enum Work {
    /// Requests to a volume.
    Requests(Box<Queue>, bool),
    /// Copies out of this memory.
    Copies(Arc<Vec<u8>>, Vec<u8>),
}

impl Work {
    /// One batch; returns how many requests ended.
    fn batch(&mut self, random: &mut Random) -> Outcome<u64> {
        match self {
            Self::Requests(queue, write) => {
                let blocks = queue.blocks;
                queue.batch(*write, || Some(random.below(blocks)))
            }
            Self::Copies(memory, buffers) => {
                let blocks = (memory.len() / BLOCK) as u64;
                for buffer in buffers.chunks_mut(BLOCK) {
                    let at = usize::try_from(random.below(blocks)).map_err(words)?;
                    let place = memory.get(at * BLOCK..(at + 1) * BLOCK);
                    buffer.copy_from_slice(place.ok_or("a place outside")?);
                }
                black_box(buffers);
                Ok(DEPTH as u64)
            }
        }
    }
}

/// Requests a second of threads on these CPUs together.
fn speed_on(
    cpus: &[usize],
    seconds: f64,
    make: &(dyn Fn() -> Outcome<Work> + Sync),
) -> Outcome<f64> {
    let start = Barrier::new(cpus.len());
    let total = AtomicU64::new(0);
    let time = Duration::try_from_secs_f64(seconds).map_err(words)?;
    let ended: Vec<Outcome<()>> = thread::scope(|scope| {
        let threads: Vec<_> = cpus
            .iter()
            .map(|cpu| {
                let (start, total) = (&start, &total);
                scope.spawn(move || {
                    let work = pin_to_cpu(*cpu).map_err(words).and_then(|()| make());
                    // Everybody comes here, so that nobody waits for ever.
                    start.wait();
                    let mut work = work?;
                    let mut random = Random::new(*cpu as u64 + 1);
                    let began = Instant::now();
                    let mut count = 0;
                    while began.elapsed() < time {
                        for _ in 0..BATCHES {
                            count += work.batch(&mut random)?;
                        }
                    }
                    // In thousandths of a request a second: threads end a batch apart, so each has its own time.
                    let took = u64::try_from(began.elapsed().as_micros()).map_err(words)?;
                    let rate = u128::from(count) * 1_000_000_000 / u128::from(took.max(1));
                    // ORDERING: Relaxed; the threads are joined before this is read.
                    total.fetch_add(u64::try_from(rate).map_err(words)?, Ordering::Relaxed);
                    Ok(())
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|_| Err("a thread panicked".into()))
            })
            .collect()
    });
    ended.into_iter().collect::<Outcome<Vec<()>>>()?;
    // ORDERING: Relaxed; all threads have been joined.
    let thousandths = total.load(Ordering::Relaxed);
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    Ok(thousandths as f64 / 1000.0)
}

/// One thread against all, over and over.
fn speed(arguments: &Arguments) -> Outcome<serde_json::Value> {
    let store = Store::open(&arguments.dir, options()).map_err(words)?;
    let make: Box<dyn Fn() -> Outcome<Work> + Sync> = if arguments.rw == Load::Copy {
        let bytes = usize::try_from(arguments.size).map_err(words)?;
        // Not zeroes, which would be one page of the kernel's.
        let memory = Arc::new(vec![0xa5; bytes]);
        Box::new(move || Ok(Work::Copies(Arc::clone(&memory), vec![0xff; BLOCK * DEPTH])))
    } else {
        let volume = new_volume(&store, "scale", arguments.size)?;
        let mut queue = Queue::new(&volume)?;
        let blocks = queue.blocks;
        // Written, so that there is something; read, so that it is at hand.
        queue.all(true, 0..blocks)?;
        queue.all(false, 0..blocks)?;
        drop(queue);
        let write = arguments.rw == Load::Write;
        Box::new(move || Ok(Work::Requests(Box::new(Queue::new(&volume)?), write)))
    };
    let (mut one, mut all) = (Vec::new(), Vec::new());
    let mut alone = arguments.cpus.iter().cycle();
    for round in 0..arguments.rounds {
        let single: Vec<usize> = alone.next().copied().into_iter().collect();
        let first = round % 2 == 0;
        for alone in [first, !first] {
            let cpus = if alone { &single } else { &arguments.cpus };
            let rate = speed_on(cpus, arguments.seconds, &make)?;
            if alone { &mut one } else { &mut all }.push(rate);
        }
    }
    Ok(json!({ "threads": arguments.cpus.len(), "one": one, "all": all }))
}

/// An empty disk.
fn new_volume(store: &Store, name: &str, bytes: u64) -> Outcome<Arc<Volume>> {
    store
        .create_volume(name, &VolumeSource::Size(bytes))
        .map_err(words)?;
    store.open_volume(name).map_err(words)
}

/// Bytes of the tables of a disk of a TiB: nothing but one layer, and every cluster with another layer than its neighbour.
fn tables(dir: &Path, sample_bytes: u64) -> Outcome<serde_json::Value> {
    let store = Store::open(dir, options()).map_err(words)?;
    let uniform = new_volume(&store, "uniform", TIB)?;
    let volume = new_volume(&store, "worst", sample_bytes)?;
    let empty = volume.table_bytes();
    for parity in 0..2 {
        let mut queue = Queue::new(&volume)?;
        let blocks = queue.blocks;
        queue.all(true, (0..blocks).filter(|block| block % 2 == parity))?;
        drop(queue);
        if parity == 0 {
            store
                .snapshot("half", &Selection::Volumes(vec!["worst".into()]))
                .map_err(words)?;
        }
    }
    let worst = volume.table_bytes();
    let scaled = worst.saturating_mul(TIB / sample_bytes.max(1));
    Ok(json!({
        "uniform_bytes_per_tib": uniform.table_bytes(),
        "worst_bytes_per_tib": scaled,
        "sample_bytes": sample_bytes,
        "sample_empty": empty,
        "sample_worst": worst,
    }))
}

/// How the stores are opened: with a cache that holds everything, and in which everything may be dirty.
fn options() -> StoreOptions {
    StoreOptions {
        cache: CacheOptions {
            bytes: 1 << 30,
            dirty_bytes: Some(1 << 30),
            ..CacheOptions::default()
        },
        ..StoreOptions::default()
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match arguments.what {
        What::Speed => speed(&arguments),
        What::Tables => tables(&arguments.dir, arguments.size),
    };
    match result {
        Ok(json) => {
            println!("{json}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("stratablk-scale: {error}");
            ExitCode::FAILURE
        }
    }
}
