#![no_main]

#[allow(dead_code, reason = "each target uses one")]
#[path = "../formats.rs"]
mod formats;

// Some files make the `tokenizers` library panic; `Tokenizer` turns that into its typed error. So a panic is a
// finding only if it gets out, which still ends the process: the hook that ends it at once is taken off.
libfuzzer_sys::fuzz_target!(init: std::panic::set_hook(Box::new(|_| ())), |bytes: &[u8]| {
    let folder = tempfile::tempdir().expect("a folder");
    formats::tokenizer(bytes, folder.path());
});
