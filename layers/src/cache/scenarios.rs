//! Scenarios of the frame protocol.
