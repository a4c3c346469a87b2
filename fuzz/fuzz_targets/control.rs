//! See `stratablk_fuzz::control`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| stratablk_fuzz::control::run(bytes));
