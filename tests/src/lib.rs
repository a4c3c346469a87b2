//! Front-ends, harnesses and oracles that test stratablk from outside, through its sockets.

pub mod daemon;
pub mod ending;
pub mod lines;
pub mod machine;
