//! The layers' kernels with one bug at a time: each is run by this program's own tests, in a process of its own, since
//! a kernel with a bug may do anything.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use segattn_sim::Module;
use segattn_sim::mutate::{self, Mutant};

use super::common::{PLANTED, kernels_folder, source};
use super::planted_rules::{SURVIVORS, TARGETS, Target};

/// One bug in so many is planted by the quick test.
const QUICK: usize = 16;
/// A test that takes longer than this hangs: the tests of a file without a bug take seconds.
const PATIENCE: Duration = Duration::from_secs(180);

/// A copy of the kernels in which the target's file has another text.
fn folder(target: &Target, mutant: Option<&Mutant>, name: &str) -> PathBuf {
    let to = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join("planted")
        .join(name);
    std::fs::create_dir_all(&to).expect("a folder");
    for entry in std::fs::read_dir(kernels_folder()).expect("kernels") {
        let path = entry.expect("an entry").path();
        let file = path.file_name().unwrap_or_default();
        let text = match mutant {
            Some(mutant) if file == target.file => mutant.text.clone(),
            _ => std::fs::read_to_string(&path).expect("a kernel file"),
        };
        std::fs::write(to.join(file), text).expect("a copy");
    }
    to
}

/// Whether the target's tests fail, or hang, with the kernels of a folder.
fn is_caught(target: &Target, folder: &Path) -> bool {
    let mut tests = Command::new(std::env::current_exe().expect("this program"));
    tests
        .args(target.tests)
        .args(["--test-threads", "1"])
        .env(PLANTED, folder)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = tests.spawn().expect("this program runs");
    let begin = Instant::now();
    while begin.elapsed() < PATIENCE {
        if let Some(status) = child.try_wait().expect("a child to wait for") {
            return !status.success();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill().expect("a child to end");
    child.wait().expect("a child to wait for");
    true
}

fn mutants_of(target: &Target) -> Vec<Mutant> {
    let text = std::fs::read_to_string(kernels_folder().join(target.file)).expect("a kernel file");
    mutate::mutants(&text, target.rules)
}

fn may_survive(target: &Target, mutant: &Mutant) -> bool {
    let same = |[file, find, _]: &[&str; 3]| (*file, *find) == (target.file, mutant.find);
    SURVIVORS.iter().any(same)
}

/// Plants every `stride`th bug, or all, those included that are known to survive; how many, and those not caught.
fn plant(stride: usize) -> (usize, Vec<String>) {
    let mut all: Vec<(&Target, Mutant)> = Vec::new();
    for target in &TARGETS {
        all.extend(mutants_of(target).into_iter().map(|m| (target, m)));
    }
    all.retain(|(target, mutant)| stride == 1 || !may_survive(target, mutant));
    let planted: Vec<(&Target, Mutant)> = all.into_iter().step_by(stride).collect();
    let is_caught = |target: &&Target, mutant: &Mutant, index: usize| {
        let folder = folder(target, Some(mutant), &format!("{}-{index}", target.file));
        for kernel in target.kernels {
            let compiled = Module::compile(&source(&folder, kernel, true));
            let (line, find) = (mutant.line, mutant.find);
            assert!(
                compiled.is_ok(),
                "{kernel}:{line}: {find:?} does not compile"
            );
        }
        is_caught(target, &folder)
    };
    let survivors = mutate::plant(&planted, |target| target.file, is_caught);
    (planted.len(), survivors)
}

#[test]
fn without_a_bug_a_copy_of_the_kernels_passes() {
    let target = &TARGETS[0];
    assert!(!is_caught(target, &folder(target, None, "none")));
}

#[test]
fn a_few_planted_bugs_are_all_caught() {
    let (_, survivors) = plant(QUICK);
    assert!(survivors.is_empty(), "{survivors:#?}");
}

#[test]
#[ignore = "minutes; run with --ignored"]
fn at_least_95_percent_of_all_planted_bugs_are_caught() {
    for target in &TARGETS {
        let all = mutants_of(target);
        for rule in target.rules {
            let found = all.iter().any(|mutant| mutant.find == rule.find);
            let (file, find) = (target.file, rule.find);
            assert!(
                found,
                "{file}: {find:?} occurs nowhere; bring the rule up to date"
            );
        }
    }
    let (planted, survivors) = plant(1);
    assert!(
        survivors.len() * 20 <= planted,
        "{} of {planted} survived:\n{survivors:#?}",
        survivors.len()
    );
}
