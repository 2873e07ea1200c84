//! What goes along with a model.

use segattn::model::companions::companions;

#[test]
fn everything_but_weights_and_the_state_of_a_run_goes_along() {
    let folder = tempfile::tempdir().unwrap();
    let gone = [
        "config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "optimizer.safetensors",
        "state.json",
        "run.toml",
        "manifest.json",
        ".gitattributes",
    ];
    let kept = [
        "LICENSE",
        "README.md",
        "additional_chat_templates/tools.jinja",
        "chat_template.jinja",
        "generation_config.json",
        "of_tomorrow",
        "tokenizer.json",
    ];
    std::fs::create_dir(folder.path().join("additional_chat_templates")).unwrap();
    for name in gone.iter().chain(&kept) {
        std::fs::write(folder.path().join(name), name).unwrap();
    }
    std::fs::create_dir(folder.path().join("onnx")).unwrap();
    let found = companions(folder.path()).unwrap();
    let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, kept);
    assert!(
        found
            .iter()
            .all(|(name, content)| name.as_bytes() == content)
    );
}
