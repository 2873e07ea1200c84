//! Mutation testing: plants one bug at a time into a kernel's text, so that a test can show it would be caught.
//!
//! A rule says what to look for and what to do with it; every occurrence outside comments gives one mutant. The
//! kernels stay free of any trace of this.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// What a rule does with an occurrence.
#[derive(Clone, Debug)]
pub enum Change {
    /// Removes the statement that begins with the text, up to its semicolon.
    DropStatement,
    /// Puts another text in its place.
    Replace(&'static str),
}

/// A kind of bug.
#[derive(Clone, Debug)]
pub struct Rule {
    /// The text to look for.
    pub find: &'static str,
    /// What to do with it.
    pub change: Change,
}

/// A kernel text with one bug in it.
#[derive(Clone, Debug)]
pub struct Mutant {
    /// The text that was looked for.
    pub find: &'static str,
    /// What was done.
    pub change: Change,
    /// Line of the bug, from 1.
    pub line: usize,
    /// The whole text, bug included; the number of lines is unchanged.
    pub text: String,
}

/// A rule that removes statements.
pub const fn drop_statement(find: &'static str) -> Rule {
    Rule {
        find,
        change: Change::DropStatement,
    }
}

/// A rule that replaces a text.
pub const fn replace(find: &'static str, by: &'static str) -> Rule {
    Rule {
        find,
        change: Change::Replace(by),
    }
}

/// Every mutant of `text`, rule by rule.
pub fn mutants(text: &str, rules: &[Rule]) -> Vec<Mutant> {
    rules
        .iter()
        .flat_map(|rule| occurrences(text, rule.find).filter_map(|at| apply(text, rule, at)))
        .collect()
}

/// Plants the bugs two at a time, each with the name of its file, and says of each whether `is_caught` (which also gets
/// its number); returns those that were not.
pub fn plant<T: Sync>(
    bugs: &[(T, Mutant)],
    file: impl Fn(&T) -> &str + Sync,
    is_caught: impl Fn(&T, &Mutant, usize) -> bool + Sync,
) -> Vec<String> {
    let (next, survivors) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some((target, mutant)) = bugs.get(index) else {
                return;
            };
            let Mutant {
                line, find, change, ..
            } = mutant;
            let bug = format!("{}:{line}: {find:?} {change:?}", file(target));
            if is_caught(target, mutant, index) {
                println!("caught: {bug}");
            } else {
                println!("SURVIVED: {bug}");
                let mut list = survivors.lock().unwrap_or_else(PoisonError::into_inner);
                list.push(bug);
            }
        }
    };
    std::thread::scope(|scope| (0..2).for_each(|_| drop(scope.spawn(work))));
    let survivors = survivors
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    let caught = bugs.len() - survivors.len();
    println!("{caught} of {} planted bugs caught", bugs.len());
    survivors
}

/// Where `find` occurs outside comments.
fn occurrences<'a>(text: &'a str, find: &'a str) -> impl Iterator<Item = usize> + 'a {
    let in_code = |&at: &usize| {
        let line_start = text[..at].rfind('\n').map_or(0, |end| end + 1);
        !text[line_start..at].contains("//")
    };
    text.match_indices(find).map(|(at, _)| at).filter(in_code)
}

fn apply(text: &str, rule: &Rule, at: usize) -> Option<Mutant> {
    let (end, by) = match rule.change {
        Change::Replace(by) => (at + rule.find.len(), by.to_string()),
        Change::DropStatement => {
            let end = at + text[at..].find(';')?;
            // The semicolon stays: the statement may be all there is under an `if`.
            (end, "\n".repeat(text[at..end].matches('\n').count()))
        }
    };
    let line = text[..at].matches('\n').count() + 1;
    let text = format!("{}{by}{}", &text[..at], &text[end..]);
    Some(Mutant {
        find: rule.find,
        change: rule.change.clone(),
        line,
        text,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_occurrence_outside_comments_gives_one_mutant_with_the_same_lines() {
        let text = "a;\nif (x) wait(\n  1);\n// wait(2);\nwait(3);\n";
        let found = mutants(text, &[drop_statement("wait("), replace("a", "b")]);
        let texts: Vec<&str> = found.iter().map(|m| m.text.as_str()).collect();
        let expected = [
            "a;\nif (x) \n;\n// wait(2);\nwait(3);\n",
            "a;\nif (x) wait(\n  1);\n// wait(2);\n;\n",
            "b;\nif (x) wait(\n  1);\n// wait(2);\nwait(3);\n",
            "a;\nif (x) wbit(\n  1);\n// wait(2);\nwait(3);\n",
            "a;\nif (x) wait(\n  1);\n// wait(2);\nwbit(3);\n",
        ];
        assert_eq!(texts, expected);
        assert_eq!(
            found.iter().map(|m| m.line).collect::<Vec<_>>(),
            [2, 5, 1, 2, 5]
        );
    }
}
