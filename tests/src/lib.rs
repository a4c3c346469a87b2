//! Tests.
pub mod load;
