//! The feature bits that the device offers. No bit is offered that does not work.

use vhost::vhost_user::VhostUserProtocolFeatures;
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};

/// The front-end wants a dirty log kept.
pub const LOG_ALL: u64 = 1 << 26;
/// The front-end speaks the messages beyond the oldest ones; rings start disabled.
pub const PROTOCOL_FEATURES: u64 = 1 << 30;
/// Notifications are suppressed by index instead of by flag.
pub const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
/// Descriptors may name a table of descriptors.
pub const INDIRECT: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// The driver sends flushes.
pub const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
/// The driver may switch write-back off and on.
pub const CONFIG_WCE: u64 = 1 << VIRTIO_BLK_F_CONFIG_WCE;

/// The virtio features of a device, those of the transport included.
pub fn offered(read_only: bool) -> u64 {
    let ring = (1 << VIRTIO_F_VERSION_1) | INDIRECT | EVENT_IDX | LOG_ALL | PROTOCOL_FEATURES;
    let block = (1 << VIRTIO_BLK_F_SEG_MAX)
        | (1 << VIRTIO_BLK_F_BLK_SIZE)
        | (1 << VIRTIO_BLK_F_TOPOLOGY)
        | (1 << VIRTIO_BLK_F_MQ)
        | FLUSH;
    // What changes the disk is not offered for a disk that may not be changed.
    let writing = if read_only {
        1 << VIRTIO_BLK_F_RO
    } else {
        CONFIG_WCE | (1 << VIRTIO_BLK_F_DISCARD) | (1 << VIRTIO_BLK_F_WRITE_ZEROES)
    };
    ring | block | writing
}

/// The protocol features that the device offers.
pub fn protocol() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::DEVICE_STATE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_offered_that_is_not_there() {
        // NOTIFY_ON_EMPTY 24, PACKED 34, IN_ORDER 35, RING_RESET 40; BARRIER 0, SIZE_MAX 1, GEOMETRY 4, SCSI 7,
        // LIFETIME 15, SECURE_ERASE 16, ZONED 17.
        for bit in [24, 34, 35, 40, 0, 1, 4, 7, 15, 16, 17] {
            assert_eq!(offered(false) & (1 << bit), 0, "bit {bit}");
            assert_eq!(offered(true) & (1 << bit), 0, "bit {bit}");
        }
        assert_eq!(offered(false) & CONFIG_WCE, CONFIG_WCE);
        assert_ne!(offered(false) & FLUSH, 0, "CONFIG_WCE needs FLUSH");
        assert_eq!(offered(true) & CONFIG_WCE, 0);
        assert_eq!(offered(false) & (1 << VIRTIO_BLK_F_RO), 0);
    }
}
