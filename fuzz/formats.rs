//! What is done with the bytes of each format that comes from outside: a typed error, or something that holds what it
//! promises. The fuzz targets call these with whatever the fuzzer finds, `tests/formats.rs` with random changes of good
//! files.

use std::path::Path;

use segattn::model::config::{CONFIG_FILE, ModelConfig};
use segattn::model::parameters::parameters;
use segattn::model::session_file::StateFile;
use segattn::model::tokenizer::{
    GENERATION_FILE, GenerationSettings, TOKENIZER_FILE, Tokenizer, end_ids,
};
use segattn::model::weights::header::Header;
use segattn::model::weights::index::Index;
use segattn::train::checkpoint;
use segattn::train::config::Config;

/// A format's name, and what is done with its bytes; `folder` is an empty one.
pub type Format = (&'static str, fn(&[u8], &Path));

pub const ALL: [Format; 8] = [
    ("safetensors", safetensors),
    ("index", index),
    ("config", config),
    ("tokenizer", tokenizer),
    ("generation", generation),
    ("state_file", state_file),
    ("manifest", manifest),
    ("run", run),
];

/// A weight file's header: its tensors lie within the file.
pub fn safetensors(bytes: &[u8], _: &Path) {
    if let Ok(header) = Header::parse(bytes, Path::new("model.safetensors")) {
        for (_, tensor) in header.tensors {
            assert!(tensor.start + tensor.bytes <= bytes.len() as u64);
        }
    }
}

/// An index of shards: its names stay in the folder.
pub fn index(bytes: &[u8], _: &Path) {
    if let Ok(index) = Index::parse(bytes, Path::new("model.safetensors.index.json")) {
        for name in index.shards() {
            assert_eq!(Path::new(name).file_name(), Some(name.as_ref()));
        }
    }
}

/// A model's configuration: written, it is read back as it is.
pub fn config(bytes: &[u8], folder: &Path) {
    write(folder, CONFIG_FILE, bytes);
    if let Ok(config) = ModelConfig::load(folder) {
        let again =
            ModelConfig::from_json(config.to_json()).expect("what was read can be read again");
        assert_eq!(parameters(&again), parameters(&config));
    }
}

/// A tokenizer: every call of it returns.
pub fn tokenizer(bytes: &[u8], _: &Path) {
    if let Ok(tokenizer) = Tokenizer::parse(bytes, Path::new(TOKENIZER_FILE))
        && let Ok(tokens) = tokenizer.encode("the segment é\u{1f389} <end>", true)
    {
        let _ = tokenizer.decode(&tokens, true);
    }
}

/// Settings of generation: in their ranges.
pub fn generation(bytes: &[u8], folder: &Path) {
    write(folder, GENERATION_FILE, bytes);
    let config = ModelConfig::new(8, 8, 8, 1, 1, 1).expect("sizes that fit");
    let _ = end_ids(folder, &config);
    if let Ok(settings) = GenerationSettings::load(folder) {
        assert!(settings.top_p.is_none_or(|p| p > 0.0 && p <= 1.0));
        assert!(settings.temperature.is_none_or(|t| t >= 0.0));
    }
}

/// A saved session: as many tokens as it says.
pub fn state_file(bytes: &[u8], folder: &Path) {
    write(folder, "state", bytes);
    if let Ok(mut file) = StateFile::open(&folder.join("state")) {
        for (i, position) in file.positions().to_vec().into_iter().enumerate() {
            if let Ok(tokens) = file.tokens(i) {
                assert!(tokens.is_empty() || tokens.len() == position);
            }
        }
    }
}

/// A checkpoint's list of files: no checkpoint without them.
pub fn manifest(bytes: &[u8], folder: &Path) {
    write(folder, "manifest.json", bytes);
    assert!(checkpoint::load(folder).is_err());
}

/// A run's configuration: written, it is read back as it is.
pub fn run(bytes: &[u8], _: &Path) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    if let Ok(config) = Config::parse(text, &[])
        && let Ok(written) = config.to_toml()
    {
        let again = Config::parse(&written, &[]).expect("what was written can be read");
        assert_eq!(again, config);
    }
}

fn write(folder: &Path, name: &str, bytes: &[u8]) {
    std::fs::write(folder.join(name), bytes).expect("an empty folder takes a file");
}
