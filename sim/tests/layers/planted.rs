//! The layers' kernels with one bug at a time: each is run by this program's own tests, in a process of its own, since
//! a kernel with a bug may do anything.

use std::path::Path;
use std::process::Command;

use segattn_sim::mutate::Mutant;
use segattn_sim::mutate::campaign::{self, Row};
use segattn_sim::mutate::target::{self, Prepared};
use segattn_sim::mutate::trial::{Allowance, Outcome};

use super::common::{PLANTED, kernels_folder, source};
use super::planted_rules::{SURVIVORS, TARGETS, Target};

/// One bug in so many is planted by the quick test.
const QUICK: usize = 48;

/// Does something with how the target's bugs are tried.
fn with<R>(target: &Target, action: impl FnOnce(&Prepared) -> R) -> R {
    action(&Prepared::new(target::Target {
        kernels: &kernels_folder(),
        file: target.file,
        scratch: &Path::new(env!("CARGO_TARGET_TMPDIR")).join("planted"),
        adapt: &str::to_string,
        sources: &|folder| {
            let kernels = target.kernels.iter();
            kernels.map(|kernel| source(folder, kernel, true)).collect()
        },
        tests: &|folder| {
            let mut tests = Command::new(std::env::current_exe().expect("this program"));
            tests
                .args(target.tests)
                .args(["--test-threads", "1"])
                .env(PLANTED, folder);
            tests
        },
        allowance: Allowance::default(),
    }))
}

/// Why a bug survives, if that is known.
fn reason(target: &Target, mutant: &Mutant) -> Option<&'static str> {
    let same = |[file, find, _]: &&[&str; 3]| (*file, *find) == (target.file, mutant.find);
    SURVIVORS.iter().find(same).map(|[_, _, reason]| *reason)
}

fn plant(target: &Target, bugs: &[Mutant]) -> Row {
    with(target, |how| {
        let attempt =
            |bug: &Mutant, index| how.attempt(Some(bug), &format!("{}-{index}", target.file));
        campaign::plant(target.file, bugs, attempt, |bug| reason(target, bug))
    })
}

#[test]
fn without_a_bug_a_copy_of_the_kernels_passes() {
    let outcome = with(&TARGETS[0], |how| how.attempt(None, "none"));
    assert_eq!(outcome, Outcome::Survived);
}

#[test]
fn a_few_planted_bugs_are_all_caught() {
    let mut count = 0;
    for target in &TARGETS {
        let mut bugs = with(target, |how| how.mutants(target.rules));
        bugs.retain(|bug| reason(target, bug).is_none());
        bugs.retain(|_| {
            count += 1;
            count % QUICK == 1
        });
        let row = plant(target, &bugs);
        assert!(row.survivors.is_empty(), "{row}");
    }
}

/// `sim/planted` runs it and says how long that takes.
#[test]
#[ignore = "minutes; run by sim/planted"]
fn at_least_95_percent_of_all_planted_bugs_are_caught() {
    let wanted = TARGETS.iter().filter(|t| campaign::is_wanted(t.file));
    let rows = wanted.map(|target| plant(target, &with(target, |how| how.mutants(target.rules))));
    campaign::assert_nearly_all_caught(&rows.collect::<Vec<_>>());
}
