//! See `stratablk_fuzz::map_journal`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| stratablk_fuzz::map_journal::run(bytes));
