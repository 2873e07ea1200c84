//! Mutation testing: plants one bug at a time into a kernel's text, so that a test can show it would be caught.
//!
//! A rule says what to look for and what to do with it; every occurrence outside comments gives one mutant. Space
//! between the characters does not count, so a rule outlives a kernel's formatting. The kernels stay free of any trace
//! of this. A mutant may do anything, so each is tried in a process of its own ([`trial`]) on a copy of the kernels
//! ([`target`]); a [`campaign`] tries many and counts those caught, kernel file by kernel file.

pub mod campaign;
pub mod target;
pub mod trial;

use std::ops::Range;

/// What a rule does with an occurrence.
#[derive(Clone, Debug)]
pub enum Change {
    /// Removes the statement that begins with the text, or with the object whose member the text names, up to its
    /// semicolon.
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

/// Where `find` occurs outside comments, apart from space.
fn occurrences<'a>(text: &'a str, find: &'a str) -> impl Iterator<Item = Range<usize>> + 'a {
    let in_code = |at: usize| {
        let line_start = text[..at].rfind('\n').map_or(0, |end| end + 1);
        !text[line_start..at].contains("//")
    };
    let first = find.trim_start().chars().next();
    let starts = first
        .into_iter()
        .flat_map(|first| text.match_indices(first));
    starts
        .filter_map(|(at, _)| Some(at..at + prefix_len(&text[at..], find)?))
        .filter(move |found| in_code(found.start))
}

/// How many bytes of `text` spell `find`, apart from space.
fn prefix_len(text: &str, find: &str) -> Option<usize> {
    let visible = |&(_, c): &(usize, char)| !c.is_whitespace();
    let (mut len, mut text) = (0, text.char_indices().filter(visible));
    for (_, wanted) in find.char_indices().filter(visible) {
        let (at, found) = text.next()?;
        if found != wanted {
            return None;
        }
        len = at + found.len_utf8();
    }
    Some(len)
}

fn apply(text: &str, rule: &Rule, found: Range<usize>) -> Option<Mutant> {
    let (at, end, by) = match rule.change {
        Change::Replace(by) => (found.start, found.end, by),
        // The semicolon stays: the statement may be all there is under an `if`.
        Change::DropStatement => {
            let end = found.start + text[found.start..].find(';')?;
            (object_start(&text[..found.start]), end, "")
        }
    };
    let lines = |text: &str| text.matches('\n').count();
    let newlines = "\n".repeat(lines(&text[at..end]).saturating_sub(lines(by)));
    let line = lines(&text[..at]) + 1;
    let text = format!("{}{newlines}{by}{}", &text[..at], &text[end..]);
    Some(Mutant {
        find: rule.find,
        change: rule.change.clone(),
        line,
        text,
    })
}

/// Where the object begins whose member `before` ends with (`a.b[c].`), or else the end.
fn object_start(before: &str) -> usize {
    if !before.ends_with('.') {
        return before.len();
    }
    let is_part = |c: char| c.is_alphanumeric() || "._[]".contains(c);
    before.trim_end_matches(is_part).len()
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

    #[test]
    fn space_does_not_count() {
        let text = "f(a,\n  b);\ng(a, b);\n";
        let found = mutants(
            text,
            &[replace("f(a, b)", "c()"), drop_statement("g( a,b )")],
        );
        let texts: Vec<&str> = found.iter().map(|m| m.text.as_str()).collect();
        assert_eq!(texts, ["\nc();\ng(a, b);\n", "f(a,\n  b);\n;\n"]);
    }

    #[test]
    fn a_member_s_statement_begins_with_its_object() {
        let text = "if (x) shared.rings[i].wait(1);\n";
        let found = mutants(text, &[drop_statement("wait(")]);
        assert_eq!(found[0].text, "if (x) ;\n");
    }

    #[test]
    fn what_replaces_a_text_stays_before_what_follows_it() {
        let text = "sync();\n// Then the\n// next.\n";
        let found = mutants(text, &[replace("sync();\n// Then", "// Then")]);
        assert_eq!(found[0].text, "\n// Then the\n// next.\n");
    }
}
