//! An index of shards: typed error, or names that stay in the folder.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use segattn::model::weights::index::Index;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(index) = Index::parse(bytes, Path::new("model.safetensors.index.json")) {
        for name in index.shards() {
            assert_eq!(Path::new(name).file_name(), Some(name.as_ref()));
        }
    }
});
