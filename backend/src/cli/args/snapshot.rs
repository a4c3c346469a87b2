//! The words of commands on snapshots.

use clap::Subcommand;
use clap::builder::NonEmptyStringValueParser;

use super::WaitArgs;
use crate::control::types::MergeWay;

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
        /// All volumes of the store, but those of type writethrough
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
    /// Go back: a volume holds again what a snapshot holds. Its guest must be shut down
    #[command(
        after_help = "Examples:\n  stratablk snapshot restore web before-upgrade\n  \
                            stratablk snapshot restore web before-upgrade --keep failed-upgrade\n\n\
                      What was written since is thrown away, unless it is kept. Newer snapshots stay: the tree branches.\n\
                      A snapshot of several volumes is restored on all of them, or on none."
    )]
    Restore {
        /// The volume
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        volume: String,
        /// The snapshot
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        snapshot: String,
        /// Keep what was written since as a snapshot of this name
        #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
        keep: Option<String>,
        /// Restore this volume only, although the snapshot was taken of several
        #[arg(long)]
        only: bool,
    },
    /// Delete a snapshot: its name goes at once, its data joins its child in the background, while guests run
    #[command(
        after_help = "Examples:\n  stratablk snapshot delete web before-upgrade --dry-run\n  \
                            stratablk snapshot delete web before-upgrade\n  \
                            stratablk snapshot delete web before-upgrade --wait --rate 100M"
    )]
    Delete {
        /// The volume
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        volume: String,
        /// The snapshot
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        snapshot: String,
        /// Only say what would happen: the ways, and the bytes, space and time of each
        #[arg(long, conflicts_with_all = ["wait", "rate"])]
        dry_run: bool,
        /// If several layers lie over it, copy its data into each of them, so that nothing of it stays
        #[arg(long)]
        push_down: bool,
        /// Move its data into the raw image below it, which is WRITTEN then
        #[arg(long)]
        into_base: bool,
        /// The way its data has to go: up into its child, or down, the child's data into it [default: the cheaper one]
        #[arg(long, value_name = "up|down", value_parser = way)]
        way: Option<MergeWay>,
        /// The jobs.
        #[command(flatten)]
        wait: WaitArgs,
    },
}

/// A way that can be chosen.
fn way(text: &str) -> Result<MergeWay, &'static str> {
    match text {
        "up" => Ok(MergeWay::Up),
        "down" => Ok(MergeWay::Down),
        _ => Err("write up or down"),
    }
}
