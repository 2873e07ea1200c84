//! All formats in one program, for machines that programs are carried to: `SEGATTN_FORMAT` names the one.

#![no_main]

#[allow(dead_code, reason = "each target uses one")]
#[path = "../formats.rs"]
mod formats;

use std::path::Path;
use std::sync::OnceLock;

type Read = fn(&[u8], &Path);

static FORMAT: OnceLock<(Read, tempfile::TempDir)> = OnceLock::new();

fn begin() {
    let wanted = std::env::var("SEGATTN_FORMAT").expect("SEGATTN_FORMAT, the name of a format");
    let format = formats::ALL.into_iter().find(|(name, _)| *name == wanted);
    let (name, read) = format.expect("SEGATTN_FORMAT, the name of a format");
    // As in the target `tokenizer`.
    if name == "tokenizer" || name == "tokenizer_config" {
        std::panic::set_hook(Box::new(|_| ()));
    }
    let _ = FORMAT.set((read, tempfile::tempdir().expect("a folder")));
}

libfuzzer_sys::fuzz_target!(init: begin(), |bytes: &[u8]| {
    let (read, folder) = FORMAT.get().expect("begun");
    read(bytes, folder.path());
});
