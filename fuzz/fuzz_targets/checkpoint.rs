//! See `stratablk_fuzz::checkpoint`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| stratablk_fuzz::checkpoint::run(bytes));
