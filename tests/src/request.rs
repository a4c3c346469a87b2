//! The constants and the layouts of virtio-blk requests, from the specification.

/// Reads sectors.
pub const T_IN: u32 = 0;
/// Writes sectors.
pub const T_OUT: u32 = 1;
/// A SCSI command (legacy, never offered).
pub const T_SCSI_CMD: u32 = 2;
/// Makes completed writes durable.
pub const T_FLUSH: u32 = 4;
/// Reads the name of the disk.
pub const T_GET_ID: u32 = 8;
/// Reads the wear of the medium.
pub const T_GET_LIFETIME: u32 = 10;
/// Gives sectors back.
pub const T_DISCARD: u32 = 11;
/// Makes sectors read as zeroes.
pub const T_WRITE_ZEROES: u32 = 13;
/// Erases sectors for good.
pub const T_SECURE_ERASE: u32 = 14;
/// The requests of zoned disks.
pub const T_ZONED: [u32; 7] = [15, 16, 18, 20, 22, 24, 26];

/// The request was carried out.
pub const S_OK: u8 = 0;
/// The request failed.
pub const S_IOERR: u8 = 1;
/// The device does not do such requests.
pub const S_UNSUPP: u8 = 2;

/// Feature bits of the block device and of the transport.
pub mod feature {
    #![expect(missing_docs, reason = "the names are those of the specification")]
    pub const BLK_BARRIER: u64 = 1;
    pub const BLK_SIZE_MAX: u64 = 1 << 1;
    pub const BLK_SEG_MAX: u64 = 1 << 2;
    pub const BLK_GEOMETRY: u64 = 1 << 4;
    pub const BLK_RO: u64 = 1 << 5;
    pub const BLK_BLK_SIZE: u64 = 1 << 6;
    pub const BLK_SCSI: u64 = 1 << 7;
    pub const BLK_FLUSH: u64 = 1 << 9;
    pub const BLK_TOPOLOGY: u64 = 1 << 10;
    pub const BLK_CONFIG_WCE: u64 = 1 << 11;
    pub const BLK_MQ: u64 = 1 << 12;
    pub const BLK_DISCARD: u64 = 1 << 13;
    pub const BLK_WRITE_ZEROES: u64 = 1 << 14;
    pub const BLK_LIFETIME: u64 = 1 << 15;
    pub const BLK_SECURE_ERASE: u64 = 1 << 16;
    pub const BLK_ZONED: u64 = 1 << 17;
    pub const NOTIFY_ON_EMPTY: u64 = 1 << 24;
    pub const VHOST_LOG_ALL: u64 = 1 << 26;
    pub const ANY_LAYOUT: u64 = 1 << 27;
    pub const RING_INDIRECT: u64 = 1 << 28;
    pub const RING_EVENT_IDX: u64 = 1 << 29;
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
    pub const RING_PACKED: u64 = 1 << 34;
    pub const IN_ORDER: u64 = 1 << 35;
    pub const ORDER_PLATFORM: u64 = 1 << 36;
    pub const SR_IOV: u64 = 1 << 37;
    pub const NOTIFICATION_DATA: u64 = 1 << 38;
    pub const RING_RESET: u64 = 1 << 40;
}

/// Feature bits of the vhost-user protocol.
pub mod protocol {
    #![expect(missing_docs, reason = "the names are those of the protocol document")]
    pub const MQ: u64 = 1;
    pub const LOG_SHMFD: u64 = 1 << 1;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const CONFIG: u64 = 1 << 9;
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub const RESET_DEVICE: u64 = 1 << 13;
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const DEVICE_STATE: u64 = 1 << 19;
}

/// Bytes of a request's header.
pub const HEADER_BYTES: u32 = 16;

/// The header of a request.
pub fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// The flag of a segment that asks for its space to be given back.
pub const UNMAP: u32 = 1;

/// One segment of a discard or write-zeroes request.
pub fn segment(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    bytes
}
