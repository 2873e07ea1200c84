//! Links that lead nowhere: what they should lead to is missing, which is not the same as never having been there.

use std::os::unix::fs::symlink;

use segattn::model::chat::Chat;
use segattn::model::companions::companions;
use segattn::model::config::ModelConfig;
use segattn::model::error::{ChatError, ConfigError, FileError};
use segattn::model::lora::AdapterError;
use segattn::model::lora::folder::AdapterFolder;
use segattn::model::tokenizer::Tokenizer;

#[test]
fn links_that_lead_nowhere_are_errors_and_not_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let mut config = ModelConfig::new(300, 8, 8, 1, 1, 1).unwrap();
    // The segments that an adapter was trained with.
    symlink("nowhere", folder.join("config.json")).unwrap();
    let got = AdapterFolder::set_segments(folder, &mut config);
    assert!(
        matches!(
            got,
            Err(AdapterError::Config(ConfigError::File(
                FileError::Io { .. }
            )))
        ),
        "{got:?}"
    );
    // A template, in whose place an older one in another file would be taken.
    let older = r#"{"chat_template": "{{ messages }}"}"#;
    std::fs::write(folder.join("tokenizer_config.json"), older).unwrap();
    symlink("nowhere", folder.join("chat_template.jinja")).unwrap();
    let got = Chat::open(folder, &Tokenizer::bytes(&config)).map(drop);
    assert!(
        matches!(got, Err(ChatError::File(FileError::Io { .. }))),
        "{got:?}"
    );
    // What should go along with a conversion.
    let got = companions(folder);
    assert!(matches!(got, Err(FileError::Io { .. })), "{got:?}");
}
