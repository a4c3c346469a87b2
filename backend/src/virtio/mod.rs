//! The virtio side: from a ring in guest memory to a request, and back.
//!
//! ```text
//! ring (heads) -> chain (segments in this process) -> request (an operation on the disk) -> slot (until it completes)
//! ```
//!
//! A ring writes down which requests it has taken and not returned ([`tracker`]), for the process that serves it next.
//!
//! Everything read here was written by a guest that may be hostile. Each field is read once, lengths are summed in 64
//! bits, no loop runs longer than a ring has entries, and an address outside guest memory is an answer, not a fault.
//! What cannot be answered ([`ring::Broken`]) stops that ring and nothing else.

pub mod chain;
pub mod complete;
pub mod request;
pub mod ring;
pub mod store;
pub mod tracker;

#[cfg(test)]
pub(crate) mod test_guest;
