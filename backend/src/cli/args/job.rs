//! The words of commands on jobs, and of all that begin some.

use clap::{Args, Subcommand};

use super::super::size::{self, Rate};

/// What to do with jobs.
#[derive(Debug, Subcommand)]
pub enum JobCommand {
    /// List the jobs that have not ended, and those that ended lately
    #[command(after_help = "Example:\n  stratablk job list")]
    List,
    /// Show one job
    #[command(after_help = "Example:\n  stratablk job show 3")]
    Show {
        /// The job's number
        id: u64,
    },
    /// Wait until a job has ended, and show how it gets on. Exit code 1 if it fails or is cancelled
    #[command(
        after_help = "Example:\n  stratablk job wait 3\n\nCtrl-C ends the wait; the job goes on."
    )]
    Wait {
        /// The job's number
        id: u64,
    },
    /// Let a job rest until it is resumed, also over restarts of the daemon
    #[command(after_help = "Example:\n  stratablk job pause 3")]
    Pause {
        /// The job's number
        id: u64,
    },
    /// Let a job go on that rests, was cancelled or has failed
    #[command(after_help = "Example:\n  stratablk job resume 3")]
    Resume {
        /// The job's number
        id: u64,
    },
    /// Stop a job for good. Disks read the same; the layer that was to go stays, without a name
    #[command(after_help = "Example:\n  stratablk job cancel 3")]
    Cancel {
        /// The job's number
        id: u64,
    },
    /// Limit how much a job copies a second
    #[command(
        visible_alias = "set-rate",
        after_help = "Examples:\n  stratablk job limit 3 50M\n  stratablk job limit 3 none"
    )]
    Limit {
        /// The job's number
        id: u64,
        /// Bytes a second, or with K, M or G; none: no limit
        #[arg(value_name = "RATE", value_parser = size::parse_rate)]
        rate: Rate,
    },
}

/// How to go on with a job that a command begins.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct WaitArgs {
    /// Wait until the data is where it belongs, and show how that gets on (Ctrl-C ends the wait, not the job)
    #[arg(long)]
    pub wait: bool,
    /// How much to copy a second at most: bytes, or with K, M or G
    #[arg(long, value_name = "RATE", value_parser = size::parse_rate)]
    pub rate: Option<Rate>,
}

impl WaitArgs {
    /// The limit in bytes a second.
    pub fn rate_bytes_per_s(&self) -> Option<u64> {
        self.rate.and_then(|rate| rate.0)
    }
}
