//! `segattn generate`, run as a command.

use crate::cli_model::{config, fails, json, printed, save, segattn, tokens};
use std::path::Path;

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), &config());
    for (i, len) in [70, 5, 128].into_iter().enumerate() {
        let ids = serde_json::to_string(&tokens(i as u64 + 1, len)).unwrap();
        std::fs::write(folder.path().join(format!("{i}.json")), ids).unwrap();
    }
    folder
}

fn generate(folder: &Path, args: &[&str]) -> String {
    let fixed = ["generate", "--model", ".", "--max-new", "20", "--quiet"];
    printed(folder, &[&fixed, args].concat())
}

#[test]
fn a_batch_of_token_files_writes_what_each_gives_alone_to_the_bit() {
    let dir = folder();
    let dir = dir.path();
    let chosen = ["--temperature", "0.8", "--top-k", "40", "--seed", "7"];
    let files = [
        "--tokens", "0.json", "--tokens", "1.json", "--tokens", "2.json",
    ];
    let out = ["--logprobs", "all.json", "--segments-per-step", "2"];
    let shown = generate(dir, &[&chosen[..], &files, &out].concat());
    let all = json(&dir.join("all.json"));
    for (i, line) in shown.lines().enumerate() {
        let file = format!("{i}.json");
        let args = ["--tokens", &file, "--logprobs", "one.json"];
        generate(dir, &[&chosen[..], &args].concat());
        let one = json(&dir.join("one.json"));
        assert_eq!(one, all[i]);
        assert_eq!(
            one["tokens"],
            serde_json::from_str::<serde_json::Value>(line).unwrap()
        );
        let count = one["tokens"].as_array().unwrap().len();
        assert_eq!(one["logprobs"].as_array().unwrap().len(), count);
        for value in one["logprobs"].as_array().unwrap() {
            let value = value.as_f64().unwrap();
            assert!(value < 0.0);
            assert_eq!(f64::from(value as f32), value, "not an f32");
        }
    }
    assert_eq!(shown.lines().count(), 3);
}

#[test]
fn greedy_choice_is_the_same_whatever_the_seed_and_sampling_is_not() {
    let dir = folder();
    let with = |args: &[&str]| generate(dir.path(), &[&["--tokens", "0.json"], args].concat());
    let greedy = with(&["--temperature", "0"]);
    assert_eq!(with(&["--temperature", "0", "--seed", "3"]), greedy);
    assert_eq!(with(&["--top-k", "1", "--seed", "3"]), greedy);
    assert_eq!(with(&["--seed", "3"]), with(&["--seed", "3"]));
    assert_ne!(with(&["--seed", "3"]), with(&["--seed", "4"]));
}

#[test]
fn text_is_continued_up_to_a_stop_string() {
    let dir = folder();
    let dir = dir.path();
    let args = [
        "--prompt",
        "Once upon a time",
        "--temperature",
        "0",
        "--ignore-eos",
    ];
    let whole = generate(dir, &args);
    let whole = whole.strip_suffix('\n').unwrap();
    let mut letters = whole.char_indices().skip(4);
    let (at, stop) = letters
        .find(|(at, c)| *c != '\u{fffd}' && whole.find(*c) == Some(*at))
        .unwrap();
    let cut = generate(dir, &[&args[..], &["--stop", &stop.to_string()]].concat());
    assert_eq!(cut.strip_suffix('\n').unwrap(), &whole[..at]);
    std::fs::write(dir.join("prompt.txt"), "Once upon a time").unwrap();
    let from_file = generate(
        dir,
        &[&["--prompt-file", "prompt.txt"], &args[2..]].concat(),
    );
    assert_eq!(from_file.strip_suffix('\n').unwrap(), whole);
}

#[test]
fn several_prompts_are_printed_under_their_names() {
    let dir = folder();
    let args = [
        "--prompt",
        "First one",
        "--prompt",
        "Second",
        "--prompt",
        "First one",
    ];
    let shown = generate(dir.path(), &[&args[..], &["--seed", "2"]].concat());
    for title in [
        "=== 1 of 3: First one",
        "=== 2 of 3: Second",
        "=== 3 of 3: First one",
    ] {
        assert!(shown.contains(title), "{shown}");
    }
    let alone = generate(dir.path(), &["--prompt", "First one", "--seed", "2"]);
    let parts: Vec<&str> = shown
        .split("=== ")
        .map(|p| p.split_once('\n').map_or("", |p| p.1))
        .collect();
    assert_eq!(parts[1].trim_end(), alone.trim_end());
    assert_ne!(
        parts[3].trim_end(),
        alone.trim_end(),
        "a copy draws the same"
    );
}

#[test]
fn execution_in_full_gives_other_text_than_in_segments() {
    let dir = folder();
    let with = |args: &[&str]| {
        let fixed = ["--tokens", "2.json", "--temperature", "0"];
        generate(dir.path(), &[&fixed[..], args].concat())
    };
    assert_eq!(with(&["--execution", "segmented"]), with(&[]));
    assert_ne!(with(&["--execution", "full"]), with(&[]));
}

#[test]
fn wrong_use_is_explained() {
    let dir = folder();
    let dir = dir.path();
    let fails = |args: &[&str], what| {
        fails(dir, &[&["generate", "--model", "."], args].concat(), what);
    };
    fails(&["--tokens", "no.json"], "no.json");
    fails(&["--tokens", "0.json", "--prompt", "a"], "--tokens");
    fails(
        &["--tokens", "0.json", "--temperature", "-1"],
        "temperature",
    );
    fails(&["--tokens", "0.json", "--top-p", "0"], "top_p");
    fails(&["--tokens", "0.json", "--execution", "half"], "segmented");
    fails(&["--prompt", "a", "--stop", ""], "stop");
    std::fs::write(dir.join("bad.json"), "[1, 256]").unwrap();
    fails(&["--tokens", "bad.json"], "256");
    let nowhere = segattn(dir, &["generate", "--model", "nowhere", "--prompt", "a"]);
    assert!(String::from_utf8_lossy(&nowhere.stderr).contains("nowhere"));
}

#[test]
fn weights_may_lie_in_shards_of_half_precision() {
    use safetensors::tensor::{Dtype, SafeTensors, TensorView};
    let dir = folder();
    let dir = dir.path();
    let whole = std::fs::read(dir.join("model.safetensors")).unwrap();
    let whole = SafeTensors::deserialize(&whole).unwrap();
    let bf16 = |x: &[u8]| half::bf16::from_f32(f32::from_le_bytes([x[0], x[1], x[2], x[3]]));
    // The same numbers in f32, and as bf16 in two files.
    let (mut rounded, mut shards, mut map) =
        (Vec::new(), [Vec::new(), Vec::new()], serde_json::Map::new());
    for (i, (name, tensor)) in whole.tensors().into_iter().enumerate() {
        let values: Vec<half::bf16> = tensor.data().chunks_exact(4).map(bf16).collect();
        let wide: Vec<u8> = values
            .iter()
            .flat_map(|x| x.to_f32().to_le_bytes())
            .collect();
        let narrow: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let shape = tensor.shape().to_vec();
        rounded.push((name.clone(), shape.clone(), wide));
        map.insert(name.clone(), format!("part-{}.safetensors", i % 2).into());
        shards[i % 2].push((name, shape, narrow));
    }
    let save = |file: &str, dtype, tensors: &[(String, Vec<usize>, Vec<u8>)]| {
        let views = tensors
            .iter()
            .map(|(n, s, b)| (n, TensorView::new(dtype, s.clone(), b).unwrap()));
        std::fs::write(dir.join(file), safetensors::serialize(views, None).unwrap()).unwrap();
    };
    save("model.safetensors", Dtype::F32, &rounded);
    let expected = generate(dir, &["--tokens", "0.json"]);
    std::fs::remove_file(dir.join("model.safetensors")).unwrap();
    for (i, shard) in shards.iter().enumerate() {
        save(&format!("part-{i}.safetensors"), Dtype::BF16, shard);
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": map}).to_string();
    std::fs::write(dir.join("model.safetensors.index.json"), index).unwrap();
    assert_eq!(generate(dir, &["--tokens", "0.json"]), expected);
}

#[test]
fn damaged_folders_are_explained() {
    let dir = folder();
    let dir = dir.path();
    let weights = dir.join("model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    let fails = |what| {
        let args = ["generate", "--model", ".", "--tokens", "0.json"];
        fails(dir, &args, what);
    };
    for len in [0, 4, 9, 500, whole.len() - 1] {
        std::fs::write(&weights, &whole[..len]).unwrap();
        fails("model.safetensors");
    }
    let mut huge = whole.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    std::fs::write(&weights, huge).unwrap();
    fails("header");
    std::fs::write(&weights, &whole).unwrap();
    let mut other = config();
    other.intermediate_size = 64;
    other.save(dir).unwrap();
    fails("expected shape [64, 32], got [48, 32]");
    other = config();
    other.num_hidden_layers = 3;
    other.segment = None;
    other.save(dir).unwrap();
    fails("model.layers.2.");
}

#[test]
fn prompts_go_through_the_tokenizer_of_the_folder() {
    let dir = folder();
    let dir = dir.path();
    let mut vocab = serde_json::Map::new();
    vocab.insert("<s>".to_owned(), 0.into());
    for id in 1..256 {
        vocab.insert(format!("w{id}"), id.into());
    }
    let begin = serde_json::json!({"SpecialToken": {"id": "<s>", "type_id": 0}});
    let text = serde_json::json!({"Sequence": {"id": "A", "type_id": 0}});
    let tokenizer = serde_json::json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [{
            "id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        }],
        "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, text],
            "pair": [begin, text, text],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        },
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w255"},
    });
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(dir.join("ids.json"), "[0, 7, 40, 200, 255]").unwrap();
    let greedy = ["--temperature", "0", "--ignore-eos"];
    let ids = generate(dir, &[&greedy[..], &["--tokens", "ids.json"]].concat());
    let ids: Vec<u32> = serde_json::from_str(&ids).unwrap();
    let words: Vec<String> = ids
        .iter()
        .filter(|i| **i != 0)
        .map(|i| format!("w{i}"))
        .collect();
    let prompt = ["--prompt", "w7 w40 w200 unknown"];
    let shown = generate(dir, &[&greedy[..], &prompt].concat());
    // The space belongs to the text: prompt and new words joined are the text of all ids.
    assert_eq!(shown.trim_end(), format!(" {}", words.join(" ")));
    std::fs::write(dir.join("tokenizer.json"), "{}").unwrap();
    fails(
        dir,
        &["generate", "--model", ".", "--prompt", "a"],
        "tokenizer.json",
    );
    // A broken tokenizer does not matter where none is needed.
    generate(dir, &["--tokens", "ids.json"]);
}

#[test]
fn a_prompt_read_once_is_used_again() {
    let dir = folder();
    let dir = dir.path();
    let (story, question) = ("A long story. ".repeat(12), "And then?");
    let whole = format!("{story}{question}");
    let greedy = ["--temperature", "0", "--ignore-eos"];
    let expected = generate(dir, &[&greedy[..], &["--prompt", &whole]].concat());
    let read = [
        "generate",
        "--model",
        ".",
        "--quiet",
        "--prompt",
        &story,
        "--max-new",
        "0",
    ];
    printed(dir, &[&read[..], &["--state-out", "story.state"]].concat());
    let after = ["--state-in", "story.state", "--prompt", question];
    let got = generate(
        dir,
        &[&greedy[..], &after, &["--state-out", "asked.state"]].concat(),
    );
    assert_eq!(got, expected);
    // Nothing more to read: it goes on at once.
    let got = generate(dir, &[&greedy[..], &["--state-in", "asked.state"]].concat());
    assert_eq!(got, expected);
    // Two questions about one story.
    let two = [
        "--state-in",
        "story.state",
        "--prompt",
        "Why?",
        "--prompt",
        question,
    ];
    let got = generate(dir, &[&greedy[..], &two].concat());
    assert!(got.trim_end().ends_with(expected.trim_end()), "{got}");
    let fails = |args: &[&str], what| {
        fails(dir, &[&["generate", "--model", "."], args].concat(), what);
    };
    fails(&["--state-in", "0.json"], "0.json");
    fails(
        &["--state-in", "story.state", "--execution", "full"],
        "the model",
    );
}

/// What is said of the new tokens is what scoring says with a break after the prompt, also after a saved state.
#[test]
fn the_end_of_a_prompt_is_a_break_where_the_configuration_says_so() {
    let dir = folder();
    let dir = dir.path();
    let mut broken = config();
    broken.segment.as_mut().unwrap().break_after_prompt = true;
    save(dir, &broken);
    let args = ["--ignore-eos", "--logprobs", "new.json"];
    let prompt = ["--tokens", "0.json", "--state-out", "read.state"];
    generate(dir, &[&args[..], &prompt].concat());
    let new = json(&dir.join("new.json"));
    let ids: Vec<u32> = serde_json::from_value(new["tokens"].clone()).unwrap();
    let all = [tokens(1, 70), ids].concat();
    std::fs::write(dir.join("all.json"), serde_json::to_string(&all).unwrap()).unwrap();
    let score = |breaks: &[&str]| {
        let fixed = [
            "score", "-m", ".", "--tokens", "all.json", "--out", "l.json", "-q",
        ];
        printed(dir, &[&fixed[..], breaks].concat());
        json(&dir.join("l.json"))["logprobs"].as_array().unwrap()[69..].to_vec()
    };
    let got = new["logprobs"].as_array().unwrap();
    assert_eq!(*got, score(&["--breaks", "70"]));
    assert_ne!(*got, score(&[]));
    let empty = [
        "--ignore-eos",
        "--logprobs",
        "again.json",
        "--state-in",
        "read.state",
    ];
    let greedy = ["--temperature", "0"];
    let first = generate(dir, &[&args[..], &["--tokens", "0.json"], &greedy].concat());
    let again = generate(dir, &[&empty[..], &greedy].concat());
    let same = |file: &str| json(&dir.join(file))["logprobs"].clone();
    assert_eq!(same("again.json"), same("new.json"), "{first} {again}");
}
