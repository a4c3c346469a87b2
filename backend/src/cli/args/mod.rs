//! The words of the command line and what they mean; nothing is done here.

mod job;
mod snapshot;
#[cfg(test)]
mod tests;
mod volume;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Parser, Subcommand};

use stratablk_layers::cache::arena::place::DEFAULT_DIR;

use super::cache::CacheArgs;
use super::size::Rate;
use super::stats::StatsArgs;
use crate::confine::{Mode, Settings};
use crate::control::types::{PointRef, QUEUES_DEFAULT, QUEUES_MAX};

pub use self::job::{JobCommand, WaitArgs};
pub use self::snapshot::SnapshotCommand;
pub use self::volume::{SourceArgs, VolumeCommand};

/// Layered disks for virtual machines, over vhost-user-blk.
#[derive(Debug, Parser)]
#[command(
    name = "stratablk",
    version,
    after_help = "Examples:\n  \
        stratablk serve --blk-file disk.img --socket-path disk.sock   serve an image; it is never written\n  \
        stratablk serve --store /srv/strata                           serve a store of many volumes\n  \
        stratablk snapshot create before-upgrade web db               one instant of two running guests\n\n\
        Commands other than serve and check talk to a running daemon: give its control socket with --control or\n\
        STRATABLK_CONTROL (without either: /run/stratablk/control.sock). Exit codes: 0 done, 1 refused or failed, 2 usage,\n\
        3 a scrub found damage; 130 if a wait was ended with Ctrl-C (the job goes on)."
)]
pub struct Cli {
    /// The daemon's control socket; commands that talk to a daemon also look at STRATABLK_CONTROL
    #[arg(long, global = true, value_name = "PATH")]
    pub control: Option<PathBuf>,
    /// Print one JSON document instead of text
    #[arg(long, global = true)]
    pub json: bool,
    /// Print what this back-end can do, for management software, and exit
    #[arg(long)]
    pub print_capabilities: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the daemon: serve a store, or one disk without any set-up
    #[command(after_help = "Examples:\n  stratablk serve --store /srv/strata\n  \
                            stratablk serve --blk-file disk.img --socket-path disk.sock --queues 2")]
    Serve(Box<ServeArgs>),
    /// Create, list, attach, resize and delete disks
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Take, list, restore and delete points in time
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// List, wait for, pause, limit and cancel what is done in the background
    #[command(subcommand)]
    Job(JobCommand),
    /// Create a volume from a snapshot, or from what a volume holds now (the same as volume create --from)
    #[command(
        after_help = "Examples:\n  stratablk clone web@before-upgrade web-test\n  \
                            stratablk clone web web-test"
    )]
    Clone {
        /// The snapshot to start from; without @SNAPSHOT the volume as it is now, also while a guest uses it
        #[arg(value_name = "VOLUME[@SNAPSHOT]")]
        from: PointRef,
        /// The new volume's name
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        name: String,
    },
    /// Create a volume with the content of a raw image, which is copied in the background and not needed afterwards
    #[command(after_help = "Examples:\n  stratablk import debian.raw debian\n  \
                            stratablk import debian.raw debian --wait --rate 200M")]
    Import {
        /// The raw image; it must not change until the job has ended
        #[arg(value_name = "FILE")]
        image: PathBuf,
        /// The new volume's name
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        name: String,
        /// The job.
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Draw the layers: images, snapshots, and the current states of volumes on top of them
    #[command(after_help = "Examples:\n  stratablk tree\n  stratablk tree web --all")]
    Tree {
        /// Only the chain of this volume and what branches off it
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        volume: Option<String>,
        /// Draw each layer, also of long lists of siblings
        #[arg(long)]
        all: bool,
    },
    /// List what differs between two points, one JSON object a line: offset and length in bytes, and whether it is zero
    #[command(
        after_help = "Examples:\n  stratablk diff web@monday                 up to now\n  \
                            stratablk diff web@monday web@tuesday"
    )]
    Diff {
        /// The first point: a snapshot, or a volume as it is now
        #[arg(value_name = "VOLUME@SNAPSHOT")]
        from: PointRef,
        /// The second point [default: the volume as it is now]
        #[arg(value_name = "VOLUME[@SNAPSHOT]")]
        to: Option<PointRef>,
    },
    /// Tell what volumes take on the host: alone, and together with others
    #[command(after_help = "Examples:\n  stratablk du\n  stratablk du web db")]
    Du {
        /// The volumes [default: all]
        #[arg(value_name = "VOLUME", value_parser = NonEmptyStringValueParser::new())]
        volumes: Vec<String>,
    },
    /// Show what the cache and the volumes have done since the daemon started
    #[command(after_help = "Examples:\n  stratablk stats\n  stratablk stats --watch 5")]
    Stats(StatsArgs),
    /// Hold the data of snapshots and other sealed layers against the checksums that were taken when they were sealed
    #[command(
        after_help = "Examples:\n  stratablk scrub web --wait\n  stratablk scrub --all --rate 100M\n\n\
                      With --wait the exit code is 3 if something is damaged. Damaged data is never served: reads of it fail."
    )]
    #[command(group(clap::ArgGroup::new("scope").required(true).args(["volume", "all"])))]
    Scrub {
        /// The layers of this volume and its snapshots
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        volume: Option<String>,
        /// The layers of all volumes
        #[arg(long)]
        all: bool,
        /// The job.
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Verify a store that no daemon serves, and say what is wrong with it
    #[command(
        after_help = "Examples:\n  stratablk check --store /srv/strata\n  stratablk check --store /srv/strata --scrub"
    )]
    Check(CheckArgs),
}

/// Which store or disk to serve, and how.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("target").required(true).args(["store", "blk_file"])))]
#[command(group(clap::ArgGroup::new("disk_socket").args(["socket_path", "fd"])))]
pub struct ServeArgs {
    /// The store's directory; created if absent. The control socket is DIR/control.sock unless --control says otherwise
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// Go on where the daemon is that serves this store: it hands over all that it serves, with its front-ends connected, and
    /// ends; if this one cannot go on, that one does
    #[arg(long, requires = "store")]
    pub takeover: bool,
    /// Serve this raw image as one disk; it is never written, changes go to a store beside it, FILE.strata
    #[arg(long, value_name = "FILE", requires = "disk_socket")]
    pub blk_file: Option<PathBuf>,
    /// One disk: the vhost-user socket to listen on
    #[arg(
        long,
        value_name = "PATH",
        requires = "blk_file",
        conflicts_with = "store"
    )]
    pub socket_path: Option<PathBuf>,
    /// One disk: an inherited vhost-user socket, listening or connected
    #[arg(
        long,
        value_name = "N",
        requires = "blk_file",
        conflicts_with = "store"
    )]
    pub fd: Option<i32>,
    /// One disk: how many virtqueues to offer
    #[arg(
        long,
        value_name = "N",
        requires = "blk_file",
        conflicts_with = "store"
    )]
    #[arg(default_value_t = QUEUES_DEFAULT, value_parser = queues())]
    pub queues: u16,
    /// One disk: the guest may only read
    #[arg(long, requires = "blk_file", conflicts_with = "store")]
    pub read_only: bool,
    /// Bypass the host's page cache where the file system can
    #[arg(long)]
    pub direct_io: bool,
    /// Use plain reads and writes even where io_uring works
    #[arg(long)]
    pub no_io_uring: bool,
    /// The cache.
    #[command(flatten)]
    pub cache: CacheArgs,
    /// How much to read a second at most to take checksums of layers that were sealed; none: no limit
    #[arg(long, value_name = "RATE", default_value = "64M", value_parser = super::size::parse_rate)]
    pub checksum_rate: Rate,
    /// Open the control socket to a group as well (name or number)
    #[arg(long, value_name = "GROUP")]
    pub control_group: Option<String>,
    /// Open the sockets that volumes are attached to for a group as well (name or number)
    #[arg(long, value_name = "GROUP")]
    pub socket_group: Option<String>,
    /// What the daemon gives up.
    #[command(flatten)]
    pub confine: ConfineArgs,
    /// Worker threads a volume, at most [default: one a CPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub workers: Option<u16>,
    /// What to log to stderr: error, warn, info, debug, trace, or a filter such as stratablk=debug
    #[arg(
        long,
        value_name = "FILTER",
        env = "STRATABLK_LOG",
        default_value = "info"
    )]
    pub log: String,
}

/// What the daemon gives up before it serves.
#[derive(Debug, Args)]
pub struct ConfineArgs {
    /// Become this user before anything is opened (name or number); needs root
    #[arg(long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// Images may be read and written, and sockets made, beneath this directory, and with this option nowhere else (but in
    /// the store, and where images and sockets that it remembers are); can be given several times
    #[arg(long, value_name = "DIR")]
    pub allow: Vec<PathBuf>,
    /// The same, for reading images only
    #[arg(long, value_name = "DIR")]
    pub allow_read: Vec<PathBuf>,
    /// Give up privileges, directories and system calls that are not needed: auto (what the kernel can), require (all of it,
    /// or do not start), off
    #[arg(long, value_name = "HOW", default_value_t = Mode::Auto)]
    pub confine: Mode,
}

impl From<ConfineArgs> for Settings {
    fn from(args: ConfineArgs) -> Self {
        Self {
            mode: args.confine,
            user: args.user,
            allow: args.allow,
            allow_read: args.allow_read,
        }
    }
}

/// What to verify.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The store's directory
    #[arg(long, value_name = "DIR")]
    pub store: PathBuf,
    /// Write a new catalog from what the layers say of themselves; the old one is kept beside it
    #[arg(long)]
    pub rebuild_catalog: bool,
    /// Read all data of sealed layers as well, and hold it against their checksums
    #[arg(long)]
    pub scrub: bool,
    /// Where the daemon's cache lies, to see whether one that was killed has left something in it
    #[arg(long, value_name = "DIR", default_value = DEFAULT_DIR)]
    pub cache_dir: PathBuf,
}

/// How many virtqueues may be offered.
fn queues() -> clap::builder::RangedI64ValueParser<u16> {
    clap::value_parser!(u16).range(1..=i64::from(QUEUES_MAX))
}

/// The arguments with `serve` put in where management software starts us as it starts any vhost-user back-end program,
/// with `--socket-path` or `--fd` and without a command.
pub fn with_serve_implied(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut args: Vec<OsString> = args.into_iter().collect();
    let implies = |arg: &OsString| {
        let arg = arg.to_string_lossy();
        let name = arg.split('=').next().unwrap_or_default();
        matches!(
            name,
            "--socket-path" | "--fd" | "--blk-file" | "--read-only"
        )
    };
    if args.get(1).is_some_and(implies) {
        args.insert(1, "serve".into());
    }
    args
}
