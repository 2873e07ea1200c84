//! Where the command's output goes, and its exit status: files, devices, pipes, terminals that are gone.

use crate::cli_model::{config, fails, json, printed, save, segattn};
use safetensors::tensor::{Dtype, TensorView};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), &config());
    std::fs::write(folder.path().join("t.json"), "[1,2,3,4,5]").unwrap();
    std::fs::write(folder.path().join("t.txt"), "some text").unwrap();
    folder
}

fn score(folder: &Path, out: &str) {
    printed(
        folder,
        &["score", "-m", ".", "--tokens", "t.json", "-o", out],
    );
}

#[test]
fn results_keep_a_files_mode_follow_a_link_and_leave_a_pipe_a_pipe() {
    let dir = folder();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("private"), "").unwrap();
    std::fs::set_permissions(at("private"), PermissionsExt::from_mode(0o600)).unwrap();
    score(dir.path(), "private");
    assert_eq!(
        std::fs::metadata(at("private"))
            .unwrap()
            .permissions()
            .mode()
            & 0o777,
        0o600
    );
    std::os::unix::fs::symlink("private", at("link")).unwrap();
    std::fs::write(at("private"), "").unwrap();
    score(dir.path(), "link");
    assert!(std::fs::symlink_metadata(at("link")).unwrap().is_symlink());
    assert!(json(&at("private"))["loss"].is_f64());
    let made = Command::new("mkfifo").arg(at("pipe")).status().unwrap();
    assert!(made.success());
    let reader = Command::new("cat")
        .arg(at("pipe"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    score(dir.path(), "pipe");
    assert!(
        std::fs::symlink_metadata(at("pipe"))
            .unwrap()
            .file_type()
            .is_fifo()
    );
    let read = reader.wait_with_output().unwrap().stdout;
    assert!(serde_json::from_slice::<serde_json::Value>(&read).unwrap()["loss"].is_f64());
}

#[test]
fn a_place_that_cannot_be_written_is_found_before_the_work() {
    let dir = folder();
    // The model is broken: what is said first is what was found first.
    std::fs::write(dir.path().join("model.safetensors"), "x").unwrap();
    std::os::unix::fs::symlink("nowhere/file", dir.path().join("dangling")).unwrap();
    for out in ["no/such/folder/out", ".", "dangling"] {
        for command in [
            &["score", "-m", ".", "--tokens", "t.json", "-o", out][..],
            &["grad", "-m", ".", "--tokens", "t.json", "-o", out],
            &[
                "generate",
                "-m",
                ".",
                "--tokens",
                "t.json",
                "--logprobs",
                out,
            ],
            &[
                "generate",
                "-m",
                ".",
                "--tokens",
                "t.json",
                "--state-out",
                out,
            ],
            &["eval", "-m", ".", "-t", "passkey", "-o", out],
            &["op", "--case", "t.json", "--out", out],
        ] {
            fails(dir.path(), command, out.rsplit('/').next().unwrap());
            fails(
                dir.path(),
                command,
                if out == "." {
                    "regular file"
                } else {
                    "No such file"
                },
            );
        }
    }
}

#[test]
fn a_full_disk_is_an_error_and_a_reader_that_leaves_is_none() {
    let dir = folder();
    for args in [
        &["inspect", "."][..],
        &["inspect", ".", "--json"],
        &["doctor"],
        &["completions", "bash"],
        &["--help"],
        &["score", "-m", ".", "--tokens", "t.json"],
        &["grad", "-m", ".", "--tokens", "t.json", "-o", "g"],
        &["eval", "-m", ".", "-t", "perplexity", "--data", "t.txt"],
        &["generate", "-m", ".", "--tokens", "t.json", "-n", "2"],
    ] {
        let run = |out: Stdio| {
            let program = Command::new(env!("CARGO_BIN_EXE_segattn"))
                .current_dir(dir.path())
                .args(args)
                .stdout(out)
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&program.stderr).into_owned();
            assert!(!said.contains("panicked"), "{args:?}: {said}");
            program.status.code()
        };
        let full = std::fs::File::options()
            .write(true)
            .open("/dev/full")
            .unwrap();
        assert_eq!(run(full.into()), Some(1), "{args:?} to a full disk");
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        assert_eq!(run(writer.into()), Some(0), "{args:?} without a reader");
    }
    let full = std::fs::File::options()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let mut program = Command::new(env!("CARGO_BIN_EXE_segattn"));
    let done = program
        .args(["inspect", "nothing"])
        .stderr(full)
        .status()
        .unwrap();
    assert_eq!(done.code(), Some(1));
}

#[test]
fn names_send_no_escape_sequences_to_a_terminal() {
    let dir = folder();
    let folder = dir.path().join("bad\u{1b}[31mname");
    std::fs::create_dir(&folder).unwrap();
    for args in [
        &["inspect", "bad\u{1b}[31mname"][..],
        &["score", "-m", "bad\u{1b}[31mname", "--tokens", "t.json"],
    ] {
        let done = segattn(dir.path(), args);
        assert!(!done.status.success());
        assert!(
            !done.stderr.contains(&0x1b),
            "{}",
            String::from_utf8_lossy(&done.stderr)
        );
    }
    let named = "[2J\u{1b}[31m.json";
    std::fs::copy(dir.path().join("t.json"), dir.path().join(named)).unwrap();
    let shown = printed(
        dir.path(),
        &[
            "generate",
            "-m",
            ".",
            "-q",
            "-n",
            "1",
            "-f",
            "t.txt",
            "-f",
            named,
            "-t",
            "0",
            "--ignore-eos",
        ],
    );
    let titles = shown.lines().filter(|line| line.starts_with("==="));
    assert!(titles.clone().count() == 2 && !titles.clone().any(|line| line.contains('\u{1b}')));
}

#[test]
fn results_that_are_no_numbers_are_errors() {
    let dir = folder();
    let mut config = config();
    // Finite weights whose activations overflow.
    config.rms_norm_eps = 1e-30;
    save(dir.path(), &config);
    let path = dir.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let length = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let mut changed = bytes.clone();
    for name in [
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.gate_proj.weight",
    ] {
        let at = |i: usize| header[name]["data_offsets"][i].as_u64().unwrap() as usize + 8 + length;
        for number in changed[at(0)..at(1)].chunks_exact_mut(4) {
            number.copy_from_slice(&1e30f32.to_le_bytes());
        }
    }
    std::fs::write(&path, changed).unwrap();
    for args in [
        &["score", "-m", ".", "--tokens", "t.json", "-o", "out"][..],
        &["grad", "-m", ".", "--tokens", "t.json", "-o", "out"],
        &[
            "eval",
            "-m",
            ".",
            "-t",
            "perplexity",
            "--data",
            "t.txt",
            "-o",
            "out",
        ],
    ] {
        fails(dir.path(), args, "finite");
        assert!(!dir.path().join("out").exists(), "{args:?}");
    }
    // Each of its steps is skipped.
    let run = [
        "--training.output",
        "run",
        "--training.steps",
        "2",
        "--training.batch",
        "1",
    ];
    let train = ["train", "--data.train", "t.txt", "--model.folder", "."];
    fails(dir.path(), &[&train, &run[..]].concat(), "skipped");
}

#[test]
fn an_evaluation_of_which_nothing_was_run_is_an_error_that_says_why() {
    let dir = folder();
    let done = segattn(
        dir.path(),
        &[
            "eval", "-q", "-m", ".", "-t", "passkey", "-l", "64", "-n", "1",
        ],
    );
    let shown = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(!done.status.success());
    assert!(shown.contains("expected a length of at least"), "{shown}");
}

#[test]
fn counts_beyond_all_measure_are_refused_by_name() {
    let dir = folder();
    let huge = "18446744073709551615";
    for (args, name) in [
        (
            &["eval", "-m", ".", "-t", "passkey", "-n", huge][..],
            "--samples",
        ),
        (
            &["eval", "-m", ".", "-t", "passkey", "--batch", huge],
            "--batch",
        ),
    ] {
        fails(dir.path(), args, name);
    }
    // Fewer threads than asked for are enough.
    printed(
        dir.path(),
        &[
            "--threads",
            "100000",
            "score",
            "-m",
            ".",
            "--tokens",
            "t.json",
        ],
    );
}

#[test]
fn where_no_thread_can_be_started_the_program_computes_on_one_with_the_same_bits() {
    let dir = folder();
    let args = ["score", "-m", ".", "--tokens", "t.json"];
    let expected = printed(dir.path(), &args);
    // No address space has room for such a stack, so that every start of a thread fails.
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_segattn"))
        .current_dir(dir.path())
        .env("RUST_MIN_STACK", (1u64 << 50).to_string())
        .args(args)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    assert!(errors.contains("no thread can be started"), "{errors}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
}

/// A case of `op` with one row of each source, its one gate given.
fn op_case(gate: f32) -> Vec<u8> {
    let row: Vec<u8> = (1..=8u8).flat_map(|x| f32::from(x).to_le_bytes()).collect();
    let rows = [
        "q", "k", "v", "prior_k", "prior_v", "past_k", "past_v", "d_out",
    ];
    let mut tensors: Vec<_> = rows
        .map(|name| (name, Dtype::F32, vec![1, 1, 1, 8], row.clone()))
        .into();
    for name in ["segment_len", "prior_len", "past_len"] {
        tensors.push((name, Dtype::I32, vec![1], 1i32.to_le_bytes().into()));
    }
    tensors.push(("past_gate", Dtype::F32, vec![1], gate.to_le_bytes().into()));
    tensors.push(("prior_heads", Dtype::U8, vec![1], vec![1]));
    let views = tensors.iter().map(|(name, dtype, shape, data)| {
        let view = TensorView::new(*dtype, shape.clone(), data);
        (*name, view.unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

#[test]
fn a_case_without_elements_cannot_ask_for_memory() {
    let dir = folder();
    let huge = 1usize << 40;
    let empty = |name| (name, Dtype::F32, vec![1, huge, 1, 0], Vec::new());
    let mut tensors: Vec<_> = [
        "q", "k", "v", "d_out", "prior_k", "prior_v", "past_k", "past_v",
    ]
    .map(empty)
    .into();
    for name in ["segment_len", "prior_len", "past_len"] {
        tensors.push((name, Dtype::I32, vec![1], 1i32.to_le_bytes().into()));
    }
    tensors.push(("past_gate", Dtype::F32, vec![1], 1f32.to_le_bytes().into()));
    tensors.push(("prior_heads", Dtype::U8, vec![1], vec![1]));
    let views = tensors.iter().map(|(name, dtype, shape, data)| {
        let view = TensorView::new(*dtype, shape.clone(), data);
        (*name, view.unwrap())
    });
    let file = safetensors::serialize(views, None).unwrap();
    std::fs::write(dir.path().join("case"), file).unwrap();
    for device in ["cpu", "reference"] {
        let args = ["op", "--case", "case", "--out", "out", "--device", device];
        fails(dir.path(), &args, "head_dim");
    }
}

#[test]
fn gates_too_small_for_f32_are_refused_by_name_and_computed_by_the_reference() {
    let dir = folder();
    let op = |device| ["op", "--case", "case", "--out", "out", "--device", device];
    for gate in [1e-37, 1e-42, 0.99e-30] {
        std::fs::write(dir.path().join("case"), op_case(gate)).unwrap();
        fails(
            dir.path(),
            &op("cpu"),
            "past_gate[0]: expected 0 or at least 1e-30",
        );
        fails(dir.path(), &op("cpu"), &format!("got {gate:e}"));
        assert!(!dir.path().join("out").exists());
        printed(dir.path(), &op("reference"));
        std::fs::remove_file(dir.path().join("out")).unwrap();
    }
    for gate in [0.0, 1e-30] {
        std::fs::write(dir.path().join("case"), op_case(gate)).unwrap();
        printed(dir.path(), &op("cpu"));
    }
}

#[test]
fn a_model_s_folder_is_left_alone_by_a_conversion_that_it_refuses() {
    let dir = folder();
    let other = dir.path().join("other");
    std::fs::create_dir(&other).unwrap();
    save(&other, &config());
    std::fs::write(other.join("generation_config.json"), "{}").unwrap();
    let own = "{\"temperature\": 0.5}";
    std::fs::write(dir.path().join("generation_config.json"), own).unwrap();
    let gguf = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gguf/tiny.gguf");
    for input in [".", gguf.to_str().unwrap()] {
        fails(
            dir.path(),
            &["convert", input, "-o", "other"],
            "already there",
        );
    }
    let mut names: Vec<_> = std::fs::read_dir(&other)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(
        names,
        ["config.json", "generation_config.json", "model.safetensors"]
    );
    let kept = std::fs::read_to_string(other.join("generation_config.json"));
    assert_eq!(kept.unwrap(), "{}");
}

#[cfg(feature = "serve")]
#[test]
fn a_server_takes_no_count_that_no_machine_has_and_no_key_that_is_not_text() {
    use std::os::unix::ffi::OsStrExt;
    let dir = folder();
    for [flag, value] in [
        ["--running", "9223372036854775807"],
        ["--max-body", "17592186044416"],
    ] {
        fails(dir.path(), &["serve", "-m", ".", flag, value], flag);
    }
    // It would serve everyone.
    let output = Command::new(env!("CARGO_BIN_EXE_segattn"))
        .current_dir(dir.path())
        .args(["serve", "-m", ".", "--port", "0"])
        .env("SEGATTN_API_KEY", std::ffi::OsStr::from_bytes(b"k\xff"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("SEGATTN_API_KEY"), "{said}");
}

#[test]
fn a_limit_of_file_sizes_is_an_error_as_a_full_disk_is() {
    let dir = folder();
    let script = "ulimit -f 0; exec \"$0\" score -m . --tokens t.json -o out";
    let output = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_segattn")])
        .current_dir(dir.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("cannot write out"), "{said}");
}

#[test]
fn what_stands_where_a_run_writes_is_found_before_the_first_step() {
    let dir = folder();
    let run = dir.path().join("run");
    std::fs::create_dir(&run).unwrap();
    let train = [
        "train",
        "--data.train",
        "t.txt",
        "--model.folder",
        ".",
        "--training.batch",
        "1",
    ];
    let train = [
        &train[..],
        &["--training.output", "run", "--training.steps", "1"],
    ]
    .concat();
    // Whose end never comes.
    std::os::unix::fs::symlink("/dev/full", run.join("metrics.jsonl")).unwrap();
    fails(dir.path(), &train, "metrics.jsonl: expected a regular file");
    std::fs::remove_file(run.join("metrics.jsonl")).unwrap();
    std::fs::create_dir(run.join("loss.svg")).unwrap();
    fails(dir.path(), &train, "loss.svg");
    assert!(!run.join("metrics.jsonl").exists());
    std::fs::remove_dir(run.join("loss.svg")).unwrap();
    printed(dir.path(), &train);
}
