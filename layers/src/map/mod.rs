//! Which sectors a layer holds.

pub mod record;
pub mod set;
