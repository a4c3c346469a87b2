//! The words of commands on volumes.

use std::path::PathBuf;

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Subcommand};

use super::super::size::{self, NewSize};
use super::{WaitArgs, queues};
use crate::control::types::{PointRef, QUEUES_DEFAULT, VolumeType};

/// What to do with volumes.
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Create a volume: empty, over a raw image, from a snapshot, or from what another volume holds now
    #[command(
        after_help = "Examples:\n  stratablk volume create data --size 10G\n  \
                            stratablk volume create web --base debian.img\n  \
                            stratablk volume create web-test --from web@before-upgrade\n  \
                            stratablk volume create kiosk --base debian.img --type immutable\n\n\
                      Types:\n  \
                            normal        writes stay, snapshots cover them\n  \
                            immutable     writes are thrown away each time a virtual machine starts\n  \
                            writethrough  writes stay, snapshots leave the volume out\n  \
                            multiattach   each attachment gets a volume of its own over it\n  \
                            readonly      the guest may only read"
    )]
    Create {
        /// The new volume's name: letters, digits, . _ - (at most 64)
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        name: String,
        /// What it starts from.
        #[command(flatten)]
        source: SourceArgs,
        /// What happens to its writes: normal, immutable, writethrough, multiattach or readonly
        #[arg(long = "type", value_name = "TYPE", default_value_t = VolumeType::Normal)]
        kind: VolumeType,
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
    /// Give a volume another type
    #[command(
        after_help = "Example:\n  stratablk volume set web --type immutable\n\n\
                      What the volume holds now is what an immutable or multiattach volume starts from."
    )]
    Set {
        /// The volume
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        name: String,
        /// What happens to its writes: normal, immutable, writethrough, multiattach or readonly
        #[arg(long = "type", value_name = "TYPE")]
        kind: VolumeType,
    },
    /// Change the size of a volume: larger while its guest uses it, smaller only while nobody does
    #[command(
        after_help = "Examples:\n  stratablk volume resize web 20G\n  stratablk volume resize web +5G\n  \
                            stratablk volume resize web 10G --shrink"
    )]
    Resize {
        /// The volume
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        name: String,
        /// The new size: bytes, or with K, M, G or T; with + so much more than now
        #[arg(value_name = "SIZE", value_parser = size::parse_new)]
        size: NewSize,
        /// Allow a smaller size
        #[arg(long)]
        shrink: bool,
        /// Allow a smaller size even if sectors that hold data are cut off
        #[arg(long, requires = "shrink")]
        force: bool,
    },
    /// Copy into a volume what it needs from the layers below it, in the background, so that it needs none of them
    #[command(after_help = "Examples:\n  stratablk volume flatten web-test\n  \
                            stratablk volume flatten web-test --wait --rate 100M")]
    Flatten {
        /// The volume
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        name: String,
        /// The job.
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Let a volume that has failed take writes again: what it holds since its last snapshot is written once more
    #[command(after_help = "Example:\n  stratablk volume recover web\n\n\
                      Only while no machine uses the volume. Find out first why the host failed. What the host has lost cannot \
                      be told: look at the disk afterwards as after a power cut, or go back to a snapshot instead \
                      (stratablk snapshot restore), which needs no recovery.")]
    Recover {
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
    #[command(
        after_help = "Examples:\n  stratablk volume attach web --socket /run/web.sock\n  \
                            stratablk volume attach template --socket /run/vm1.sock --as vm1\n\n\
                      Of a multiattach volume a volume of its own is made and served; the reply names it."
    )]
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
        /// Of a multiattach volume: the name of the volume that is made [default: NAME-1, NAME-2, ...]
        #[arg(long = "as", value_name = "NEW", value_parser = NonEmptyStringValueParser::new())]
        made: Option<String>,
    },
    /// Stop serving a volume, after what is under way has ended
    #[command(after_help = "Examples:\n  stratablk volume detach web\n  \
                            stratablk volume detach template-1 --keep-as vm1\n\n\
                      A volume that was made for an attachment of a multiattach volume goes with it, unless it is kept.")]
    Detach {
        /// The volume
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        name: String,
        /// Keep a volume that was made for the attachment, as a normal volume of this name
        #[arg(long, value_name = "NEW", value_parser = NonEmptyStringValueParser::new())]
        keep_as: Option<String>,
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
    /// A snapshot of a volume; without @SNAPSHOT the volume as it is now, also while a guest uses it
    #[arg(long, value_name = "VOLUME[@SNAPSHOT]")]
    pub from: Option<PointRef>,
}
