//! Commands that report: on a model folder, on the machine, and completions.

use crate::cli_model::{config, fails, printed, save, segattn};
use serde_json::Value;

#[test]
fn inspect_counts_parameters_files_and_memory() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    save(folder, &config());
    let args = ["inspect", ".", "--json", "--context", "640,6400"];
    let report: Value = serde_json::from_str(&printed(folder, &args)).unwrap();
    let parameters = &report["parameters"];
    assert_eq!(parameters["by_kind"]["embedding"], 256 * 32);
    assert_eq!(parameters["by_kind"]["mlp"], 2 * 3 * 32 * 48);
    assert_eq!(parameters["by_kind"]["past gates"], 8);
    let all = 256 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32 + 4) + 32;
    assert_eq!(parameters["total"], all);
    assert_eq!(report["weights"]["files"], 1);
    // The file leaves one layer's four gates out.
    assert_eq!(report["weights"]["bytes"], 4 * (all - 4));
    assert_eq!(report["tokenizer"]["kind"], "bytes");
    assert_eq!(report["end_ids"], serde_json::json!([0]));
    assert_eq!(report["segment"]["layers"], serde_json::json!(["ra", "B."]));
    let memory = &report["memory"];
    assert_eq!(memory[0]["read"]["weights"], 4 * all);
    // Two heads of 8 read the past.
    assert_eq!(memory[1]["read"]["pool"], 2 * 2 * 8 * 6400 * 4);
    assert_eq!(
        memory[0]["read"]["activations"],
        memory[1]["read"]["activations"]
    );
    let text = printed(folder, &["inspect", ".", "--context", "640"]);
    for part in [
        "layer 0   ra",
        "layer 1   B.",
        "bytes, 256 ids",
        "segment_len 64",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn inspect_plans_the_memory_of_a_gpu_that_is_not_there() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    save(folder, &config());
    fails(
        folder,
        &["inspect", ".", "--device", "cuda"],
        "head_dim: expected a multiple of 16, got 8",
    );
    let mut config = config();
    config.set_head_dim(32);
    save(folder, &config);
    let rows = |more: &[&str]| -> Vec<Value> {
        let args = [
            "inspect",
            ".",
            "--json",
            "--device",
            "cuda",
            "--context",
            "640,6400",
        ];
        let report: Value =
            serde_json::from_str(&printed(folder, &[&args, more].concat())).unwrap();
        report["memory"]["rows"].as_array().unwrap().clone()
    };
    let (device, host) = (rows(&[]), rows(&["--pool", "host"]));
    let number = |row: &Value, name: &str| row[name].as_u64().unwrap();
    for (run, name) in ["score", "generate", "train"].into_iter().enumerate() {
        let (short, long) = (&device[run], &device[3 + run]);
        assert_eq!((&short["for"], &long["for"]), (&name.into(), &name.into()));
        // Keys and values of two heads of 32, 2 bytes a number.
        let pool = 2 * 2 * 32 * 2 * 6400;
        assert_eq!(number(long, "pool"), pool, "{name}");
        let parts = ["weights", "optimizer", "state", "activations", "pool"];
        let sum: u64 = parts.iter().map(|part| number(long, part)).sum();
        assert_eq!(number(long, "device"), sum);
        let (short, long) = (&host[run], &host[3 + run]);
        assert_eq!((number(long, "pool"), number(long, "host")), (0, pool));
        if name != "train" {
            // What grows with the context there: the addresses of chunks, and scores, of one layer at a time.
            let (chunks, blocks) = (6400 / 8, 6400 / 2);
            let [short, long] = [short, long].map(|row| number(row, "device"));
            assert!(
                short <= long && long <= short + 16 * chunks + 2 * 4 * blocks,
                "{short}, {long}"
            );
        }
    }
    // Two sequences, two segments at a time: more activations, the same weights.
    let wide = rows(&["--batch", "2", "--segments-per-step", "2"]);
    assert_eq!(number(&wide[0], "weights"), number(&device[0], "weights"));
    assert!(number(&wide[0], "activations") > 3 * number(&device[0], "activations"));
    // Of two ranks each has half of the moments, and a window of both sums.
    let ranks = rows(&["--ranks", "2", "--batch", "1"]);
    let all = number(&device[2], "optimizer");
    let less = all - number(&ranks[2], "optimizer");
    assert!(all / 5 < less && less < all / 3, "{less} of {all}");
    // A sum for each of four sequences at work at a time.
    let sums = |group: &str| rows(&["--batch", "4", "--group", group]);
    let [many, one] = ["1", "4"].map(|group| number(&sums(group)[2], "device"));
    assert!(many > one + all / 2, "{many}, {one}, {all}");
    // The stage that takes most has the head, or the two heads that read the past.
    let stages = rows(&["--stages", "2"]);
    for run in [0, 1, 2] {
        let [part, whole] = [&stages, &device].map(|rows| number(&rows[run], "weights"));
        assert!(whole / 3 < part && part < whole, "{part} of {whole}");
        let each = stages[run]["stages"].as_array().unwrap();
        let each: Vec<u64> = each.iter().map(|bytes| bytes.as_u64().unwrap()).collect();
        assert_eq!(
            (each.len(), each.iter().max()),
            (2, Some(&number(&stages[run], "device")))
        );
    }
    fails(
        folder,
        &["inspect", ".", "--stages", "3"],
        "--stages: expected at most 2",
    );
    fails(
        folder,
        &["inspect", ".", "--stages", "2", "--ranks", "2"],
        "--ranks, --stages: expected one of them",
    );
    let text = printed(
        folder,
        &[
            "inspect",
            ".",
            "--device",
            "cuda",
            "--context",
            "640",
            "--ranks",
            "2",
        ],
    );
    assert!(text.contains("on one of 2 ranks"), "{text}");
    assert!(text.contains("assumed: 132 multiprocessors"), "{text}");
    fails(
        folder,
        &["inspect", ".", "--pool", "some"],
        "auto, device, host, or GiB",
    );
    fails(folder, &["inspect", ".", "--pool", "-1"], "--pool");
}

#[test]
fn inspect_still_reports_where_the_weights_do_not_fit_and_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    save(folder, &config());
    let mut wider = config();
    wider.intermediate_size = 50;
    wider.save(folder).unwrap();
    fails(folder, &["inspect", "."], "mlp.gate_proj.weight");
    let output = segattn(folder, &["inspect", "."]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("MLP 50"));
    std::fs::remove_file(folder.join("model.safetensors")).unwrap();
    fails(folder, &["inspect", "."], "found neither");
    fails(folder, &["inspect", "missing"], "config.json");
    fails(folder, &["inspect", ".", "--context", "0"], "--context");
}

#[test]
fn doctor_names_processor_memory_and_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let report: Value = serde_json::from_str(&printed(
        folder.path(),
        &["doctor", "--json", "--threads", "1"],
    ))
    .unwrap();
    assert_eq!(report["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(report["cpu"]["threads"], 1);
    assert_eq!(report["cpu"]["instruction_sets"][0], "Portable");
    assert!(report["advice"].is_array());
    let text = printed(folder.path(), &["doctor"]);
    for name in ["segattn", "cpu", "memory", "gpu", "driver", "nvcc"] {
        assert!(
            text.lines().any(|line| line.starts_with(name)),
            "{name}: {text}"
        );
    }
}

#[test]
fn completions_name_every_command() {
    let folder = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = printed(folder.path(), &["completions", shell]);
        for command in ["generate", "inspect", "doctor", "completions"] {
            assert!(script.contains(command), "{shell}: {command}");
        }
    }
    fails(folder.path(), &["completions", "tcsh"], "tcsh");
}
