//! See `stratablk_fuzz::sums`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| stratablk_fuzz::sums::run(bytes));
