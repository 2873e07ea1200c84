//! Experiments: their definitions, the smoke run of each, how a run goes on, and the reports of rows.
#![cfg(feature = "cli")]

mod training;

use std::path::{Path, PathBuf};
use std::process::Command;

use segattn::experiment::{Arm, Definition, ExperimentError, Row, rows};
use segattn::train::config::DistillationSection;
use training::{segattn, succeed};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The definitions that are in the repository.
fn definitions() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root().join("experiments")).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    let mut paths: Vec<_> = paths
        .filter(|p| p.extension().is_some_and(|e| e == "toml"))
        .collect();
    paths.sort();
    assert!(!paths.is_empty());
    paths
}

fn reproduce(experiment: &Path, work: &Path) -> Command {
    let mut command = segattn();
    command.current_dir(root()).arg("reproduce").arg(experiment);
    command.arg("--work").arg(work).arg("--smoke");
    command
}

/// Runs the smoke version of an experiment, and checks that every arm has the rows that its definition asks for.
///
/// In an experiment on retrieval they have the share of what was asked for that was selected, and so has the report.
fn smoke(name: &str) {
    let work = tempfile::tempdir().unwrap();
    let path = root().join(format!("experiments/{name}.toml"));
    succeed(reproduce(&path, work.path()));
    let file = work.path().join("rows.jsonl");
    let rows = rows::read(&file).unwrap();
    let definition = Definition::load(&path, true, &[]).unwrap();
    for (arm, seed) in definition.runs() {
        let mut of_arm = rows.iter().filter(|r| r.arm == arm.name && r.seed == seed);
        let trained = definition.line(arm).iter().any(|arm| arm.trains);
        assert!(
            of_arm.clone().count() >= arm.evaluations.len(),
            "{}",
            arm.name
        );
        assert!(
            of_arm.all(|r| r.value.is_some()
                && (r.tokens > 0) == trained
                && (r.gpu_seconds > 0.0) == trained),
            "{}: {rows:?}",
            arm.name
        );
    }
    // Nothing is left to do.
    let before = std::fs::read(&file).unwrap();
    succeed(reproduce(&path, work.path()));
    assert_eq!(std::fs::read(&file).unwrap(), before);
    let report = page(&file, work.path());
    for arm in &definition.arms {
        assert!(
            report.contains(&format!("\n| {} |", arm.name)),
            "{}:\n{report}",
            arm.name
        );
    }
    let recalls: Vec<f64> = rows.iter().filter_map(|row| row.recall).collect();
    assert_eq!(report.contains("\nOf it selected"), !recalls.is_empty());
    if ["needles", "windows"].contains(&name) {
        // Of prompts of ten segments the heads of random weights select a part of some needles, and nothing of others.
        let [least, most] = [f64::min, f64::max].map(|f| recalls.iter().copied().fold(0.2, f));
        assert!(least < 0.1 && most > 0.3, "{recalls:?}");
    }
}

/// The report of a file of rows. Its figures are there.
fn page(rows: &Path, out: &Path) -> String {
    let mut command = segattn();
    command
        .current_dir(root())
        .arg("report")
        .arg(rows)
        .arg("--out")
        .arg(out);
    let printed = String::from_utf8(succeed(command).stdout).unwrap();
    let text = std::fs::read_to_string(printed.trim()).unwrap();
    let links = text
        .split("](")
        .skip(1)
        .filter_map(|rest| rest.split(')').next());
    let mut figures = 0;
    for link in links.filter(|link| link.ends_with(".svg")) {
        let svg = std::fs::read_to_string(out.join(link)).unwrap();
        assert!(svg.starts_with("<svg") && !svg.contains("NaN"), "{link}");
        figures += 1;
    }
    assert!(figures > 0, "{text}");
    text
}

macro_rules! smoke {
    ($($name:ident),*) => {
        $(#[test]
        fn $name() {
            smoke(stringify!($name));
        })*

        #[test]
        fn every_experiment_has_a_smoke_run_here() {
            let names: Vec<String> = definitions()
                .iter()
                .map(|path| path.file_stem().unwrap().to_string_lossy().into_owned())
                .collect();
            let mut tested = [$(stringify!($name)),*];
            tested.sort_unstable();
            assert_eq!(names, tested);
        }
    };
}

smoke!(
    main,
    beyond,
    cap,
    layers,
    depth,
    distill,
    far,
    heads,
    keys,
    needles,
    past,
    pool,
    queries,
    relay,
    relay_small,
    rows,
    short,
    suffix,
    whole,
    windows
);

#[test]
fn weights_that_are_gone_are_trained_again_for_the_arms_that_begin_with_them() {
    let work = tempfile::tempdir().unwrap();
    let path = root().join("experiments/main.toml");
    let run = || {
        let mut command = reproduce(&path, work.path());
        command.args(["--set", "seeds=[1]"]);
        succeed(command);
        rows::read(&work.path().join("rows.jsonl")).unwrap()
    };
    let results = |rows: &[Row]| {
        let of = |row: &Row| (row.arm.clone(), row.task.clone(), row.length, row.value);
        let mut all: Vec<_> = rows.iter().map(of).collect();
        all.sort_by(|a, b| a.partial_cmp(b).unwrap());
        all
    };
    let before = run();
    let file = work.path().join("rows.jsonl");
    let text = std::fs::read_to_string(&file).unwrap();
    let kept = text
        .lines()
        .filter(|line| !line.contains("\"arm\":\"misaligned\""));
    let kept: String = kept.map(|line| format!("{line}\n")).collect();
    std::fs::write(&file, kept).unwrap();
    for entry in std::fs::read_dir(work.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.join("trained.json").exists() {
            std::fs::remove_dir_all(path).unwrap();
        }
    }
    assert_eq!(results(&run()), results(&before));
    let trained = |arm: &str| {
        let mut entries = std::fs::read_dir(work.path()).unwrap();
        entries.any(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            name.starts_with(arm) && path.join("trained.json").exists()
        })
    };
    assert!(trained("full-") && !trained("aligned-"));
}

#[test]
fn definitions_hold_at_full_size_too() {
    for path in definitions() {
        let definition = Definition::load(&path, false, &[]).unwrap_or_else(|e| panic!("{e}"));
        assert!(!definition.description.trim().is_empty());
        let mut command = segattn();
        command
            .current_dir(root())
            .arg("reproduce")
            .arg(&path)
            .arg("--dry-run");
        let printed = String::from_utf8(succeed(command).stdout).unwrap();
        let arms = definition.arms.iter();
        assert!(
            arms.clone().all(|arm| printed.contains(&arm.name)),
            "{printed}"
        );
        // An arm that trains and has no estimate would start in any time that is left.
        assert!(
            arms.clone()
                .all(|arm| !arm.trains || arm.minutes.train > 0.0)
        );
        assert!(arms.clone().all(|arm| arm.minutes.eval > 0.0));
    }
}

const SMALL: &str = r#"
description = "Two arms."
model = "tiny"
seeds = [1]
baseline = "a"
minutes = { train = 1.0, eval = 0.5 }
[train.model.shape]
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
[train.model.segment]
segment_len = 16
prior_len = 8
past_len = 8
past_heads = ["1.0"]
[train.data]
train = ["docs/contract.md"]
[train.training]
steps = 40
batch = 2
sequence_len = 64
[train.checkpoint]
every = 2
[[eval]]
name = "loss"
task = "perplexity"
data = "docs/architecture.md"
lengths = [64, 96]
[[arm]]
name = "a"
[[arm]]
name = "b"
train.training.tbptt = 0
[smoke]
seeds = [1]
"#;

fn parse(text: &str) -> Result<Definition, ExperimentError> {
    Definition::parse("small", text, false, &[])
}

#[test]
fn an_arm_is_its_keys_over_the_experiments() {
    let text = SMALL.to_owned()
        + "[smoke.train.training]\nsteps = 3\n[smoke.arm.b.train.training]\ntbptt = 2\n\
           [smoke.eval.loss]\nlengths = [7]\n";
    let [large, small] =
        [false, true].map(|smoke| Definition::parse("x", &text, smoke, &[]).unwrap());
    let config = |definition: &Definition, arm: &str| {
        let arm = definition.arm(arm).unwrap();
        arm.config(3, Path::new("m"), None, Path::new("o")).unwrap()
    };
    let [a, b] = ["a", "b"].map(|arm| config(&large, arm).training);
    assert_eq!((a.steps, a.tbptt, a.seed), (40, 1, 3));
    assert_eq!((b.steps, b.tbptt, b.batch), (40, 0, 2));
    let b = config(&small, "b").training;
    assert_eq!((b.steps, b.tbptt), (3, 2));
    assert_eq!(
        small.arms[0].evaluations[0].flags["lengths"].to_string(),
        "[7]"
    );
    let set = [("train.training.steps".to_owned(), "9".to_owned())];
    let set = Definition::parse("x", &text, true, &set).unwrap();
    assert_eq!(config(&set, "a").training.steps, 9);
}

#[test]
fn fingerprints_follow_what_changes_results_and_nothing_else() {
    let print = |text: &str, arm: usize| {
        let definition = parse(text).unwrap_or_else(|e| panic!("{e}"));
        let arm = &definition.arms[arm];
        definition.fingerprint(arm, &arm.evaluations[0])
    };
    let same = [
        SMALL.to_owned(),
        SMALL.replace("[64, 96]", "[128]"),
        SMALL.replace("Two arms", "2 arms"),
        SMALL.replace("eval = 0.5", "eval = 5.0"),
        SMALL.replace("tbptt = 0", "tbptt = 2"),
    ];
    same.iter()
        .for_each(|text| assert_eq!(print(text, 0), print(SMALL, 0)));
    let other = [
        SMALL.replace("steps = 40", "steps = 41"),
        SMALL.replace("past_len = 8", "past_len = 16"),
        SMALL.replace("docs/architecture.md", "docs/gpu.md"),
        SMALL.replace("\"tiny\"", "\"other\""),
    ];
    other
        .iter()
        .for_each(|text| assert_ne!(print(text, 0), print(SMALL, 0), "{text}"));
    assert_ne!(print(SMALL, 0), print(SMALL, 1));
}

#[test]
fn an_arm_with_a_teacher_learns_from_that_arms_weights() {
    let text = SMALL.replace(
        "name = \"b\"",
        "name = \"b\"\nteacher = \"a\"\ntrain.distillation.weight = 0.5",
    );
    let definition = parse(&text).unwrap_or_else(|e| panic!("{e}"));
    let [a, b] = &definition.arms[..] else {
        panic!("two arms")
    };
    let folder = |name| Some(Path::new(name));
    let of = |arm: &Arm| {
        let config = arm.config(1, Path::new("m"), folder("t"), Path::new("o"));
        config.unwrap().distillation
    };
    assert_eq!(of(a), DistillationSection::default());
    assert_eq!(of(b).model.as_deref(), folder("t"));
    assert_eq!(of(b).weight, 0.5);
    let names = |arm| -> Vec<&str> {
        let needed = definition.needed(arm).into_iter();
        needed.map(|arm| &arm.name[..]).collect()
    };
    assert_eq!(names(a), ["a"]);
    assert_eq!(names(b), ["a", "b"]);
    // Other weights of the teacher make other weights of the arm.
    let weights = |text: &str| {
        let definition = parse(text).unwrap();
        definition.weights(&definition.arms[1])
    };
    let longer = text.replace("name = \"a\"", "name = \"a\"\ntrain.training.steps = 41");
    assert_ne!(weights(&text), weights(&longer));
    let untaught =
        |text: &str| text.replace("teacher = \"a\"\ntrain.distillation.weight = 0.5", "");
    assert_eq!(weights(&untaught(&text)), weights(&untaught(&longer)));
}

#[test]
fn each_training_of_a_line_reads_its_data_in_another_order() {
    let text = format!(
        "{SMALL}\n[[arm]]\nname = \"run\"\nparent = \"a\"\ntrains = false\n[[arm]]\nname = \"on\"\nparent = \"run\"\n"
    );
    let definition = parse(&text).unwrap();
    let seeds = |seed| {
        let named = |name| definition.training_seed(definition.arm(name).unwrap(), seed);
        ["a", "b", "on"].map(named)
    };
    let [first, beside, on] = seeds(1);
    assert_eq!([first, beside], [1, 1]);
    assert!(on != first && !seeds(2).contains(&on), "{on}");
}

#[test]
fn wrong_definitions_name_the_key() {
    let refused = |from: &str, to: &str, words: &[&str]| {
        let text = SMALL.replacen(from, to, 1);
        assert_ne!(text, SMALL, "{from}");
        let error = parse(&text).expect_err(to).to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    refused(
        "baseline",
        "base_line",
        &["base_line", "did you mean `baseline`"],
    );
    refused(
        "\"a\"\nminutes",
        "\"c\"\nminutes",
        &["`baseline`", "the name of an arm", "c"],
    );
    refused("seeds = [1]", "seeds = []", &["`seeds`", "at least one"]);
    refused(
        "seeds = [1]",
        "seeds = [1, 1]",
        &["`seeds`", "each seed once"],
    );
    refused(
        "steps = 40",
        "stepps = 40",
        &["arm `a`", "training", "did you mean `steps`"],
    );
    refused("tbptt = 0", "tbptt = \"0\"", &["arm `b`", "training.tbptt"]);
    refused(
        "name = \"b\"",
        "name = \"a\"",
        &["`arm.name`", "each name once"],
    );
    refused(
        "name = \"b\"",
        "name = \"b/../c\"",
        &["`arm.name`", "letters"],
    );
    refused(
        "name = \"b\"",
        "name = \"b\"\nparent = \"c\"",
        &["`arm.b.parent`", "above it"],
    );
    refused(
        "name = \"b\"",
        "name = \"b\"\nteacher = \"c\"",
        &["`arm.b.teacher`", "above it"],
    );
    refused(
        "name = \"b\"",
        "name = \"b\"\nteacher = \"a\"\ntrains = false",
        &["`arm.b.teacher`", "does not train"],
    );
    refused(
        "tbptt = 0",
        "tbptt = 0\ntrain.distillation.model = \"m\"",
        &["train.distillation.model", "set by the command"],
    );
    refused(
        "tbptt = 0",
        "tbptt = 0\ntrain.distillation.weight = 0.5",
        &["distillation.model", "other keys"],
    );
    refused(
        "name = \"b\"",
        "name = \"b\"\nevals = [\"c\"]",
        &["`arm.b.evals`"],
    );
    refused(
        "steps = 40",
        "steps = 40\noutput = \"run\"",
        &["train.training.output", "set by the command"],
    );
    refused("name = \"loss\"", "names = \"loss\"", &["`eval[0].name`"]);
    refused("seeds = [1]", "seeds = [1", &["line"]);
    let error = Definition::parse(
        "x",
        &(SMALL.to_owned() + "[smoke.arm.c]\ntrains = false\n"),
        true,
        &[],
    );
    assert!(error.unwrap_err().to_string().contains("smoke.arm.c"));
}

/// A folder with the small experiment, run from the repository.
fn small(text: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small.toml");
    std::fs::write(&path, text).unwrap();
    (folder, path)
}

fn run_small(folder: &Path) -> Command {
    let mut command = reproduce(&folder.join("small.toml"), &folder.join("work"));
    command.arg("--out").arg(folder.join("rows.jsonl"));
    command
}

/// What does not depend on how fast the machine is.
fn timeless(path: &Path) -> Vec<Row> {
    let rows = rows::read(path).unwrap().into_iter();
    let without = |row: Row| Row {
        gpu_seconds: 0.0,
        eval_seconds: None,
        ..row
    };
    rows.map(without).collect()
}

#[test]
fn an_experiment_killed_at_any_moment_goes_on_to_the_same_rows() {
    let (whole, _) = small(SMALL);
    succeed(run_small(whole.path()));
    let expected = timeless(&whole.path().join("rows.jsonl"));
    assert_eq!(expected.len(), 4);
    let (killed, _) = small(SMALL);
    let mut kills = 0;
    for attempt in 0u64.. {
        assert!(attempt < 100, "it does not get on");
        let mut child = run_small(killed.path()).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(
            40 + 37 * (attempt * attempt % 11) + 20 * attempt,
        ));
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success());
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
    }
    assert!(kills > 0);
    assert_eq!(timeless(&killed.path().join("rows.jsonl")), expected);
}

#[cfg(unix)]
#[test]
fn an_interrupt_saves_and_ends_with_status_1() {
    let (folder, _) = small(&SMALL.replace("steps = 40", "steps = 100000"));
    let mut command = run_small(folder.path());
    training::heed_interrupts(&mut command);
    let mut child = command.spawn().unwrap();
    let work = folder.path().join("work");
    let begun = || {
        let names = std::fs::read_dir(&work)
            .ok()?
            .map(|entry| entry.unwrap().path());
        names
            .into_iter()
            .find(|path| training::losses_len(path) > 3)
    };
    let run = loop {
        match begun() {
            Some(run) => break run,
            None => std::thread::sleep(std::time::Duration::from_millis(5)),
        }
        assert!(
            child.try_wait().unwrap().is_none(),
            "it ended before a step"
        );
    };
    training::send("-INT", &child);
    assert_eq!(training::wait(&mut child).code(), Some(1));
    assert!(training::newest(&run).progress.step > 0);
}

#[test]
fn arms_that_do_not_fit_into_the_time_are_not_started_and_named() {
    let (folder, _) = small(SMALL);
    let mut command = run_small(folder.path());
    command.args(["--minutes", "0.5"]);
    let said = String::from_utf8(succeed(command).stderr).unwrap();
    assert!(
        said.contains("a, seed 1: not started") && said.contains("1.5 minutes"),
        "{said}"
    );
    assert!(
        rows::read(&folder.path().join("rows.jsonl"))
            .unwrap()
            .is_empty()
    );
    // Time that ends within a training saves it, and what is done is not done again.
    let (folder, _) = small(
        &SMALL
            .replace("train = 1.0", "train = 0.0001")
            .replace("eval = 0.5", "eval = 0.0001"),
    );
    let mut command = run_small(folder.path());
    command.args(["--minutes", "0.002", "--set", "train.training.steps=2000"]);
    let said = String::from_utf8(succeed(command).stderr).unwrap();
    assert!(
        said.contains("time is up") && said.contains("a, seed 1"),
        "{said}"
    );
}

#[test]
fn wrong_use_says_what_to_do() {
    let (folder, path) = small(SMALL);
    let fails = |text: &str, args: &[&str], words: &[&str]| {
        std::fs::write(&path, text).unwrap();
        let mut command = run_small(folder.path());
        let output = command.args(args).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(
            words.iter().all(|w| said.contains(w)) && !said.contains("panicked"),
            "{said}"
        );
    };
    let flag = SMALL.replace("data = ", "dat = ");
    fails(
        &flag,
        &[],
        &["arm `a`, evaluation `loss`", "--dat", "segattn eval --help"],
    );
    let owned = SMALL.replace("data = ", "model = \"m\"\ndata = ");
    fails(&owned, &[], &["`model`", "the command sets"]);
    fails(
        SMALL,
        &["--set", "model=nowhere"],
        &["`model`", "nowhere", "not there"],
    );
    fails(SMALL, &["--set", "model"], &["KEY=VALUE"]);
    fails(SMALL, &["--minutes", "-1"], &["--minutes"]);
    // More time than a clock has is no limit.
    std::fs::write(&path, SMALL).unwrap();
    let mut command = run_small(folder.path());
    command.args(["--minutes", "2e17", "--dry-run"]);
    succeed(command);
    let twice = SMALL.replace("[64, 96]", "[64, 64]");
    fails(&twice, &[], &["each task and length once", "label"]);
    let other = "{\"experiment\": \"small\", \"arm\": \"a\", \"seed\": 1, \"tokens\": 0, \"gpu_seconds\": 0.0, \
                 \"task\": \"loss\", \"length\": 64, \"metric\": \"nats\", \"value\": 1.0, \"samples\": 1}\n";
    std::fs::write(folder.path().join("rows.jsonl"), other).unwrap();
    fails(SMALL, &[], &["other settings", "--out"]);
}

#[test]
fn names_in_rows_cannot_steer_a_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let rows = folder.path().join("rows.jsonl");
    let row = r#"{"experiment": "e", "arm": "a\u001b[31m", "seed": 1, "tokens": 0, "gpu_seconds": 0, "task": "t",
                  "length": 8, "metric": "score", "value": 0.5, "samples": 2}"#;
    std::fs::write(&rows, row.replace('\n', " ")).unwrap();
    let mut command = segattn();
    command
        .current_dir(root())
        .arg("report")
        .arg(&rows)
        .arg("--out")
        .arg(folder.path());
    succeed(command);
    for entry in std::fs::read_dir(folder.path()).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(!text.contains('\u{1b}'), "{}", path.display());
    }
}

#[test]
fn committed_pages_are_what_the_committed_rows_give() {
    let folder = root().join("experiments/results");
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let relative = path.strip_prefix(root()).unwrap();
        let out = tempfile::tempdir().unwrap();
        page(relative, out.path());
        for made in std::fs::read_dir(out.path()).unwrap() {
            let made = made.unwrap().path();
            let place = root().join("docs/results").join(made.file_name().unwrap());
            let committed = std::fs::read(&place).unwrap_or_default();
            assert!(
                committed == std::fs::read(&made).unwrap(),
                "{}: `segattn report` writes another one",
                place.display()
            );
        }
    }
}
