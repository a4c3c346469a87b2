//! See `stratablk_fuzz::catalog`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| stratablk_fuzz::catalog::run(bytes));
