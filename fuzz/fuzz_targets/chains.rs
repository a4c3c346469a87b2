//! See `stratablk_fuzz::chains`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| stratablk_fuzz::chains::run(bytes));
