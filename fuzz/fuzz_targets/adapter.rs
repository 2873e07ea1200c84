#![no_main]

#[allow(dead_code, reason = "each target uses one")]
#[path = "../formats.rs"]
mod formats;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let folder = tempfile::tempdir().expect("a folder");
    formats::adapter::adapter(bytes, folder.path());
});
