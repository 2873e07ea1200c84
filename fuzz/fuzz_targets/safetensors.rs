//! A weight file's header: typed error, or tensors that lie within the file.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use segattn::model::weights::header::Header;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(header) = Header::parse(bytes, Path::new("model.safetensors")) {
        for (_, tensor) in header.tensors {
            assert!(tensor.start + tensor.bytes <= bytes.len() as u64);
        }
    }
});
