//! A tokenizer file: typed error, or a tokenizer whose every call returns.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use segattn::model::tokenizer::Tokenizer;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(tokenizer) = Tokenizer::parse(bytes, Path::new("tokenizer.json"))
        && let Ok(tokens) = tokenizer.encode("the segment é\u{1f389} <end>", true)
    {
        let _ = tokenizer.decode(&tokens, true);
    }
});
