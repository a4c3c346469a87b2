//! The first 4096 bytes of a map file.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use uuid::Uuid;

use super::{Encoder, FormatError, field, field_u32, field_u64};
use crate::catalog::VolumeKind;
use crate::limits::{BASE_PATH_BYTES_MAX, DISK_SECTORS_MAX, DISK_SECTORS_MIN, NAME_BYTES_MAX};
use crate::units::{CLUSTER_SECTORS, LayerId, SECTOR_BYTES, Sector, StoreId};

/// Bytes of a header.
pub const HEADER_BYTES: usize = 4096;
/// The version that this code writes and reads.
pub const VERSION: u32 = 1;
/// The first bytes of every map.
pub const MAGIC: [u8; 8] = *b"STRATMAP";

/// Incompatible features that this code knows: none yet.
const INCOMPATIBLE_KNOWN: u64 = 0;
/// The compatible feature that the header says the type of the volume.
const COMPATIBLE_VOLUME_KIND: u64 = 1;

// Where the fields lie, as in FORMAT.md.
const AT_VERSION: usize = 8;
const AT_CRC: usize = 12;
const AT_INCOMPATIBLE: usize = 16;
const AT_COMPATIBLE: usize = 24;
const AT_STORE: usize = 32;
const AT_LAYER: usize = 48;
const AT_PARENT: usize = 64;
const AT_GROUP: usize = 80;
const AT_SIZE: usize = 96;
const AT_CREATED: usize = 104;
const AT_SNAPSHOT_TAKEN: usize = 112;
const AT_INCARNATION: usize = 120;
const AT_KIND: usize = 128;
const AT_STATE: usize = 129;
const AT_VOLUME_LEN: usize = 130;
const AT_SNAPSHOT_LEN: usize = 131;
const AT_PATH_LEN: usize = 132;
const AT_PADDING: usize = 134;
const AT_BASE_LEN: usize = 136;
const AT_BASE_MTIME: usize = 144;
const AT_CHECKPOINT: usize = 152;
const AT_DATA_LEN: usize = 160;
const AT_ZERO_LEN: usize = 168;
const AT_DATA_CRC: usize = 176;
const AT_ZERO_CRC: usize = 180;
const AT_JOURNAL: usize = 184;
const AT_VOLUME: usize = 192;
const AT_SNAPSHOT: usize = 256;
const AT_VOLUME_KIND: usize = 320;
const AT_PATH: usize = 1024;

const _: () = assert!(AT_VOLUME + NAME_BYTES_MAX == AT_SNAPSHOT);
const _: () = assert!(AT_SNAPSHOT + NAME_BYTES_MAX == AT_VOLUME_KIND);
const _: () = assert!(AT_VOLUME_KIND < AT_PATH);
const _: () = assert!(AT_PATH + BASE_PATH_BYTES_MAX == HEADER_BYTES);
const _: () =
    assert!(NAME_BYTES_MAX <= u8::MAX as usize && BASE_PATH_BYTES_MAX <= u16::MAX as usize);

/// A raw image that serves as a base in place, as it was when the store first saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawBase {
    /// Its absolute path.
    pub path: PathBuf,
    /// Its length in bytes: a multiple of 512.
    pub len: u64,
    /// When it was last modified: nanoseconds since 1970.
    pub mtime_ns: i64,
}

/// Where a layer's data lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LayerKind {
    /// In its own data file, for the sectors that its map names.
    Differencing,
    /// In a raw image that holds every sector.
    RawBase(RawBase),
}

/// Whether a map may still grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapState {
    /// Groups may follow in the journal.
    Active,
    /// The checkpoint is all there is.
    Sealed,
}

/// What a map says of its layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapHeader {
    /// The store that the layer belongs to.
    pub store: StoreId,
    /// The layer.
    pub layer: LayerId,
    /// The layer below.
    pub parent: Option<LayerId>,
    /// The size of the disk.
    pub size: Sector,
    /// Where the data lies.
    pub kind: LayerKind,
    /// Whether the map may still grow.
    pub state: MapState,
    /// The volume that the layer belonged to when the map was written; empty: none.
    pub volume: String,
    /// The type of that volume, of an active layer; not known or not said: normal.
    pub volume_kind: VolumeKind,
    /// The snapshot that names the layer; empty: none.
    pub snapshot: String,
    /// Equal for all snapshots of one instant; nil without a snapshot.
    pub group: Uuid,
    /// When the layer was created: nanoseconds since 1970.
    pub created_ns: u64,
    /// The instant of the snapshot: nanoseconds since 1970; 0 without a snapshot.
    pub snapshot_ns: u64,
}

impl MapHeader {
    /// The first sector that no map of this size may mention: the size, rounded up to a cluster.
    pub fn sectors_end(&self) -> u64 {
        self.size.0.next_multiple_of(CLUSTER_SECTORS)
    }

    /// Checks everything that the specification demands of the values. Both directions pass through here, so nothing
    /// is ever written that would be refused when read.
    ///
    /// # Errors
    /// The offset of the field in the header, and what is wrong with it.
    fn validate(&self) -> Result<(), (usize, String)> {
        if self.layer.0.is_nil() {
            return Err((AT_LAYER, "the layer's uuid is nil".into()));
        }
        if self.parent.is_some_and(|parent| parent.0.is_nil()) {
            return Err((AT_PARENT, "the parent's uuid is nil".into()));
        }
        if self.parent == Some(self.layer) {
            return Err((AT_PARENT, "the layer is its own parent".into()));
        }
        if !(DISK_SECTORS_MIN..=DISK_SECTORS_MAX).contains(&self.size.0) {
            return Err((
                AT_SIZE,
                format!(
                    "a size of {} sectors (possible: {DISK_SECTORS_MIN} to {DISK_SECTORS_MAX})",
                    self.size
                ),
            ));
        }
        for (name, at) in [(&self.volume, AT_VOLUME), (&self.snapshot, AT_SNAPSHOT)] {
            if name.len() > NAME_BYTES_MAX {
                return Err((
                    at,
                    format!(
                        "a name of {} bytes (possible: {NAME_BYTES_MAX})",
                        name.len()
                    ),
                ));
            }
            if name.contains('\0') {
                return Err((at, "a name with a zero byte".into()));
            }
        }
        if let LayerKind::RawBase(base) = &self.kind {
            let path = base.path.as_os_str().as_bytes();
            if path.len() > BASE_PATH_BYTES_MAX {
                return Err((
                    AT_PATH,
                    format!(
                        "a base path of {} bytes (possible: {BASE_PATH_BYTES_MAX})",
                        path.len()
                    ),
                ));
            }
            if !base.path.is_absolute() || path.contains(&0) {
                return Err((
                    AT_PATH,
                    "the base path is not absolute or has a zero byte".into(),
                ));
            }
            if self.size.bytes() != Some(base.len) {
                return Err((
                    AT_BASE_LEN,
                    format!(
                        "a base of {} bytes for a disk of {} sectors",
                        base.len, self.size
                    ),
                ));
            }
            if self.state != MapState::Sealed {
                return Err((AT_STATE, "a raw base that is not sealed".into()));
            }
            if self.parent.is_some() {
                return Err((AT_PARENT, "a raw base with a parent".into()));
            }
        }
        Ok(())
    }
}

/// Where the checkpoint lies and how it is recognised. Lengths are known to add up without overflow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckpointPlace {
    /// Bytes of the data bitmap.
    pub(super) data_len: u64,
    /// Bytes of the zero bitmap.
    pub(super) zero_len: u64,
    /// CRC of the data bitmap.
    pub(super) data_crc: u32,
    /// CRC of the zero bitmap.
    pub(super) zero_crc: u32,
}

impl CheckpointPlace {
    /// The place of bitmaps of these lengths, or `None` if no file can hold them.
    fn new(data_len: u64, zero_len: u64, data_crc: u32, zero_crc: u32) -> Option<Self> {
        data_len
            .checked_add(zero_len)
            .filter(|len| *len <= u64::MAX / 4)
            .map(|_| Self {
                data_len,
                zero_len,
                data_crc,
                zero_crc,
            })
    }

    /// The place of these bitmaps.
    pub(super) fn of(data: &[u8], zero: &[u8]) -> Self {
        Self {
            data_len: data.len() as u64,
            zero_len: zero.len() as u64,
            data_crc: crc32c::crc32c(data),
            zero_crc: crc32c::crc32c(zero),
        }
    }

    /// The checkpoint's first byte in the file.
    pub fn offset(&self) -> u64 {
        HEADER_BYTES as u64
    }

    /// The first byte after the bitmaps.
    fn bitmaps_end(&self) -> u64 {
        self.offset() + self.data_len + self.zero_len
    }

    /// The first byte after the checkpoint and its padding, as far as a file has to hold it.
    pub fn end(&self) -> u64 {
        self.journal_offset()
    }

    /// The journal's first byte in the file.
    pub fn journal_offset(&self) -> u64 {
        self.bitmaps_end().next_multiple_of(SECTOR_BYTES)
    }
}

/// A header that was verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it says of the layer.
    pub map: MapHeader,
    /// Which of the files that were this layer's map this is: 1 for the first.
    pub incarnation: u64,
    /// Where the checkpoint lies.
    pub checkpoint: CheckpointPlace,
}

impl Header {
    /// The header's 4096 bytes.
    ///
    /// # Errors
    /// What in the values cannot be written.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        let map = &self.map;
        map.validate()
            .map_err(|(at, what)| FormatError::corrupt(at as u64, what))?;
        let (kind, base) = match &map.kind {
            LayerKind::Differencing => (1u8, None),
            LayerKind::RawBase(base) => (2, Some(base)),
        };
        let state = match map.state {
            MapState::Active => 1u8,
            MapState::Sealed => 2,
        };
        let path = base.map_or(&[][..], |base| base.path.as_os_str().as_bytes());
        let short = |len: usize| {
            u8::try_from(len).map_err(|_| FormatError::corrupt(AT_VOLUME_LEN as u64, "length"))
        };
        let path_len = u16::try_from(path.len())
            .map_err(|_| FormatError::corrupt(AT_PATH_LEN as u64, "length"))?;
        let place = &self.checkpoint;

        let mut out = Encoder(Vec::with_capacity(HEADER_BYTES));
        out.put(0, &MAGIC);
        out.put(AT_VERSION, &VERSION.to_le_bytes());
        out.put(AT_CRC, &[0; 4]);
        out.put(AT_INCOMPATIBLE, &0u64.to_le_bytes());
        let kind_byte = volume_kind_byte(map.volume_kind);
        let compatible = if kind_byte == 0 {
            0
        } else {
            COMPATIBLE_VOLUME_KIND
        };
        out.put(AT_COMPATIBLE, &compatible.to_le_bytes());
        out.put(AT_STORE, map.store.0.as_bytes());
        out.put(AT_LAYER, map.layer.0.as_bytes());
        out.put(
            AT_PARENT,
            map.parent.map_or(Uuid::nil(), |parent| parent.0).as_bytes(),
        );
        out.put(AT_GROUP, map.group.as_bytes());
        out.put(AT_SIZE, &map.size.0.to_le_bytes());
        out.put(AT_CREATED, &map.created_ns.to_le_bytes());
        out.put(AT_SNAPSHOT_TAKEN, &map.snapshot_ns.to_le_bytes());
        out.put(AT_INCARNATION, &self.incarnation.to_le_bytes());
        out.put(AT_KIND, &[kind]);
        out.put(AT_STATE, &[state]);
        out.put(AT_VOLUME_LEN, &[short(map.volume.len())?]);
        out.put(AT_SNAPSHOT_LEN, &[short(map.snapshot.len())?]);
        out.put(AT_PATH_LEN, &path_len.to_le_bytes());
        out.put(AT_BASE_LEN, &base.map_or(0, |base| base.len).to_le_bytes());
        out.put(
            AT_BASE_MTIME,
            &base.map_or(0, |base| base.mtime_ns).to_le_bytes(),
        );
        out.put(AT_CHECKPOINT, &place.offset().to_le_bytes());
        out.put(AT_DATA_LEN, &place.data_len.to_le_bytes());
        out.put(AT_ZERO_LEN, &place.zero_len.to_le_bytes());
        out.put(AT_DATA_CRC, &place.data_crc.to_le_bytes());
        out.put(AT_ZERO_CRC, &place.zero_crc.to_le_bytes());
        out.put(AT_JOURNAL, &place.journal_offset().to_le_bytes());
        out.put(AT_VOLUME, map.volume.as_bytes());
        out.put(AT_SNAPSHOT, map.snapshot.as_bytes());
        out.put(AT_VOLUME_KIND, &[kind_byte]);
        out.put(AT_PATH, path);
        let mut bytes = out.finish(HEADER_BYTES);
        let crc = header_crc(&bytes)?;
        if let Some(place) = bytes.get_mut(AT_CRC..AT_INCOMPATIBLE) {
            place.copy_from_slice(&crc.to_le_bytes());
        }
        Ok(bytes)
    }

    /// Decodes and verifies the header at the start of `bytes`; what follows it is not looked at.
    ///
    /// # Errors
    /// `Unsupported` for another version or unknown incompatible features; `Corrupt` for everything else.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let bytes: &[u8; HEADER_BYTES] = bytes.first_chunk().ok_or_else(|| {
            FormatError::corrupt(
                bytes.len() as u64,
                format!("the file ends inside of its header of {HEADER_BYTES} bytes"),
            )
        })?;
        let magic: [u8; 8] = field(bytes, 0)?;
        if magic != MAGIC {
            return Err(FormatError::corrupt(
                0,
                format!("not a map: magic {:?}", magic.escape_ascii().to_string()),
            ));
        }
        let (stored, computed) = (field_u32(bytes, AT_CRC)?, header_crc(bytes)?);
        if stored != computed {
            return Err(FormatError::corrupt(
                AT_CRC as u64,
                format!("the header's checksum is {stored:#010x}, its bytes have {computed:#010x}"),
            ));
        }
        let version = field_u32(bytes, AT_VERSION)?;
        if version != VERSION {
            return Err(FormatError::Unsupported {
                offset: AT_VERSION as u64,
                what: format!("map version {version}; this one knows version {VERSION}"),
            });
        }
        let unknown = field_u64(bytes, AT_INCOMPATIBLE)? & !INCOMPATIBLE_KNOWN;
        if unknown != 0 {
            return Err(FormatError::Unsupported {
                offset: AT_INCOMPATIBLE as u64,
                what: format!("unknown incompatible features {unknown:#x}"),
            });
        }
        Self::decode_fields(bytes)
    }

    /// The fields of a header whose checksum and version are right. A checksum says that the bytes are those that
    /// were written, not that whoever wrote them was sane; so every value is checked.
    fn decode_fields(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FormatError> {
        let bad = |at: usize, what: String| FormatError::corrupt(at as u64, what);
        let uuid = |at| field(bytes, at).map(Uuid::from_bytes);
        let parent = uuid(AT_PARENT)?;
        let path_len = usize::from(u16::from_le_bytes(field(bytes, AT_PATH_LEN)?));
        let path = padded(bytes, AT_PATH, BASE_PATH_BYTES_MAX, path_len)?;
        let (base_len, base_mtime) = (
            field_u64(bytes, AT_BASE_LEN)?,
            i64::from_le_bytes(field(bytes, AT_BASE_MTIME)?),
        );
        let place = CheckpointPlace::new(
            field_u64(bytes, AT_DATA_LEN)?,
            field_u64(bytes, AT_ZERO_LEN)?,
            field_u32(bytes, AT_DATA_CRC)?,
            field_u32(bytes, AT_ZERO_CRC)?,
        )
        .ok_or_else(|| bad(AT_DATA_LEN, "a checkpoint longer than any file".into()))?;

        let kind = match field::<1>(bytes, AT_KIND)? {
            [1] => {
                if path_len != 0 || base_len != 0 || base_mtime != 0 {
                    return Err(bad(AT_BASE_LEN, "a base in a differencing layer".into()));
                }
                LayerKind::Differencing
            }
            [2] => {
                if place != CheckpointPlace::of(&[], &[]) {
                    return Err(bad(AT_DATA_LEN, "a checkpoint in a raw base".into()));
                }
                LayerKind::RawBase(RawBase {
                    path: PathBuf::from(OsStr::from_bytes(path)),
                    len: base_len,
                    mtime_ns: base_mtime,
                })
            }
            [kind] => return Err(bad(AT_KIND, format!("kind {kind}"))),
        };
        let state = match field::<1>(bytes, AT_STATE)? {
            [1] => MapState::Active,
            [2] => MapState::Sealed,
            [state] => return Err(bad(AT_STATE, format!("state {state}"))),
        };
        if field::<2>(bytes, AT_PADDING)? != [0; 2] {
            return Err(bad(AT_PADDING, "padding that is not zero".into()));
        }
        let offset = field_u64(bytes, AT_CHECKPOINT)?;
        if offset != place.offset() {
            return Err(bad(AT_CHECKPOINT, format!("checkpoint offset {offset}")));
        }
        let offset = field_u64(bytes, AT_JOURNAL)?;
        if offset != place.journal_offset() {
            return Err(bad(
                AT_JOURNAL,
                format!(
                    "journal offset {offset}; the checkpoint ends at {}",
                    place.journal_offset()
                ),
            ));
        }
        let incarnation = field_u64(bytes, AT_INCARNATION)?;
        if incarnation == 0 {
            return Err(bad(AT_INCARNATION, "incarnation 0".into()));
        }
        let map = MapHeader {
            store: StoreId(uuid(AT_STORE)?),
            layer: LayerId(uuid(AT_LAYER)?),
            parent: (!parent.is_nil()).then_some(LayerId(parent)),
            size: Sector(field_u64(bytes, AT_SIZE)?),
            kind,
            state,
            volume: name(bytes, AT_VOLUME_LEN, AT_VOLUME)?,
            volume_kind: volume_kind(bytes)?,
            snapshot: name(bytes, AT_SNAPSHOT_LEN, AT_SNAPSHOT)?,
            group: uuid(AT_GROUP)?,
            created_ns: field_u64(bytes, AT_CREATED)?,
            snapshot_ns: field_u64(bytes, AT_SNAPSHOT_TAKEN)?,
        };
        map.validate().map_err(|(at, what)| bad(at, what))?;
        Ok(Self {
            map,
            incarnation,
            checkpoint: place,
        })
    }
}

/// How the type of a volume is written. Normal volumes are written as before there were others.
fn volume_kind_byte(kind: VolumeKind) -> u8 {
    match kind {
        VolumeKind::Normal => 0,
        VolumeKind::Immutable => 1,
        VolumeKind::Writethrough => 2,
        VolumeKind::Multiattach => 3,
        VolumeKind::Readonly => 4,
    }
}

/// The type of the volume, if the header says one that this code knows.
fn volume_kind(bytes: &[u8; HEADER_BYTES]) -> Result<VolumeKind, FormatError> {
    if field_u64(bytes, AT_COMPATIBLE)? & COMPATIBLE_VOLUME_KIND == 0 {
        return Ok(VolumeKind::Normal);
    }
    let [byte] = field(bytes, AT_VOLUME_KIND)?;
    let known = [
        VolumeKind::Immutable,
        VolumeKind::Writethrough,
        VolumeKind::Multiattach,
        VolumeKind::Readonly,
    ];
    let kind = known
        .into_iter()
        .find(|kind| volume_kind_byte(*kind) == byte);
    Ok(kind.unwrap_or_default())
}

/// The CRC of a header, its own field taken as zeroes.
fn header_crc(bytes: &[u8]) -> Result<u32, FormatError> {
    let before = bytes.get(..AT_CRC);
    let after = bytes.get(AT_INCOMPATIBLE..HEADER_BYTES);
    let (Some(before), Some(after)) = (before, after) else {
        return Err(FormatError::corrupt(
            bytes.len() as u64,
            "the file ends inside of its header",
        ));
    };
    let crc = crc32c::crc32c_append(crc32c::crc32c(before), &[0; AT_INCOMPATIBLE - AT_CRC]);
    Ok(crc32c::crc32c_append(crc, after))
}

/// The first `len` bytes of a field of `room` bytes; the rest must be zeroes.
fn padded(bytes: &[u8], at: usize, room: usize, len: usize) -> Result<&[u8], FormatError> {
    let (used, rest) = bytes
        .get(at..)
        .and_then(|field| field.get(..room))
        .and_then(|field| field.split_at_checked(len))
        .ok_or_else(|| {
            FormatError::corrupt(
                at as u64,
                format!("a length of {len} in a field of {room} bytes"),
            )
        })?;
    if rest.iter().any(|byte| *byte != 0) {
        return Err(FormatError::corrupt(
            at as u64,
            "bytes after the end of a field",
        ));
    }
    Ok(used)
}

/// A name with its length elsewhere.
fn name(bytes: &[u8], at_len: usize, at: usize) -> Result<String, FormatError> {
    let [len] = field(bytes, at_len)?;
    let name = padded(bytes, at, NAME_BYTES_MAX, usize::from(len))?;
    std::str::from_utf8(name)
        .map(str::to_owned)
        .map_err(|error| {
            FormatError::corrupt(at as u64, format!("a name that is not UTF-8: {error}"))
        })
}
