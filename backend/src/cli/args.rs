//! The words of the command line and what they mean; nothing is done here.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Parser, Subcommand};

use stratablk_layers::cache::arena::place::DEFAULT_DIR;

use super::cache::CacheArgs;
use super::size;
use super::stats::StatsArgs;
use crate::control::types::{QUEUES_DEFAULT, QUEUES_MAX, SnapshotRef};

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
        STRATABLK_CONTROL (without either: /run/stratablk/control.sock). Exit codes: 0 done, 1 refused or failed, 2 usage."
)]
pub struct Cli {
    /// The daemon's control socket
    #[arg(long, global = true, env = "STRATABLK_CONTROL", value_name = "PATH")]
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
    Serve(ServeArgs),
    /// Create, list, attach and delete disks
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Take and list points in time
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Create a volume from a snapshot (the same as volume create --from)
    #[command(after_help = "Example:\n  stratablk clone web@before-upgrade web-test")]
    Clone {
        /// The snapshot to start from
        #[arg(value_name = "VOLUME@SNAPSHOT")]
        from: SnapshotRef,
        /// The new volume's name
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        name: String,
    },
    /// Draw the layers: bases, snapshots, and the volumes on top of them
    #[command(after_help = "Example:\n  stratablk tree web")]
    Tree {
        /// Only the chain of this volume and what branches off it
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        volume: Option<String>,
    },
    /// Show what the cache and the volumes have done since the daemon started
    #[command(after_help = "Examples:\n  stratablk stats\n  stratablk stats --watch 5")]
    Stats(StatsArgs),
    /// Verify a store that no daemon serves, and say what is wrong with it
    #[command(after_help = "Example:\n  stratablk check --store /srv/strata")]
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
    /// Open the control socket to a group as well (name or number)
    #[arg(long, value_name = "GROUP")]
    pub control_group: Option<String>,
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

/// What to do with volumes.
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Create a volume: empty, over a raw image, or from a snapshot
    #[command(
        after_help = "Examples:\n  stratablk volume create data --size 10G\n  \
                            stratablk volume create web --base debian.img\n  \
                            stratablk volume create web-test --from web@before-upgrade"
    )]
    Create {
        /// The new volume's name: letters, digits, . _ - (at most 64)
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        name: String,
        /// What it starts from.
        #[command(flatten)]
        source: SourceArgs,
    },
    /// List all volumes
    #[command(after_help = "Example:\n  stratablk volume list")]
    List,
    /// Show one volume with its attachment and counters
    #[command(after_help = "Example:\n  stratablk volume show web")]
    Show {
        /// The volume
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        name: String,
    },
    /// Delete a volume with its snapshots (clones of them stay whole)
    #[command(after_help = "Example:\n  stratablk volume delete web-test")]
    Delete {
        /// The volume
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        name: String,
    },
    /// Serve a volume to a virtual machine, now and after every restart of the daemon
    #[command(after_help = "Example:\n  stratablk volume attach web --socket /run/web.sock")]
    Attach {
        /// The volume
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        name: String,
        /// The vhost-user socket to listen on
        #[arg(long, value_name = "PATH")]
        socket: PathBuf,
        /// How many virtqueues to offer
        #[arg(long, value_name = "N", default_value_t = QUEUES_DEFAULT, value_parser = queues())]
        queues: u16,
        /// The guest may only read
        #[arg(long)]
        read_only: bool,
    },
    /// Stop serving a volume, after what is under way has ended
    #[command(after_help = "Example:\n  stratablk volume detach web")]
    Detach {
        /// The volume
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        name: String,
    },
}

/// What a new volume starts from: exactly one of these.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct SourceArgs {
    /// An empty disk of this size: bytes, or with K, M, G or T
    #[arg(long, value_parser = size::parse)]
    pub size: Option<u64>,
    /// A raw image, used in place and never written
    #[arg(long, value_name = "FILE")]
    pub base: Option<PathBuf>,
    /// A snapshot of a volume
    #[arg(long, value_name = "VOLUME@SNAPSHOT")]
    pub from: Option<SnapshotRef>,
}

/// What to do with snapshots.
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Take a snapshot of one or more volumes, all at one instant, while their guests run
    #[command(
        after_help = "Examples:\n  stratablk snapshot create before-upgrade web db\n  \
                            stratablk snapshot create nightly --all"
    )]
    Create {
        /// The snapshot's name, the same for each of the volumes
        #[arg(value_name = "SNAPSHOT", value_parser = NonEmptyStringValueParser::new())]
        name: String,
        /// The volumes
        #[arg(value_name = "VOLUME", required_unless_present = "all", conflicts_with = "all",
              value_parser = NonEmptyStringValueParser::new())]
        volumes: Vec<String>,
        /// All volumes of the store
        #[arg(long)]
        all: bool,
    },
    /// List snapshots, oldest first
    #[command(after_help = "Example:\n  stratablk snapshot list web")]
    List {
        /// Only those of this volume
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        volume: Option<String>,
    },
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

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use clap::CommandFactory;

    use super::*;

    /// Parses a line as a shell would split it.
    fn parse(line: &str) -> Result<Cli, clap::Error> {
        let args = std::iter::once("stratablk").chain(line.split_whitespace());
        Cli::try_parse_from(with_serve_implied(args.map(OsString::from)))
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_form_that_scripts_rely_on_is_understood() {
        for line in [
            "serve --store /s",
            "serve --store /s --control /c",
            "--control /c serve --store /s",
            "serve --blk-file f --socket-path s",
            "serve --blk-file f --fd 3 --queues 2 --read-only",
            "serve --blk-file f --socket-path s --queues 4",
            "--blk-file=f --socket-path=s",
            "--fd=3 --blk-file=f --read-only",
            "volume create web --size 10G",
            "volume create web --base f",
            "volume create web --from db@s1",
            "volume list",
            "volume show web",
            "volume delete web",
            "volume attach web --socket /s",
            "volume attach web --socket /s --queues 2 --read-only",
            "volume detach web",
            "snapshot create s1 web",
            "snapshot create s1 web db",
            "snapshot create s1 --all",
            "snapshot list",
            "snapshot list web",
            "tree",
            "tree web",
            "check --store /s",
            "check --store /s --rebuild-catalog",
            "check --store /s --cache-dir /d",
            "serve --store /s --cache-size 64K --dirty-limit 4K --dirty-age 0",
            "serve --store /s --cache-size 1G --dirty-limit 1G --dirty-age 86400",
            "serve --blk-file f --socket-path s --cache-dir /d --cache-keep",
            "stats",
            "stats --json",
            "stats --watch 0.5",
            "clone web@s1 web2",
            "--print-capabilities",
            "--control /c volume list",
            "volume --control /c list",
            "volume list --control /c",
            "--json volume list",
            "volume list --json",
        ] {
            parse(line).unwrap_or_else(|error| panic!("{line}: {error}"));
        }
    }

    #[test]
    fn what_makes_no_sense_is_a_usage_error() {
        for line in [
            "serve",
            "serve --store /s --blk-file f --socket-path s",
            "serve --blk-file f",
            "serve --blk-file f --socket-path s --fd 3",
            "serve --store /s --socket-path s",
            "serve --store /s --read-only",
            "serve --store /s --queues 2",
            "serve --blk-file f --socket-path s --queues 0",
            "serve --blk-file f --socket-path s --queues 65",
            "volume",
            "volume create web",
            "volume create web --size 10G --base f",
            "volume create web --size ten",
            "volume create web --from db",
            "volume create web --from @s1",
            "volume attach web",
            "snapshot create",
            "snapshot create s1",
            "snapshot create s1 web --all",
            "check",
            "serve --store /s --cache-size 65535",
            "serve --store /s --cache-size lots",
            "serve --store /s --dirty-limit 0",
            "serve --store /s --dirty-limit 4095",
            "serve --store /s --dirty-age -1",
            "serve --store /s --dirty-age 86401",
            "serve --store /s --dirty-age NaN",
            "serve --store /s --dirty-age inf",
            "stats web",
            "stats --watch 0",
            "stats --watch often",
            "frobnicate",
        ] {
            let error = parse(line)
                .err()
                .unwrap_or_else(|| panic!("{line} was understood"));
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn the_control_socket_is_found_before_and_after_the_command() {
        for line in [
            "--control /c volume list",
            "volume --control /c list",
            "volume list --control /c",
        ] {
            assert_eq!(
                parse(line).unwrap().control,
                Some(PathBuf::from("/c")),
                "{line}"
            );
        }
        for line in ["--json tree", "tree --json"] {
            assert!(parse(line).unwrap().json, "{line}");
        }
    }

    #[test]
    fn a_size_is_in_binary_units() {
        let cli = parse("volume create web --size 10G").unwrap();
        let Some(Command::Volume(VolumeCommand::Create { name, source })) = cli.command else {
            panic!("{cli:?}");
        };
        assert_eq!((name.as_str(), source.size), ("web", Some(10 << 30)));
    }
}
