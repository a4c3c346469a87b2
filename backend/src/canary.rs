//! The switch that breaks checks on purpose, so that the fuzzer can be seen to find it. The feature `canary` puts it in, the
//! environment of the process turns it on. Constant and off without the feature.

/// Whether checks are broken: if `STRATABLK_CANARY` is set.
#[cfg(feature = "canary")]
pub fn is_on() -> bool {
    static ON: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *ON.get_or_init(|| std::env::var_os("STRATABLK_CANARY").is_some())
}

/// Whether checks are broken: never.
#[cfg(not(feature = "canary"))]
pub(crate) const fn is_on() -> bool {
    false
}
