//! The two files of an adapter.

use std::path::Path;
use std::sync::OnceLock;

use segattn::device::cpu::Cpu;
use segattn::model::config::{ModelConfig, WeightType};
use segattn::model::decoder::Decoder;
use segattn::model::error::WeightsError;
use segattn::model::lora::Lora;
use segattn::model::lora::folder::{
    ADAPTER_CONFIG_FILE, ADAPTER_FILE, AdapterFolder, from_json, to_json,
};
use segattn::model::session::score;
use segattn::model::weights::{Checkpoint, SaveOptions, initial, save};

use super::write;

/// An adapter over [`config`]'s model: two bytes are the length of its settings, after which come its tensors. What can
/// be opened says the same settings again when written, and makes a model over the base's weights.
pub fn adapter(bytes: &[u8], folder: &Path) {
    let Some((length, rest)) = bytes.split_first_chunk() else {
        return;
    };
    let length = usize::from(u16::from_le_bytes(*length)).min(rest.len());
    write(folder, ADAPTER_CONFIG_FILE, &rest[..length]);
    write(folder, ADAPTER_FILE, &rest[length..]);
    let base = base();
    let Ok(adapter) = AdapterFolder::open(folder, &base.config) else {
        return;
    };
    let lora = adapter.lora();
    let again = from_json(&to_json(&lora.config, None)).expect("what was read can be read again");
    let again = Lora::new(&base.config, again).expect("targets that were found");
    assert_eq!(again, *lora);
    let _ = adapter.fingerprint();
    if let Ok(model) = adapter.over(base) {
        let added = model.specs.len() - base.specs.len();
        assert_eq!(added, 2 * lora.adapters().len());
        let scored = score(&model, &[1, 2, 3][..], 1);
        assert_eq!(scored.expect("a forward pass").len(), 2);
    }
}

/// The model that adapters are for.
pub fn config() -> ModelConfig {
    ModelConfig::new(16, 16, 8, 2, 2, 1).expect("sizes that fit")
}

fn base() -> &'static Decoder<Cpu> {
    static BASE: OnceLock<Decoder<Cpu>> = OnceLock::new();
    BASE.get_or_init(|| {
        let (config, folder) = (config(), tempfile::tempdir().expect("a folder"));
        let values = |i: usize| Ok::<_, WeightsError>(initial(&config, 1).tensor(i));
        let options = SaveOptions::new(WeightType::F32);
        save(folder.path(), &config, values, options).expect("weights");
        let weights = Checkpoint::open(folder.path()).expect("weights");
        weights.load(Cpu, config, false).expect("a model")
    })
}
