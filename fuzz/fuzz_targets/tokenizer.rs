//! A tokenizer file: typed error, or a tokenizer whose every call returns.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use segattn::model::tokenizer::Tokenizer;

// Some files make the `tokenizers` library panic; `Tokenizer` turns that into its typed error. So a panic is a
// finding only if it gets out, which still ends the process: the hook that ends it at once is taken off.
fuzz_target!(init: std::panic::set_hook(Box::new(|_| ())), |bytes: &[u8]| {
    if let Ok(tokenizer) = Tokenizer::parse(bytes, Path::new("tokenizer.json"))
        && let Ok(tokens) = tokenizer.encode("the segment é\u{1f389} <end>", true)
    {
        let _ = tokenizer.decode(&tokens, true);
    }
});
