#![no_main]

#[allow(dead_code, reason = "each target uses one")]
#[path = "../formats.rs"]
mod formats;

// As in the target `tokenizer`.
libfuzzer_sys::fuzz_target!(init: std::panic::set_hook(Box::new(|_| ())), |bytes: &[u8]| {
    let folder = tempfile::tempdir().expect("a folder");
    formats::tokenizer_config(bytes, folder.path());
});
