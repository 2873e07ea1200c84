//! `--stages` as processes: the bits of one process, and an end where a stage is lost.
use crate::meeting;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::training::{
    self, fail, newest, prepare, resume, same, segattn, send, succeed, train, wait_for_lines,
};

/// A run of a model of four layers, one of them without heads that read the past.
fn run(folder: &Path, output: &str, tied: &str, steps: &str) -> Command {
    let mut command = train(folder, output);
    command.args(["--training.steps", steps, "--log.plot", "false"]);
    command.args(["--model.shape.num_hidden_layers", "4"]);
    command.args(["--model.shape.tie_word_embeddings", tied]);
    command.args(["--model.segment.long_range_layers", "[0, 1, 3]"]);
    command.args(["--model.segment.sink_len", "2"]);
    command
}

/// Such a model, and what it reads.
fn model(folder: &Path) -> PathBuf {
    prepare(folder);
    let mut command = run(folder, "run", "false", "2");
    command.args(["--checkpoint.every", "0", "--training.validate_every", "0"]);
    succeed(command);
    let tokens: Vec<u32> = (0..150).map(|i| (i * i + i / 3) % 251).collect();
    let breaks = r#"{"tokens": TOKENS, "breaks": [20, 21, 70], "rereads": [21, 24, 75]}"#;
    let text = breaks.replace("TOKENS", &format!("{tokens:?}"));
    std::fs::write(folder.join("tokens.json"), text).unwrap();
    training::newest_folder(&folder.join("run"))
}

fn on(model: &Path, command: &str, stages: &str) -> Command {
    let mut called = segattn();
    called.arg(command).arg("-m").arg(model);
    if stages != "1" {
        called.args(["--stages", stages]);
    }
    called
}

#[test]
fn a_text_is_scored_to_the_same_bits_by_any_number_of_stages() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let model = model(at);
    let score = |stages: &str, segments: &str| {
        let out = at.join(format!("scores-{stages}-{segments}.json"));
        let mut command = on(&model, "score", stages);
        command.arg("--tokens").arg(at.join("tokens.json"));
        command.args(["--segments-per-step", segments]);
        command.arg("--out").arg(&out);
        let said = succeed(command).stdout;
        (std::fs::read_to_string(out).unwrap(), said)
    };
    let whole = score("1", "1");
    assert!(whole.0.contains("logprobs"), "{}", whole.0);
    for (stages, segments) in [("2", "1"), ("4", "1"), ("3", "2")] {
        assert!(score(stages, segments) == whole, "{stages} stages");
    }
}

#[test]
fn a_text_goes_on_to_the_same_bits_on_any_number_of_stages() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let model = model(at);
    let generate = |stages: &str| {
        let out = at.join(format!("new-{stages}.json"));
        let mut command = on(&model, "generate", stages);
        for tokens in ["tokens.json", "tokens.json"] {
            command.arg("--tokens").arg(at.join(tokens));
        }
        command.args(["-n", "40", "--seed", "3", "--ignore-eos"]);
        command.arg("--logprobs").arg(&out);
        let said = succeed(command).stdout;
        (std::fs::read_to_string(out).unwrap(), said)
    };
    let whole = generate("1");
    for stages in ["2", "4"] {
        assert!(generate(stages) == whole, "{stages} stages");
    }
}

#[test]
fn a_state_is_one_file_for_any_number_of_stages() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let model = model(at);
    let save = |stages: &str| {
        let state = at.join(format!("state-{stages}"));
        let mut command = on(&model, "generate", stages);
        for _ in 0..2 {
            command.arg("--tokens").arg(at.join("tokens.json"));
        }
        command.args(["-n", "0", "--state-out"]).arg(&state);
        succeed(command);
        std::fs::read(state).unwrap()
    };
    let whole = save("1");
    for stages in ["2", "4"] {
        assert!(save(stages) == whole, "{stages} stages");
    }
    let go_on = |stages: &str| {
        let mut command = on(&model, "generate", stages);
        command.arg("--state-in").arg(at.join("state-2"));
        for _ in 0..2 {
            command.arg("--tokens").arg(at.join("tokens.json"));
        }
        command.args(["-n", "12", "--seed", "3", "--ignore-eos"]);
        succeed(command).stdout
    };
    let whole = go_on("1");
    for stages in ["2", "3"] {
        assert!(go_on(stages) == whole, "{stages} stages");
    }
    // What is no state is refused.
    std::fs::write(at.join("state-2"), "no state").unwrap();
    let mut command = on(&model, "generate", "2");
    command
        .args(["--prompt", "a", "--state-in"])
        .arg(at.join("state-2"));
    fail(command, "state-2");
}

#[test]
fn an_evaluation_over_stages_finds_what_one_process_finds() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let model = model(at);
    let config = model.join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    // Without it no oracle selects.
    json["segment"]["break_after_prompt"] = true.into();
    std::fs::write(&config, json.to_string()).unwrap();
    let text = at.join("text.txt");
    for more in [
        &[
            "--task",
            "perplexity",
            "--lengths",
            "700",
            "--data",
            text.to_str().unwrap(),
        ][..],
        &[
            "--task",
            "passkey,niah_single_1",
            "--lengths",
            "1200",
            "-n",
            "2",
        ],
        &[
            "--task",
            "passkey",
            "--lengths",
            "1200",
            "-n",
            "2",
            "--oracle",
        ],
    ] {
        let found = |stages: &str| {
            let out = at.join("found.json");
            let mut command = on(&model, "eval", stages);
            command.args(more).arg("--out").arg(&out);
            let said = succeed(command).stdout;
            let text = std::fs::read_to_string(out).unwrap();
            let mut found: serde_json::Value = serde_json::from_str(&text).unwrap();
            // It says how many threads there are.
            found.as_object_mut().unwrap().remove("device");
            (found.to_string(), said)
        };
        let whole = found("1");
        assert!(
            more[1] == "perplexity" || whole.0.contains("recall"),
            "{}",
            whole.0
        );
        for stages in ["2", "4"] {
            assert!(found(stages) == whole, "{stages} stages: {more:?}");
        }
    }
}

#[test]
fn stages_end_without_a_word_where_the_reader_has_seen_enough() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let mut command = on(&model(at), "generate", "2");
    command.args(["--prompt", "a", "-n", "40", "--ignore-eos"]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = command.stdout(writer).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!((output.status.code(), said.as_str()), (Some(0), ""));
}

/// Processes with such a command each, as a launcher starts them.
fn launched(world: usize, command: impl Fn() -> Command) -> Vec<Child> {
    let port = meeting::free_port().to_string();
    let start = |rank: usize| {
        let mut command = command();
        command.args(["--rank-timeout", "20"]);
        for (name, value) in [("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world)] {
            command.env(name, value.to_string());
        }
        command
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", &port);
        command.env("RAYON_NUM_THREADS", "1").spawn().unwrap()
    };
    (0..world).map(start).collect()
}

/// Kills one of the processes: the others end, soon and with an error that names it.
fn kill(mut children: Vec<Child>, killed: usize) {
    send("-KILL", &children[killed]);
    let at = Instant::now();
    children[killed].wait().unwrap();
    for (rank, child) in children.into_iter().enumerate() {
        if rank == killed {
            continue;
        }
        let other = child.wait_with_output().unwrap();
        assert!(at.elapsed() < Duration::from_secs(15), "{:?}", at.elapsed());
        let said = String::from_utf8_lossy(&other.stderr).into_owned();
        assert_eq!(other.status.code(), Some(1), "{said}");
        assert!(said.contains(&format!("rank {killed}")), "{said}");
        assert!(!said.contains("panicked"), "{said}");
    }
}

#[test]
fn a_stage_that_is_killed_ends_all_with_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let model = model(at);
    let tokens = at.join("tokens.json");
    for killed in [1, 0] {
        let children = launched(2, || {
            let mut command = on(&model, "generate", "2");
            command.arg("--tokens").arg(&tokens);
            command.args(["-n", "1000000", "--ignore-eos"]);
            command
        });
        std::thread::sleep(Duration::from_secs(1));
        kill(children, killed);
    }
}

#[test]
fn a_run_over_stages_has_the_bits_and_files_of_one_process_and_goes_on_with_another_number() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    prepare(at);
    let batches = ["--training.accumulation", "2"];
    for tied in ["true", "false"] {
        let [one, two] = ["one", "two"].map(|name| format!("{name}-{tied}"));
        let mut command = run(at, &one, tied, "6");
        command.args(batches);
        succeed(command);
        let mut command = run(at, &two, tied, "6");
        command.args(batches).args(["--stages", "2"]);
        succeed(command);
        same(at, &one, &two);
        let on = |name: &str, more: &[&str]| {
            let mut command = resume(at, name);
            command.args(["--training.steps", "9"]).args(more);
            succeed(command)
        };
        on(&one, &[]);
        let output = on(&two, &["--stages", "4"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(said.matches("done after 9 steps").count(), 1, "{said}");
        same(at, &one, &two);
    }
}

#[test]
fn a_stage_that_is_killed_ends_the_training_of_all() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    prepare(at);
    for killed in [1, 2, 0] {
        let output = format!("run-{killed}");
        let children = launched(3, || {
            let mut command = run(at, &output, "true", "100000");
            command.args(["--stages", "3"]);
            command
        });
        wait_for_lines(&at.join(&output), 5);
        kill(children, killed);
        // The last checkpoint is whole.
        assert!(newest(&at.join(&output)).progress.step > 0);
    }
}

#[test]
fn a_stage_with_other_weights_is_named_with_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let model = model(at);
    let other = at.join("other");
    std::fs::create_dir(&other).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(model.join(name), other.join(name)).unwrap();
    }
    // The sign of the last number of the last tensor.
    let file = other.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 0x80;
    std::fs::write(file, bytes).unwrap();
    let tokens = at.join("tokens.json");
    let rank = AtomicUsize::new(0);
    let children = launched(2, || {
        let models = [&model, &other];
        let model = models[rank.fetch_add(1, Ordering::Relaxed)];
        let mut command = on(model, "score", "2");
        command.arg("--tokens").arg(&tokens);
        command
    });
    for child in children {
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        let named = said.contains("rank 1: weights in model.safetensors");
        assert!(named, "{said}");
    }
}

#[test]
fn stages_that_cannot_be_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let model = model(at);
    let tokens = at.join("tokens.json");
    let fails = |mut command: Command| {
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let mut many = on(&model, "score", "5");
    many.arg("--tokens").arg(&tokens);
    let said = fails(many);
    assert!(
        said.contains("--stages: expected at most 4") && said.contains("got 5"),
        "{said}"
    );
    let mut both = run(at, "both", "true", "2");
    both.args(["--ranks", "2", "--stages", "2"]);
    fail(both, "by sequences or by layers");
    let mut many = run(at, "many", "true", "2");
    many.args(["--stages", "5"]);
    fail(many, "expected at most 4, the model's layers, got 5");
    let mut adapters = train(at, "adapters");
    adapters.arg("--model.folder").arg(&model);
    adapters.args(["--lora.r", "2", "--stages", "2"]);
    adapters.args(["--training.learn_gates", "false"]);
    fail(adapters, "layers under adapters are not spread yet");
}
