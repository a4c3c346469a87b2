//! `stratablk-load`: load against a vhost-user-blk socket, from a front-end that shares no code with the daemon.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use stratablk_tests::load::driver::{Driver, Options, Request, Wait};
use stratablk_tests::load::ledger::Ledger;
use stratablk_tests::load::process::pin_to_cpu;
use stratablk_tests::load::report::Report;
use stratablk_tests::load::run::{Limits, run, sweep};
use stratablk_tests::load::stamp::STAMP_BYTES;
use stratablk_tests::load::straight::run_straight;
use stratablk_tests::load::workload::{Mix, Pattern, Steps, Workload};

/// Puts load on a vhost-user-blk back-end and measures it, or fills a disk, or checks what it holds.
///
/// Example: stratablk-load --socket /run/web.sock --rw read --depth 32 --working-set 256M --seconds 5
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The back-end's socket.
    #[arg(long, required_unless_present = "file")]
    socket: Option<PathBuf>,
    /// No back-end: do the same to this file, one request after the other, with plain system calls.
    #[arg(long, conflicts_with_all = ["socket", "queues", "depth", "verify", "sleep", "hold"])]
    file: Option<PathBuf>,
    /// Virtqueues to use.
    #[arg(long, default_value_t = 1)]
    queues: usize,
    /// Requests under way on each queue.
    #[arg(long, default_value_t = 1)]
    depth: usize,
    /// Bytes of a request.
    #[arg(long, default_value = "4096", value_parser = parse_size)]
    block: u64,
    /// The order of addresses.
    #[arg(long, value_enum, default_value_t = PatternName::Rand)]
    pattern: PatternName,
    /// With --pattern once: bytes of a unit, in each of which one address is visited.
    #[arg(long, default_value = "64K", value_parser = parse_size)]
    stride: u64,
    /// With --pattern once: leave out the first units of the order.
    #[arg(long, default_value_t = 0)]
    skip: u64,
    /// What to do at each address. writeflush: a write, then a flush, counted as one operation.
    #[arg(long, value_enum, default_value_t = MixName::Read)]
    rw: MixName,
    /// With --rw mix: how many requests in a hundred are reads.
    #[arg(long, default_value_t = 70, value_parser = clap::value_parser!(u8).range(0..=100))]
    read_percent: u8,
    /// BYTES[,OFFSET]: the part of the disk to use; all of it by default.
    #[arg(long, value_parser = parse_working_set)]
    working_set: Option<WorkingSet>,
    /// How long to measure; 5 seconds unless --count is given.
    #[arg(long, value_parser = parse_seconds)]
    seconds: Option<Duration>,
    /// How many operations to measure.
    #[arg(long)]
    count: Option<u64>,
    /// Load in seconds before the measurement, not counted.
    #[arg(long, default_value = "0", value_parser = parse_seconds)]
    warmup: Duration,
    /// Keep to this CPU.
    #[arg(long)]
    cpu: Option<usize>,
    /// The back-end's process, to report its CPU time.
    #[arg(long)]
    server_pid: Option<u32>,
    /// Sleep until the back-end calls instead of looking at the used ring all the time.
    #[arg(long)]
    sleep: bool,
    /// Write the whole working set once, in order, flush, and measure that.
    #[arg(long, conflicts_with_all = ["pattern", "rw", "seconds", "count", "warmup"])]
    fill: bool,
    /// Stamp each 4 KiB that is written; check what is read, and everything once more at the end.
    #[arg(long, value_enum)]
    verify: Option<VerifyName>,
    /// With --verify: the disk was filled with stamps before; zeroes are an error.
    #[arg(long, requires = "verify")]
    filled: bool,
    /// Give up after this many seconds without any completion.
    #[arg(long, default_value = "30", value_parser = parse_seconds)]
    patience: Duration,
    /// Everything random follows from this number.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Count completions by slices of this many seconds (in the JSON document).
    #[arg(long, default_value = "0", value_parser = parse_seconds)]
    timeline: Duration,
    /// After printing, stay connected and idle until standard input ends.
    #[arg(long)]
    hold: bool,
    /// Print one JSON document instead of a line for people.
    #[arg(long)]
    json: bool,
}

/// The order of addresses.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum PatternName {
    /// Any address.
    Rand,
    /// One after the other.
    Seq,
    /// One address in each unit of --stride bytes, in random order, until all were visited.
    Once,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum MixName {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Both.
    Mix,
    /// Writes, each with a flush after it.
    Writeflush,
}

/// What to check.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum VerifyName {
    /// Stamped blocks.
    Stamps,
}

/// A part of the disk.
#[derive(Clone, Copy, Debug)]
struct WorkingSet {
    /// Bytes.
    len: u64,
    /// Where it starts.
    start: u64,
}

/// Bytes, with an optional K, M, G or T for powers of 1024.
fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (text.get(..at), 10),
        Some((at, 'M' | 'm')) => (text.get(..at), 20),
        Some((at, 'G' | 'g')) => (text.get(..at), 30),
        Some((at, 'T' | 't')) => (text.get(..at), 40),
        _ => (Some(text), 0),
    };
    digits
        .and_then(|digits| digits.parse::<u64>().ok())
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| format!("{text:?} is not a size such as 4096, 64K or 2G"))
}

/// `BYTES[,OFFSET]`.
fn parse_working_set(text: &str) -> Result<WorkingSet, String> {
    let (len, start) = text.split_once(',').unwrap_or((text, "0"));
    Ok(WorkingSet {
        len: parse_size(len)?,
        start: parse_size(start)?,
    })
}

/// Seconds, with a fraction.
fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text
        .parse()
        .map_err(|_| format!("{text:?} is not a number of seconds"))?;
    Duration::try_from_secs_f64(seconds).map_err(|error| format!("{text:?}: {error}"))
}

/// What was asked for, on a disk of a certain size.
struct Plan {
    /// Where the requests come from.
    steps: Steps,
    /// What is done.
    mix: Mix,
    /// When it ends.
    limits: Limits,
    /// The part of the disk.
    part: WorkingSet,
}

impl Arguments {
    /// Bytes of a request, as a length in memory.
    fn buffer_bytes(&self) -> Result<usize, String> {
        usize::try_from(self.block).map_err(|error| format!("--block: {error}"))
    }

    /// What to do to a disk of this size.
    fn plan(&self, capacity_bytes: u64) -> Result<Plan, String> {
        let part = self.working_set.unwrap_or(WorkingSet {
            len: capacity_bytes
                .checked_div(self.block)
                .map_or(0, |blocks| blocks * self.block),
            start: 0,
        });
        let mix = match self.rw {
            _ if self.fill => Mix::Write,
            MixName::Read => Mix::Read,
            MixName::Write => Mix::Write,
            MixName::Mix => Mix::Mixed {
                read_percent: self.read_percent,
            },
            MixName::Writeflush => Mix::WriteFlush,
        };
        let pattern = match self.pattern {
            _ if self.fill => Pattern::Sequential,
            PatternName::Rand => Pattern::Random,
            PatternName::Seq => Pattern::Sequential,
            PatternName::Once => Pattern::Once {
                stride_bytes: self.stride,
                skip: self.skip,
            },
        };
        let workload = Workload {
            pattern,
            mix,
            block_bytes: self.block,
            start: part.start,
            len: part.len,
            seed: self.seed,
        };
        let steps = Steps::new(&workload, capacity_bytes)?;
        let count = if self.fill {
            Some(part.len / self.block)
        } else {
            self.count
        };
        let runs_out = count.is_some() || matches!(pattern, Pattern::Once { .. });
        Ok(Plan {
            steps,
            mix,
            limits: Limits {
                warmup: self.warmup,
                time: self
                    .seconds
                    .or_else(|| (!runs_out).then_some(Duration::from_secs(5))),
                count,
                server_pid: self.server_pid,
                slice: self.timeline,
            },
            part,
        })
    }
}

/// Does what the arguments say to a file.
fn load_file(arguments: &Arguments, path: &Path) -> Result<Report, String> {
    let failed = |error: std::io::Error| format!("{}: {error}", path.display());
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(failed)?;
    let plan = arguments.plan(file.metadata().map_err(failed)?.len())?;
    let measurement = run_straight(
        &file,
        plan.steps,
        plan.mix,
        arguments.buffer_bytes()?,
        &plan.limits,
        arguments.seed,
    )
    .map_err(|error| error.to_string())?;
    if arguments.fill {
        file.sync_all().map_err(failed)?;
    }
    Ok(Report::new(
        &measurement,
        arguments.block,
        0,
        arguments.seed,
    ))
}

/// Does what the arguments say to a back-end's disk; returns the session as well, which lasts until it is dropped.
fn load_disk(arguments: &Arguments, socket: &Path) -> Result<(Report, Driver), String> {
    let buffer_bytes = arguments.buffer_bytes()?;
    let verify = arguments.verify.is_some();
    if verify && !buffer_bytes.is_multiple_of(STAMP_BYTES) {
        return Err(format!(
            "--block: stamped blocks have {STAMP_BYTES} bytes, so it must be a multiple of that"
        ));
    }
    let mut driver = Driver::connect(Options {
        queues: arguments.queues,
        depth: arguments.depth,
        buffer_bytes,
        wait: if arguments.sleep {
            Wait::Sleep
        } else {
            Wait::Spin
        },
        patience: arguments.patience,
        ..Options::new(socket)
    })
    .map_err(|error| error.to_string())?;
    let Plan {
        steps,
        mix,
        limits,
        part: WorkingSet { len, start },
    } = arguments.plan(driver.capacity_bytes())?;
    let mut ledger = verify
        .then(|| Ledger::new(0, arguments.seed, start, len, arguments.filled))
        .transpose()?;
    let measurement = run(
        &mut driver,
        steps,
        mix,
        &limits,
        ledger.as_mut(),
        arguments.seed,
    )
    .map_err(|error| error.to_string())?;
    if arguments.fill {
        driver
            .run(0, Request::Flush)
            .map_err(|error| error.to_string())?;
    }
    let mut swept_blocks = 0;
    if let Some(ledger) = &mut ledger {
        let stamped = len / STAMP_BYTES as u64 * STAMP_BYTES as u64;
        swept_blocks =
            sweep(&mut driver, ledger, start, stamped).map_err(|error| error.to_string())?;
    }
    let report = Report::new(&measurement, arguments.block, swept_blocks, arguments.seed);
    Ok((report, driver))
}

/// Does what the arguments say and prints what it showed.
fn load(arguments: &Arguments) -> Result<(), String> {
    if let Some(cpu) = arguments.cpu {
        pin_to_cpu(cpu).map_err(|error| format!("CPU {cpu}: {error}"))?;
    }
    let (report, driver) = match (&arguments.file, &arguments.socket) {
        (Some(file), _) => (load_file(arguments, file)?, None),
        (None, Some(socket)) => {
            let (report, driver) = load_disk(arguments, socket)?;
            (report, Some(driver))
        }
        (None, None) => return Err("give --socket or --file".into()),
    };
    if arguments.json {
        println!(
            "{}",
            serde_json::to_string(&report).map_err(|error| error.to_string())?
        );
    } else {
        println!("{report}");
    }
    if arguments.hold {
        std::io::copy(&mut std::io::stdin(), &mut std::io::sink())
            .map_err(|error| format!("standard input: {error}"))?;
    }
    drop(driver);
    Ok(())
}

fn main() -> ExitCode {
    match load(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stratablk-load: {error}");
            ExitCode::FAILURE
        }
    }
}
