//! Many planted bugs: which were caught, kernel file by kernel file, and why the others were not.

use std::fmt;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use super::Mutant;
use super::trial::Outcome;

/// Names a file to which every campaign appends its [`Row`]s (`sim/planted` makes the table of them).
pub const ROWS: &str = "SEGATTN_PLANTED_ROWS";
/// Names the one kernel file into which bugs are planted; all of them if unset.
pub const ONLY: &str = "SEGATTN_PLANTED_FILE";

/// Names how many bugs are tried at a time, each within 3 GiB; two if unset.
pub const JOBS: &str = "SEGATTN_PLANTED_JOBS";

/// A bug that was not caught.
#[derive(Clone, Debug)]
pub struct Survivor {
    /// File, line, and what was done there.
    pub bug: String,
    /// Why it cannot be seen, if that is known.
    pub reason: Option<&'static str>,
}

/// What became of the bugs planted into one kernel file.
#[derive(Clone, Debug)]
pub struct Row {
    /// The file in `kernels/`.
    pub file: String,
    /// Bugs planted.
    pub planted: usize,
    /// Those not caught.
    pub survivors: Vec<Survivor>,
}

impl fmt::Display for Row {
    /// Fields between tabs: file, planted, caught, each survivor with its reason.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let caught = self.planted - self.survivors.len();
        write!(f, "{}\t{}\t{caught}", self.file, self.planted)?;
        self.survivors
            .iter()
            .try_for_each(|Survivor { bug, reason }| {
                write!(f, "\t{bug}: {}", reason.unwrap_or("NO REASON KNOWN"))
            })
    }
}

impl Row {
    /// Adds the row to the file that [`ROWS`] names, if it is set. Panics if that cannot be written.
    pub fn record(&self) {
        let Some(path) = std::env::var_os(ROWS) else {
            return;
        };
        let file = std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(&path);
        let mut file = file.unwrap_or_else(|e| panic!("{}: {e}", Path::new(&path).display()));
        writeln!(file, "{self}").unwrap_or_else(|e| panic!("{}: {e}", Path::new(&path).display()));
    }
}

/// Whether bugs are to be planted into a kernel file.
pub fn is_wanted(file: &str) -> bool {
    std::env::var_os(ONLY).is_none_or(|only| only == file)
}

/// How many bugs are tried at a time. Panics if [`JOBS`] is no number above zero.
fn jobs() -> usize {
    let Some(value) = std::env::var_os(JOBS) else {
        return 2;
    };
    let number = value.to_str().and_then(|text| text.parse().ok());
    number
        .filter(|jobs| *jobs > 0)
        .unwrap_or_else(|| panic!("{JOBS}: expected a number above zero, got {value:?}"))
}

/// Plants bugs into a file, a few at a time: `attempt` tries one, which also gets its number, and `reason` says why one
/// that survives does.
pub fn plant(
    file: &str,
    bugs: &[Mutant],
    attempt: impl Fn(&Mutant, usize) -> Outcome + Sync,
    reason: impl Fn(&Mutant) -> Option<&'static str> + Sync,
) -> Row {
    let (next, survivors) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(mutant) = bugs.get(index) else {
                return;
            };
            let Mutant {
                line, find, change, ..
            } = mutant;
            let bug = format!("{file}:{line}: {find:?} {change:?}");
            let outcome = attempt(mutant, index);
            println!("{outcome:?}: {bug}");
            if outcome == Outcome::Survived {
                let reason = reason(mutant);
                let mut list = survivors.lock().unwrap_or_else(PoisonError::into_inner);
                list.push((index, Survivor { bug, reason }));
            }
        }
    };
    std::thread::scope(|scope| (0..jobs()).for_each(|_| drop(scope.spawn(work))));
    let mut survivors = survivors
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    survivors.sort_by_key(|(index, _)| *index);
    let row = Row {
        file: file.to_string(),
        planted: bugs.len(),
        survivors: survivors
            .into_iter()
            .map(|(_, survivor)| survivor)
            .collect(),
    };
    row.record();
    row
}

/// Panics unless at least 95% of the bugs were caught and every survivor has a reason.
pub fn assert_nearly_all_caught(rows: &[Row]) {
    let planted: usize = rows.iter().map(|row| row.planted).sum();
    let survivors: Vec<&Survivor> = rows.iter().flat_map(|row| &row.survivors).collect();
    let few = survivors.len() * 20 <= planted;
    let known = survivors.iter().all(|survivor| survivor.reason.is_some());
    let count = survivors.len();
    assert!(
        few && known,
        "{count} of {planted} survived:\n{survivors:#?}"
    );
}

#[cfg(test)]
mod tests {
    use super::super::{mutants, replace};
    use super::*;

    #[test]
    fn a_row_counts_the_caught_and_names_the_survivors_with_their_reasons() {
        let bugs = mutants("a\nb\na\n", &[replace("a", "x"), replace("b", "y")]);
        let attempt = |mutant: &Mutant, _| match mutant.find {
            "a" if mutant.line == 1 => Outcome::OutOfTime,
            _ => Outcome::Survived,
        };
        let reason = |mutant: &Mutant| (mutant.find == "b").then_some("never read");
        let row = plant("x.cu", &bugs, attempt, reason);
        assert_eq!((row.planted, row.survivors.len()), (3, 2));
        let text = row.to_string();
        assert!(text.starts_with("x.cu\t3\t1\t"), "{text}");
        assert!(
            text.contains("x.cu:2: \"b\" Replace(\"y\"): never read"),
            "{text}"
        );
        assert!(text.contains("Replace(\"x\"): NO REASON KNOWN"), "{text}");
    }
}
