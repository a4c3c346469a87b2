//! Volumes and how they are attached.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::super::timestamp::Timestamp;
use super::snapshots::SnapshotRef;

/// How many virtqueues an attachment offers unless told otherwise. A front-end may use fewer but never more, and QEMU
/// asks for one queue a virtual CPU by default, so this is generous: a queue that is not used costs nothing.
pub const QUEUES_DEFAULT: u16 = 8;
/// The most virtqueues that an attachment offers.
pub const QUEUES_MAX: u16 = 64;

/// The default of [`AttachmentRequest::queues`], for serde.
const fn queues_default() -> u16 {
    QUEUES_DEFAULT
}

/// What happens to the writes of a volume, by the names that VirtualBox gave these.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum VolumeType {
    /// They stay, and snapshots cover them.
    #[default]
    Normal,
    /// They are thrown away each time a virtual machine starts.
    Immutable,
    /// They stay, and snapshots leave the volume out.
    Writethrough,
    /// It takes none itself: each attachment gets a volume of its own over it.
    Multiattach,
    /// There are none: the guest may only read.
    Readonly,
}

impl VolumeType {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Normal,
        Self::Immutable,
        Self::Writethrough,
        Self::Multiattach,
        Self::Readonly,
    ];

    /// Its name, as in JSON and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::Immutable => "immutable",
            Self::Writethrough => "writethrough",
            Self::Multiattach => "multiattach",
            Self::Readonly => "readonly",
        }
    }
}

impl fmt::Display for VolumeType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for VolumeType {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name() == text)
            .ok_or("write normal, immutable, writethrough, multiattach or readonly")
    }
}

/// What a new volume starts from: a snapshot of a volume, or what a volume holds now. Written `VOLUME@SNAPSHOT` or `VOLUME`
/// on the command line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PointRef {
    /// The volume.
    pub volume: String,
    /// Its snapshot; without one, the volume as it is now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
}

impl fmt::Display for PointRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.snapshot {
            Some(snapshot) => write!(f, "{}@{snapshot}", self.volume),
            None => f.write_str(&self.volume),
        }
    }
}

impl FromStr for PointRef {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.contains('@') {
            let SnapshotRef { volume, snapshot } = text.parse()?;
            return Ok(Self {
                volume,
                snapshot: Some(snapshot),
            });
        }
        if text.is_empty() {
            return Err("write VOLUME@SNAPSHOT, or VOLUME for what it holds now");
        }
        Ok(Self {
            volume: text.to_owned(),
            snapshot: None,
        })
    }
}

/// A request for a new volume: a name and exactly one of the three sources.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeRequest {
    /// The new volume's name: letters, digits, `.`, `_` and `-`, 1 to 64 bytes, not starting with `.` or `-`.
    pub name: String,
    /// What happens to its writes.
    #[serde(default, rename = "type")]
    pub kind: VolumeType,
    /// An empty disk of this size in bytes, a multiple of 512.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
    /// The absolute path of a raw image, used in place and never written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// A snapshot to start from, or a volume, which is sealed as by a snapshot without a name; it may be in use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<PointRef>,
}

/// A change of a volume: exactly one of `type` and `size_bytes`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeChange {
    /// What happens to its writes from now on. The volume must not be in use.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<VolumeType>,
    /// The new size in bytes, a multiple of 512. A larger one also while a guest uses the volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
    /// Allow a smaller size.
    #[serde(default)]
    pub shrink: bool,
    /// Allow a smaller size even if sectors that hold data are cut off.
    #[serde(default)]
    pub force: bool,
}

/// A request for a volume with the content of a raw image, independent of the image once the job has ended.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImportRequest {
    /// The new volume's name.
    pub name: String,
    /// The absolute path of the image. It must not change until the job has ended.
    pub image: String,
    /// The job's limit in bytes a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_bytes_per_s: Option<u64>,
}

/// What began with an import: a volume that can be used at once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Import {
    /// The new volume.
    pub volume: Volume,
    /// The job that makes it independent of the image.
    pub job: super::jobs::Job,
}

/// A request to serve a volume to a front-end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AttachmentRequest {
    /// The absolute path of the vhost-user socket to listen on.
    pub socket: String,
    /// How many virtqueues to offer.
    #[serde(default = "queues_default")]
    #[schema(default = 8, minimum = 1, maximum = 64)]
    pub queues: u16,
    /// Whether the guest may only read.
    #[serde(default)]
    pub read_only: bool,
    /// Of a multiattach volume: the name of the volume that is made for this attachment; else the first free of NAME-1,
    /// NAME-2 and so on.
    #[serde(default, rename = "as", skip_serializing_if = "Option::is_none")]
    pub made: Option<String>,
}

/// How to end an attachment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct DetachQuery {
    /// Of a volume that was made for an attachment of a multiattach volume: it stays, as a normal volume of this name.
    pub keep_as: Option<String>,
}

/// What is left after an attachment has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Detached {
    /// The volume that is no longer served.
    pub detached: String,
    /// What it is now; `null` if it was made for the attachment and is gone with it.
    pub volume: Option<Volume>,
}

/// Where an attachment stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AttachmentState {
    /// Listening; no front-end is connected.
    Listening,
    /// A front-end is connected.
    Connected,
    /// Being set up or taken down by another command.
    Changing,
    /// Could not be set up; see `error`.
    Failed,
}

/// What a volume's guest has asked for since it was attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RequestCounts {
    /// Read requests.
    pub reads: u64,
    /// Write requests.
    pub writes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Discards and writes of zeroes.
    pub discards: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Requests that ended with an error.
    pub errors: u64,
}

/// How a volume is attached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Attachment {
    /// The path of the vhost-user socket, or `fd N` for one that the daemon was started with.
    pub socket: String,
    /// How many virtqueues are offered.
    pub queues: u16,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// Where it stands.
    pub state: AttachmentState,
    /// Front-ends that are connected: two while a machine migrates from one to the other.
    pub connections: u64,
    /// Virtqueues that the guest has started.
    pub rings_running: u64,
    /// Why it failed.
    pub error: Option<String>,
    /// What the guest has asked for.
    pub requests: RequestCounts,
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// What happens to its writes.
    #[serde(rename = "type")]
    pub kind: VolumeType,
    /// The multiattach volume that it was made for an attachment of.
    pub attached_from: Option<String>,
    /// The size of the disk in bytes.
    pub size_bytes: u64,
    /// Layers from the base to the active one, both counted.
    pub depth: u64,
    /// The path of the raw image at the bottom, if there is one.
    pub base: Option<String>,
    /// The layer that takes all writes.
    pub active_layer: String,
    /// Bytes that the active layer takes on the host.
    pub allocated_bytes: u64,
    /// How many snapshots it has.
    pub snapshots: u64,
    /// When it was created.
    #[schema(value_type = String, format = DateTime)]
    pub created: Timestamp,
    /// Why it takes no more writes; `null` while all is well.
    pub failure: Option<String>,
    /// Whether what it has to write waits for space on the host.
    pub no_space: bool,
    /// Bytes of its layers' data that a scrub found damaged; reads of them fail, where nothing newer hides them.
    #[serde(default)]
    pub bad_bytes: u64,
    /// How it is attached; `null` if it is not.
    pub attachment: Option<Attachment>,
}

/// What the recovery of a volume that had failed did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Recovered {
    /// The volume.
    pub volume: String,
    /// Why it had failed.
    pub cause: String,
    /// Bytes that were written again, and synced.
    pub written_bytes: u64,
    /// Bytes that the host cannot read: the guest gets errors for them until it writes there.
    pub unreadable_bytes: u64,
    /// Where these are; not more than a thousand places.
    pub unreadable: Vec<ByteRange>,
}

/// A part of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ByteRange {
    /// The first byte.
    pub offset: u64,
    /// How many bytes.
    pub bytes: u64,
}

/// All volumes of the store, by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeList {
    /// The volumes.
    pub volumes: Vec<Volume>,
}

/// What a volume takes on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Usage {
    /// The volume.
    pub volume: String,
    /// Bytes of layers that deleting the volume with its snapshots would free.
    pub exclusive_bytes: u64,
    /// Bytes of layers that others need as well.
    pub shared_bytes: u64,
    /// Bytes of the raw image at the bottom, which is no part of the store.
    pub base_bytes: u64,
}

/// What volumes take on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UsageList {
    /// The volumes, by name.
    pub volumes: Vec<Usage>,
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn a_type_has_one_name_everywhere() {
        for kind in VolumeType::ALL {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
            assert_eq!(kind.name().parse(), Ok(kind));
        }
        assert!("Normal".parse::<VolumeType>().is_err());
    }

    #[test]
    fn a_point_is_a_volume_with_or_without_a_snapshot() {
        for text in ["web", "web@s1"] {
            assert_eq!(text.parse::<PointRef>().unwrap().to_string(), text);
        }
        for text in ["", "@", "@s1", "web@"] {
            assert!(text.parse::<PointRef>().is_err(), "{text}");
        }
    }
}
