//! Adapters by the command line: train, resume, score, generate, merge.

use std::path::Path;

use crate::cli_model::{config, fails, json, printed, save, tokens};
use serde_json::json;

/// A model in `base`, and a text.
fn prepare(folder: &Path) {
    std::fs::create_dir(folder.join("base")).unwrap();
    save(&folder.join("base"), &config());
    std::fs::write(
        folder.join("text.txt"),
        "the past of a segment and its tail; ".repeat(60),
    )
    .unwrap();
    std::fs::write(folder.join("base/notes.txt"), "of the base").unwrap();
    let ids = json!({"tokens": tokens(3, 150), "breaks": [70]});
    std::fs::write(folder.join("ids.json"), ids.to_string()).unwrap();
}

const TRAIN: [&str; 24] = [
    "train",
    "--data.train",
    "text.txt",
    "--model.folder",
    "base",
    "--lora.r",
    "4",
    "--lora.alpha",
    "8.0",
    "--lora.targets",
    "q_proj,v_proj,down_proj",
    "--training.batch",
    "2",
    "--training.sequence-len",
    "96",
    "--schedule.warmup-steps",
    "0",
    "--schedule.lr",
    "1e-2",
    "--schedule.kind",
    "constant",
    "--model.segment.segment-len",
    "32",
    "-q",
];

fn train(folder: &Path, run: &str, steps: &str) {
    let more = ["--training.output", run, "--training.steps", steps];
    printed(folder, &[&TRAIN[..], &more].concat());
}

#[test]
fn adapters_are_trained_resumed_scored_generated_from_and_merged() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    prepare(folder);
    train(folder, "whole", "4");
    train(folder, "run", "2");
    let before = "run/checkpoints/step-0000000002";
    assert!(!folder.join(before).join("model.safetensors").exists());
    printed(folder, &["resume", "run", "--training.steps", "4", "-q"]);
    let at =
        |run: &str, file: &str| folder.join(format!("{run}/checkpoints/step-0000000004/{file}"));
    for file in ["adapter_model.safetensors", "optimizer.safetensors"] {
        let bytes = ["whole", "run"].map(|run| std::fs::read(at(run, file)).unwrap());
        assert!(bytes[0] == bytes[1], "{file}: other bits after resuming");
    }
    let settings = json(&at("run", "adapter_config.json"));
    assert_eq!(
        settings["target_modules"],
        json!(["q_proj", "v_proj", "down_proj"])
    );
    let adapter = "run/checkpoints/step-0000000004";
    // Segments are those that the adapters were trained with, not those of the base model.
    let score = |more: &[&str], out: &str| {
        let args = ["score", "base", "--tokens", "ids.json", "-o", out, "-q"];
        printed(folder, &[&args[..], more].concat());
        json(&folder.join(out))["logprobs"].clone()
    };
    let (plain, adapted) = (
        score(&[], "plain"),
        score(&["--adapter", adapter], "adapted"),
    );
    assert_ne!(plain, adapted);
    assert_ne!(
        score(&["--adapter", adapter, "--segment-len", "64"], "other"),
        adapted
    );
    let args = [
        "merge-lora",
        "base",
        adapter,
        "-o",
        "merged",
        "--dtype",
        "f32",
        "-q",
    ];
    printed(folder, &args);
    // A folder that holds weights is left as it is.
    let notes = folder.join("merged/notes.txt");
    assert_eq!(std::fs::read(&notes).unwrap(), b"of the base");
    std::fs::write(&notes, "its own").unwrap();
    fails(folder, &args, "merged");
    assert_eq!(std::fs::read(&notes).unwrap(), b"its own");
    // So are the adapter's own folder, which is a run's checkpoint, and one that holds weights of another kind.
    let config = folder.join(adapter).join("config.json");
    let before = std::fs::read(&config).unwrap();
    let into = |out| ["merge-lora", "base", adapter, "-o", out, "-q"];
    fails(folder, &into(adapter), "adapter_model.safetensors");
    assert_eq!(std::fs::read(&config).unwrap(), before);
    std::fs::create_dir(folder.join("occupied")).unwrap();
    std::fs::write(folder.join("occupied/pytorch_model.bin"), "").unwrap();
    fails(folder, &into("occupied"), "pytorch_model.bin");
    assert!(!folder.join("occupied/config.json").exists());
    let merged = [
        "score",
        "merged",
        "--tokens",
        "ids.json",
        "-o",
        "merged.json",
        "-q",
    ];
    printed(folder, &merged);
    let merged = json(&folder.join("merged.json"))["logprobs"].clone();
    let numbers = |values: &serde_json::Value| -> Vec<f64> {
        values
            .as_array()
            .unwrap()
            .iter()
            .map(|x| x.as_f64().unwrap())
            .collect()
    };
    for (a, b) in numbers(&adapted).iter().zip(numbers(&merged)) {
        assert!((a - b).abs() < 1e-4, "{a}, {b}");
    }
    generated_tokens_have_the_bits_of_their_scores(folder, adapter);
    // What does not fit is said.
    fails(
        folder,
        &["score", adapter, "--tokens", "ids.json"],
        "--adapter",
    );
    let grad = [
        "grad",
        "base",
        "--adapter",
        adapter,
        "--tokens",
        "ids.json",
        "-o",
        "x",
    ];
    fails(folder, &grad, "--adapter");
    fails(folder, &["resume", "run", "--lora.r", "8"], "`lora`");
    // A run goes on where the model lies elsewhere.
    let rename = |from, to| std::fs::rename(folder.join(from), folder.join(to)).unwrap();
    rename("base", "moved");
    let resume = ["resume", "run", "--training.steps", "5", "-q"];
    fails(folder, &resume, "`--model.folder`");
    printed(
        folder,
        &[&resume[..], &["--model.folder", "moved"]].concat(),
    );
    rename("moved", "base");
    let weights = |model: &str| folder.join(model).join("model.safetensors");
    std::fs::copy(weights("merged"), weights("base")).unwrap();
    fails(
        folder,
        &[
            "resume",
            "run",
            "--training.steps",
            "6",
            "--model.folder",
            "base",
        ],
        "others than when",
    );
}

fn generated_tokens_have_the_bits_of_their_scores(folder: &Path, adapter: &str) {
    let prompt = tokens(4, 50);
    std::fs::write(folder.join("prompt.json"), json!(prompt).to_string()).unwrap();
    let model = ["base", "--adapter", adapter, "-q"];
    let args = [
        "generate",
        "--tokens",
        "prompt.json",
        "-n",
        "20",
        "--temperature",
        "0",
        "--ignore-eos",
    ];
    let args = [&args[..], &["--logprobs", "new.json"], &model].concat();
    printed(folder, &args);
    let new = json(&folder.join("new.json"));
    let new = new.as_array().map_or(&new, |all| &all[0]);
    let ids: Vec<u64> = new["tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t.as_u64().unwrap())
        .collect();
    let all: Vec<u64> = prompt.iter().map(|t| u64::from(*t)).chain(ids).collect();
    std::fs::write(folder.join("all.json"), json!(all).to_string()).unwrap();
    let args = [&["score", "--tokens", "all.json", "-o", "all"][..], &model].concat();
    printed(folder, &args);
    let scored = json(&folder.join("all"))["logprobs"]
        .as_array()
        .unwrap()
        .clone();
    assert_eq!(
        scored[prompt.len() - 1..],
        new["logprobs"].as_array().unwrap()[..]
    );
}
