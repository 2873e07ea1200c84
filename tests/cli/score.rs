//! `segattn score` and `segattn grad`, run as commands.

use crate::cli_model::{config, fails, json, printed, save, tokens};
use safetensors::tensor::SafeTensors;
use std::path::Path;

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), &config());
    let ids = serde_json::to_string(&tokens(1, 200)).unwrap();
    std::fs::write(folder.path().join("t.json"), ids).unwrap();
    folder
}

fn score(dir: &Path, args: &[&str]) -> serde_json::Value {
    let fixed = ["score", "--model", ".", "--out", "l.json", "--quiet"];
    printed(dir, &[&fixed, args].concat());
    json(&dir.join("l.json"))
}

#[test]
fn scores_have_equal_bits_for_every_number_of_segments_per_step() {
    let dir = folder();
    let dir = dir.path();
    let one = score(dir, &["--tokens", "t.json"]);
    let logprobs: Vec<f64> = serde_json::from_value(one["logprobs"].clone()).unwrap();
    assert_eq!(logprobs.len(), 199);
    assert!(
        logprobs
            .iter()
            .all(|x| f64::from(*x as f32) == *x && *x < 0.0)
    );
    let loss = -logprobs.iter().sum::<f64>() / 199.0;
    assert!((one["loss"].as_f64().unwrap() - loss).abs() < 1e-12);
    assert!((one["perplexity"].as_f64().unwrap() - loss.exp()).abs() < 1e-9);
    for n in ["2", "3", "100"] {
        assert_eq!(
            score(dir, &["--tokens", "t.json", "--segments-per-step", n]),
            one
        );
    }
    assert_ne!(
        score(dir, &["--tokens", "t.json", "--execution", "full"]),
        one
    );
}

#[test]
fn generated_log_probabilities_are_those_of_score() {
    let dir = folder();
    let dir = dir.path();
    let generate = [
        "generate",
        "-m",
        ".",
        "--tokens",
        "t.json",
        "--max-new",
        "70",
        "-q",
    ];
    printed(
        dir,
        &[&generate[..], &["--logprobs", "p.json", "--ignore-eos"]].concat(),
    );
    let new = json(&dir.join("p.json"));
    let mut all = tokens(1, 200);
    let ids: Vec<u32> = serde_json::from_value(new["tokens"].clone()).unwrap();
    all.extend(ids);
    std::fs::write(dir.join("all.json"), serde_json::to_string(&all).unwrap()).unwrap();
    let scored = score(dir, &["--tokens", "all.json", "--segments-per-step", "2"]);
    for i in 0..70 {
        let (got, expected) = (&new["logprobs"][i], &scored["logprobs"][199 + i]);
        let difference = got.as_f64().unwrap() - expected.as_f64().unwrap();
        assert!(difference.abs() < 1e-5, "{got} for {expected}");
    }
}

#[test]
fn a_text_is_scored_as_its_tokens() {
    let dir = folder();
    let dir = dir.path();
    std::fs::write(dir.join("t.txt"), "Hello, you.").unwrap();
    let ids: Vec<u32> = "Hello, you.".bytes().map(u32::from).collect();
    std::fs::write(dir.join("b.json"), serde_json::to_string(&ids).unwrap()).unwrap();
    assert_eq!(
        score(dir, &["--text", "t.txt"]),
        score(dir, &["--tokens", "b.json"])
    );
}

/// The same breaks as a flag, beside the tokens, and half and half; others are others.
#[test]
fn breaks_are_given_as_a_flag_or_beside_the_tokens() {
    let dir = folder();
    let dir = dir.path();
    let object = |name: &str, breaks: &[usize]| {
        let object = serde_json::json!({"tokens": tokens(1, 200), "breaks": breaks});
        std::fs::write(dir.join(name), object.to_string()).unwrap();
    };
    object("o.json", &[10, 20, 100]);
    object("half.json", &[20]);
    let expected = score(dir, &["--tokens", "t.json", "--breaks", "10,20,100"]);
    assert_eq!(score(dir, &["--tokens", "o.json"]), expected);
    let half = score(dir, &["--tokens", "half.json", "--breaks", "100,10,20"]);
    assert_eq!(half, expected);
    assert_ne!(score(dir, &["--tokens", "t.json"]), expected);
    let rereads = serde_json::json!({
        "tokens": tokens(1, 200), "breaks": [100], "rereads": [60, 120, 120],
    });
    std::fs::write(dir.join("reread.json"), rereads.to_string()).unwrap();
    let flags = ["--breaks", "100", "--rereads", "120,60,120"];
    let reread = score(dir, &[&["--tokens", "t.json"], &flags[..]].concat());
    assert_eq!(score(dir, &["--tokens", "reread.json"]), reread);
    assert_ne!(
        score(dir, &["--tokens", "t.json", "--breaks", "100"]),
        reread
    );
    let with = gradients(dir, &["--breaks", "10,20,100"]);
    assert_ne!(gradients(dir, &[]), with);
    assert_ne!(gradients(dir, &["--breaks", "100"]), gradients(dir, &flags));
    let data = [
        "eval",
        "-m",
        ".",
        "--task",
        "perplexity",
        "--out",
        "r.json",
        "--data",
    ];
    let perplexity = |args: &[&str]| {
        printed(dir, &[&data[..], args].concat());
        json(&dir.join("r.json"))["perplexity"][0]["result"].clone()
    };
    let as_flag = perplexity(&["t.json", "--breaks", "10,20,100"]);
    assert_eq!(perplexity(&["o.json"]), as_flag);
    assert_ne!(perplexity(&["t.json"]), as_flag);
    let reread_loss = perplexity(&[&["t.json"], &flags[..]].concat());
    assert_eq!(perplexity(&["reread.json"]), reread_loss);
    assert_ne!(perplexity(&["t.json", "--breaks", "100"]), reread_loss);
    let loss = |value: &serde_json::Value| value["loss"].as_f64().unwrap();
    assert!((loss(&as_flag) - loss(&expected)).abs() < 1e-9);
    for (args, part) in [
        (
            &["score", "-m", ".", "--tokens", "t.json", "--breaks", "201"][..],
            "up to the 200 tokens",
        ),
        (
            &["score", "-m", ".", "--tokens", "t.json", "--breaks", "x"],
            "--breaks",
        ),
        (
            &[&data[..], &["t.json", "--data", "o.json", "--breaks", "1"]].concat(),
            "one document",
        ),
    ] {
        fails(dir, args, part);
    }
}

fn gradients(dir: &Path, args: &[&str]) -> Vec<u8> {
    let fixed = [
        "grad",
        "--model",
        ".",
        "--tokens",
        "t.json",
        "--out",
        "g.safetensors",
    ];
    printed(dir, &[&fixed, args].concat());
    std::fs::read(dir.join("g.safetensors")).unwrap()
}

#[test]
fn gradients_of_every_weight_lead_downhill() {
    let dir = folder();
    let dir = dir.path();
    let bytes = gradients(dir, &["--tbptt", "9"]);
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let loss: f64 = metadata.metadata().as_ref().unwrap()["loss"]
        .parse()
        .unwrap();
    let scored = score(dir, &["--tokens", "t.json"])["loss"]
        .as_f64()
        .unwrap();
    assert!((loss - scored).abs() < 1e-6);
    let gradients = SafeTensors::deserialize(&bytes).unwrap();
    let path = dir.join("model.safetensors");
    let weights = std::fs::read(&path).unwrap();
    let weights = SafeTensors::deserialize(&weights).unwrap();
    let numbers = |data: &[u8]| -> Vec<f32> {
        let number = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        data.chunks_exact(4).map(number).collect()
    };
    // One step against the gradient lowers the loss by step * |gradient|^2.
    let (step, mut square) = (1e-4, 0.0f64);
    let mut moved = Vec::new();
    for (name, weight) in weights.tensors() {
        let mut values = numbers(weight.data());
        let gradient = gradients.tensor(&name).expect(&name);
        assert_eq!(gradient.shape(), weight.shape());
        for (w, g) in values.iter_mut().zip(numbers(gradient.data())) {
            square += f64::from(g) * f64::from(g);
            *w -= step * g;
        }
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        moved.push((name, weight.shape().to_vec(), bytes));
    }
    // No more names than the checkpoint's.
    assert_eq!(gradients.len(), moved.len());
    let views = moved.iter().map(|(name, shape, bytes)| {
        let view =
            safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes);
        (name, view.unwrap())
    });
    std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    let lower = score(dir, &["--tokens", "t.json"])["loss"]
        .as_f64()
        .unwrap();
    let expected = f64::from(step) * square;
    let ratio = (scored - lower) / expected;
    assert!((0.9..1.1).contains(&ratio), "{ratio}");
}

#[test]
fn gradients_have_equal_bits_for_every_number_of_segments_per_step_and_depend_on_depth() {
    let dir = folder();
    let dir = dir.path();
    let one = gradients(dir, &["--tbptt", "1"]);
    assert_eq!(
        gradients(dir, &["--tbptt", "1", "--segments-per-step", "3"]),
        one
    );
    assert_ne!(gradients(dir, &["--tbptt", "0"]), one);
}

#[test]
fn wrong_use_is_explained() {
    let dir = folder();
    let dir = dir.path();
    std::fs::write(dir.join("short.json"), "[5]").unwrap();
    fails(dir, &["score", "-m", "."], "--tokens");
    fails(
        dir,
        &["score", "-m", ".", "--tokens", "short.json"],
        "2 tokens",
    );
    let grad = ["grad", "-m", ".", "--tokens", "short.json", "--out", "g"];
    fails(dir, &grad, "2 tokens");
    fails(
        dir,
        &["score", "-m", ".", "--tokens", "t.json", "--text", "x"],
        "cannot be used",
    );
}
