//! `segattn eval`, run as a command.

use std::path::Path;

use serde_json::Value;

use crate::cli_model::{config, fails, json, printed, save, tokens};

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), &config());
    let data = folder.path().join("data");
    std::fs::create_dir_all(data.join("more")).unwrap();
    std::fs::write(data.join("a.txt"), "A text of its own. ".repeat(20)).unwrap();
    let lines = "{\"text\": \"first line\"}\n\n{\"text\": \"second\", \"id\": 7}\n";
    std::fs::write(data.join("more/b.jsonl"), lines).unwrap();
    let ids = serde_json::to_string(&tokens(3, 150)).unwrap();
    std::fs::write(data.join("more/c.json"), ids).unwrap();
    folder
}

#[test]
fn tasks_make_a_table_and_a_file_with_every_answer() {
    let dir = folder();
    let dir = dir.path();
    let args = [
        "eval",
        "-m",
        ".",
        "--task",
        "passkey,niah,vt",
        "--lengths",
        "600,2000",
        "--samples",
        "2",
        "--seed",
        "4",
        "--out",
        "r.json",
    ];
    let shown = printed(dir, &args);
    let (reasons, rows): (Vec<&str>, Vec<&str>) = shown.lines().partition(|l| l.starts_with("- "));
    // Scores, an empty line, and how much of the statements retrieval had selected.
    let (rows, selected) = rows.split_at(12);
    assert!(
        selected[0].is_empty() && selected[1].starts_with("of it selected"),
        "{shown}"
    );
    assert_eq!(selected.len(), 12, "{shown}");
    // A cell without a score has its reason below the table.
    let empty = rows
        .iter()
        .flat_map(|row| row.split_whitespace())
        .filter(|cell| *cell == "-");
    assert_eq!(reasons.len(), empty.count(), "{shown}");
    assert!(
        reasons.iter().all(|reason| reason.contains("at least")),
        "{shown}"
    );
    assert!(rows[0].contains("600") && rows[0].contains("2000"));
    assert!(rows[1].starts_with("passkey") && rows[11].starts_with("mean"));
    let first = json(&dir.join("r.json"));
    assert_eq!(first["segment"]["segment_len"], 64);
    let cells = first["tasks"]["cells"].as_array().unwrap();
    assert_eq!(cells.len(), 20);
    for cell in cells.iter().filter(|c| c["skipped"].is_null()) {
        assert_eq!(cell["samples"].as_array().unwrap().len(), 2);
        assert!(cell["samples"][0]["prediction"].is_string());
    }
    // The same again, whatever runs side by side.
    let again = [&args[..], &["--batch", "1", "--segments-per-step", "5"]].concat();
    printed(dir, &again);
    assert_eq!(
        json(&dir.join("r.json"))["tasks"]["cells"],
        first["tasks"]["cells"]
    );
}

/// What perplexity on `data` shows, and the file of its results.
fn perplexity(dir: &Path, args: &[&str]) -> (String, Value) {
    let fixed = [
        "eval",
        "-m",
        ".",
        "--task=perplexity",
        "--data=data",
        "--out=r.json",
    ];
    let shown = printed(dir, &[&fixed[..], args].concat());
    (shown, json(&dir.join("r.json")))
}

#[test]
fn perplexity_reads_text_lines_and_ids() {
    let dir = folder();
    let dir = dir.path();
    let perplexity = |args: &[&str]| {
        let (shown, results) = perplexity(dir, args);
        (shown, results["perplexity"].clone())
    };
    let (shown, whole) = perplexity(&[]);
    assert!(shown.contains("whole"));
    assert_eq!(whole[0]["result"]["documents"], 4);
    assert_eq!(whole[0]["result"]["tokens"], 379 + 9 + 5 + 149);
    // The same lines, compressed and in a table.
    let lines = std::fs::read(dir.join("data/more/b.jsonl")).unwrap();
    std::fs::remove_file(dir.join("data/more/b.jsonl")).unwrap();
    let packed = zstd::encode_all(&lines[..], 3).unwrap();
    std::fs::write(dir.join("data/more/b.jsonl.zst"), packed).unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/parquet/text.parquet");
    let (_, compressed) = perplexity(&[]);
    assert_eq!(compressed, whole);
    let (_, table) = perplexity(&["--data", golden.to_str().unwrap()]);
    // Of its four texts one is empty, and has no token to predict.
    let more = table[0]["result"]["tokens"].as_u64().unwrap() - (379 + 9 + 5 + 149);
    assert_eq!(more, 2 + 7 + 3);
    let (_, windows) = perplexity(&["--lengths", "100,300", "--stride", "50"]);
    assert_eq!(windows[0]["config"]["window"], 100);
    assert_eq!(windows[1]["result"]["tokens"], whole[0]["result"]["tokens"]);
    let (_, full) = perplexity(&["--execution", "full"]);
    assert_ne!(full[0]["result"]["loss"], whole[0]["result"]["loss"]);
    let segments = [
        "--execution",
        "segmented",
        "--segment-len",
        "64",
        "--prior-len",
        "16",
    ];
    let (_, same) = perplexity(&segments);
    assert_eq!(same, whole);
    let (_, shorter) = perplexity(&["--segment-len", "32"]);
    assert_ne!(shorter[0]["result"]["loss"], whole[0]["result"]["loss"]);
}

#[test]
fn positions_are_scaled_as_by_the_key_in_the_configuration() {
    let dir = folder();
    let dir = dir.path();
    let perplexity = |args: &[&str]| perplexity(dir, args).1;
    let plain = perplexity(&[]);
    assert!(plain.get("rope_scaling").is_none());
    let scaling = r#"{"rope_type": "linear", "factor": 4.0, "rope_theta": 20000.0}"#;
    let scaled = perplexity(&["--rope-scaling", scaling]);
    assert_ne!(scaled["perplexity"], plain["perplexity"]);
    let scaling: Value = serde_json::from_str(scaling).unwrap();
    assert_eq!(scaled["rope_scaling"], scaling);
    let path = dir.join("config.json");
    let mut config = json(&path);
    config.as_object_mut().unwrap().remove("rope_theta");
    config["rope_scaling"] = scaling;
    std::fs::write(&path, config.to_string()).unwrap();
    assert_eq!(perplexity(&[])["perplexity"], scaled["perplexity"]);
    let none = r#"{"rope_type": "default", "rope_theta": 10000.0}"#;
    assert_eq!(
        perplexity(&["--rope-scaling", none])["perplexity"],
        plain["perplexity"]
    );
}

/// What is selected of a pool that has dropped tokens has no positions: there is no recall of it, and no oracle.
#[test]
fn a_bounded_pool_has_recall_until_it_drops_tokens_and_no_oracle() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut config = config();
    let segment = config.segment.as_mut().unwrap();
    (segment.pool_len, segment.break_after_prompt) = (1024, true);
    save(dir, &config);
    let args = "eval -m . --task passkey --lengths 700,2000 --samples 2 --seed 4 --out r.json";
    let args: Vec<&str> = args.split(' ').collect();
    printed(dir, &args);
    let cells = &json(&dir.join("r.json"))["tasks"]["cells"];
    assert!(cells[0].get("recall").is_some(), "{cells}");
    assert!(cells[1].get("recall").is_none(), "{cells}");
    fails(
        dir,
        &[&args[..], &["--oracle"]].concat(),
        "segment.pool_len",
    );
}

#[test]
fn wrong_use_is_explained() {
    let dir = folder();
    let dir = dir.path();
    let fails = |args: &[&str], what| fails(dir, &[&["eval", "-m", "."], args].concat(), what);
    fails(&["--task", "niah_single_9"], "niah_single_9");
    fails(&["--task", "perplexity"], "--data");
    fails(&["--task", "passkey", "--data", "data"], "--data");
    fails(&["--task", "perplexity", "--data", "nowhere"], "nowhere");
    fails(&["--task", "passkey", "--samples", "0"], "samples");
    fails(&["--task", "cwe", "--depth", "0.5"], "depth");
    let scaled = |scaling, what| fails(&["--task", "passkey", "--rope-scaling", scaling], what);
    scaled("yarn", "--rope-scaling");
    scaled(r#"{"rope_type": "linear"}"#, "rope_scaling.factor");
    scaled(
        r#"{"rope_type": "yarn", "factor": 4}"#,
        "original_max_position_embeddings",
    );
    let both = [
        "--task",
        "passkey",
        "--execution",
        "full",
        "--segment-len",
        "32",
    ];
    fails(&both, "execution");
    std::fs::write(dir.join("bad.jsonl"), "{\"text\": 3}\n").unwrap();
    fails(&["--task", "perplexity", "--data", "bad.jsonl"], "line 1");
}

#[test]
fn questions_of_longbench_are_answered_by_letter() {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), &config());
    let question = |id: usize| {
        serde_json::json!({
            "_id": id.to_string(), "difficulty": "easy", "length": "short", "question": "Which?",
            "choice_A": "one", "choice_B": "two", "choice_C": "three", "choice_D": "four", "answer": "C",
            "context": "Some words. ".repeat(20 + id),
        })
    };
    let questions = serde_json::json!([question(0), question(1)]).to_string();
    std::fs::write(dir.path().join("questions.json"), questions).unwrap();
    let args = ["eval", ".", "-q", "--task", "longbench_v2"];
    let shown = printed(
        dir.path(),
        &[
            &args[..],
            &["--questions", "questions.json", "--lengths", "300"],
        ]
        .concat(),
    );
    assert!(
        shown.contains("questions") && shown.contains("easy"),
        "{shown}"
    );
    let results = json(&dir.path().join("eval.json"));
    let choices = results["choices"]["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 2);
    for choice in choices {
        assert_eq!(choice["prompt_tokens"], 300);
        assert!(choice["left_out"].as_u64().unwrap() > 0);
        assert_eq!(choice["log_probabilities"].as_array().unwrap().len(), 4);
    }
    fails(
        dir.path(),
        &args,
        "--questions and the task longbench_v2 go together",
    );
}
