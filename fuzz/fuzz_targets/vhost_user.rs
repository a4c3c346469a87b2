//! See `stratablk_fuzz::vhost_user`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| stratablk_fuzz::vhost_user::run(bytes));
