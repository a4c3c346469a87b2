//! The daemon: a vhost-user-blk back-end over layered disks, and its control socket.
//!
//! ```text
//! guest ring -> virtio (ring, chain, request) -> worker -> layers::volume      data plane
//! front-end socket -> attach -> vhost (session, handler) -> worker commands    device set-up
//! ```

//pub mod attach;
pub mod vhost;
pub mod virtio;
pub mod worker;
