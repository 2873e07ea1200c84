//! A model's configuration: typed error, or one that is written and read back as it is.
#![no_main]

use libfuzzer_sys::fuzz_target;
use segattn::model::config::ModelConfig;
use segattn::model::parameters::parameters;

fuzz_target!(|bytes: &[u8]| {
    let Ok(value) = serde_json::from_slice(bytes) else {
        return;
    };
    if let Ok(config) = ModelConfig::from_json(value) {
        let again = ModelConfig::from_json(config.to_json()).expect("what was read can be read again");
        assert_eq!(parameters(&again), parameters(&config));
    }
});
