//! The alarms of the oracle ring.
