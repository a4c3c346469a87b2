//! See `stratablk_fuzz::inflight`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| stratablk_fuzz::inflight::run(bytes));
