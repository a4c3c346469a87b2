//! `stratablk-load`: load against a vhost-user-blk socket, from a front-end that shares no code with the daemon.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use stratablk_tests::load::driver::{Driver, Options, Request, Wait};
use stratablk_tests::load::ledger::Ledger;
use stratablk_tests::load::process::pin_to_cpu;
use stratablk_tests::load::report::Report;
use stratablk_tests::load::run::{Limits, run, sweep};
use stratablk_tests::load::stamp::STAMP_BYTES;
use stratablk_tests::load::workload::{Mix, Pattern, Steps, Workload};

/// Puts load on a vhost-user-blk back-end and measures it, or fills a disk, or checks what it holds.
///
/// Example: stratablk-load --socket /run/web.sock --rw read --depth 32 --working-set 256M --seconds 5
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The back-end's socket.
    #[arg(long)]
    socket: PathBuf,
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

/// Does what the arguments say.
fn load(arguments: &Arguments) -> Result<Report, String> {
    if let Some(cpu) = arguments.cpu {
        pin_to_cpu(cpu).map_err(|error| format!("CPU {cpu}: {error}"))?;
    }
    let buffer_bytes =
        usize::try_from(arguments.block).map_err(|error| format!("--block: {error}"))?;
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
        ..Options::new(&arguments.socket)
    })
    .map_err(|error| error.to_string())?;
    let whole = WorkingSet {
        len: driver.capacity_bytes() / arguments.block * arguments.block,
        start: 0,
    };
    let WorkingSet { len, start } = arguments.working_set.unwrap_or(whole);
    let mix = match arguments.rw {
        _ if arguments.fill => Mix::Write,
        MixName::Read => Mix::Read,
        MixName::Write => Mix::Write,
        MixName::Mix => Mix::Mixed {
            read_percent: arguments.read_percent,
        },
        MixName::Writeflush => Mix::WriteFlush,
    };
    let pattern = match arguments.pattern {
        _ if arguments.fill => Pattern::Sequential,
        PatternName::Rand => Pattern::Random,
        PatternName::Seq => Pattern::Sequential,
        PatternName::Once => Pattern::Once {
            stride_bytes: arguments.stride,
            skip: arguments.skip,
        },
    };
    let workload = Workload {
        pattern,
        mix,
        block_bytes: arguments.block,
        start,
        len,
        seed: arguments.seed,
    };
    let steps = Steps::new(&workload, driver.capacity_bytes())?;
    let count = if arguments.fill {
        Some(len / arguments.block)
    } else {
        arguments.count
    };
    let runs_out = count.is_some() || matches!(pattern, Pattern::Once { .. });
    let limits = Limits {
        warmup: arguments.warmup,
        time: arguments
            .seconds
            .or_else(|| (!runs_out).then_some(Duration::from_secs(5))),
        count,
        server_pid: arguments.server_pid,
    };
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
    Ok(Report::new(
        &measurement,
        arguments.block,
        swept_blocks,
        arguments.seed,
    ))
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let printed = load(&arguments).and_then(|report| {
        if arguments.json {
            serde_json::to_string(&report).map_err(|error| error.to_string())
        } else {
            Ok(report.to_string())
        }
    });
    match printed {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("stratablk-load: {error}");
            ExitCode::FAILURE
        }
    }
}
