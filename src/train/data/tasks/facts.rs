//! What is stated and asked: the kinds of tasks and their sentences.

use super::words::{Names, Parts, Style};
use crate::random::Random;

/// Statements that belong together, in the order in which they stand in the text.
#[derive(Debug)]
pub(super) struct Fact {
    pub(super) statements: Vec<String>,
    /// What is asked about them and the answer, if anything is.
    pub(super) asked: Option<(String, String)>,
}

/// A kind of task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Records,
    Entries,
    Chains,
    Lists,
    Codes,
    Lookalikes,
}

impl Kind {
    pub(super) const ALL: [Self; 6] = [
        Self::Records,
        Self::Entries,
        Self::Chains,
        Self::Lists,
        Self::Codes,
        Self::Lookalikes,
    ];
}

/// A statement, and the question about it, which is the beginning of the answer.
type Form = (&'static str, &'static str);

const RECORDS: [Form; 5] = [
    (
        "Clearance for the {k} was granted under {v}.",
        "Under what was the {k} cleared? Its clearance:",
    ),
    (
        "Note to self: whoever wants the {k} must say {v}.",
        "To get the {k}, one must say",
    ),
    (
        "// ticket of the {k}: {v}",
        "// Look up which ticket belongs to the {k}. Found:",
    ),
    (
        "Locker {k} opens with {v} only.",
        "Recall what opens locker {k}. It opens with",
    ),
    (
        "They shipped the {k} to dock {v} yesterday.",
        "To which dock went the {k}? It went to dock",
    ),
];
const ENTRIES: [Form; 4] = [
    ("{k} = {v}", "lookup({k}) returns"),
    ("\"{k}\": {v},", "stored under \"{k}\":"),
    ("set {k} to {v};", "get {k} gives"),
    ("#define {k} {v}", "expand {k} ->"),
];
/// Statements of long codes.
const CODES: [Form; 4] = [
    (
        "Firmware of the {k} was signed as {v} by its vendor.",
        "How was firmware of the {k} signed? Signed as",
    ),
    (
        "Checksum({k}) printed {v} on stdout.",
        "Rerunning Checksum({k}) printed",
    ),
    (
        "Whoever pairs with the {k} types {v} when told to.",
        "Pairing with the {k}, type",
    ),
    ("SERIAL {k} :: {v}", "serial? {k} ::"),
];
/// Statements that give a key several values, one each.
const LISTS: [Form; 3] = [
    (
        "Sighting: the {k} passed checkpoint {v}.",
        "All checkpoints that the {k} passed, in order:",
    ),
    ("append({k}, {v})", "items({k}) yields"),
    (
        "Add {v} to the inventory of {k}.",
        "Inventory of {k}, in order:",
    ),
];

/// Facts of one kind and one form, some of which are asked about. At least one is.
pub(super) fn facts(kind: Kind, random: &mut Random, names: &mut Names) -> Vec<Fact> {
    let words = |names: &mut Names, random: &mut Random| names.key(random, Style::Words);
    let identifier = |names: &mut Names, random: &mut Random| names.key(random, Style::Identifier);
    match kind {
        Kind::Records => lookups(&RECORDS, random, names, words, Names::value),
        Kind::Entries => lookups(&ENTRIES, random, names, identifier, Names::value),
        Kind::Chains => chains(random, names),
        Kind::Lists => lists(random, names),
        Kind::Codes => lookups(&CODES, random, names, words, Names::code),
        Kind::Lookalikes => {
            let parts = Parts::new(random);
            let key = |names: &mut Names, random: &mut Random| names.lookalike(random, &parts);
            let forms: &[Form] = [&RECORDS[..], &ENTRIES][random.below(2)];
            lookups(forms, random, names, key, Names::value)
        }
    }
}

fn fill(form: &str, key: &str, value: &str) -> String {
    form.replace("{k}", key).replace("{v}", value)
}

/// One to six keys with a value each; one or two are asked.
fn lookups(
    forms: &[Form],
    random: &mut Random,
    names: &mut Names,
    key: impl Fn(&mut Names, &mut Random) -> String,
    value: fn(&mut Names, &mut Random) -> String,
) -> Vec<Fact> {
    let (statement, question) = forms[random.below(forms.len())];
    let count = 1 + random.below(6);
    let fact = |i| {
        let (key, value) = (key(names, random), value(names, random));
        Fact {
            statements: vec![fill(statement, &key, &value)],
            asked: (i < 2).then(|| (fill(question, &key, ""), value)),
        }
    };
    (0..count).map(fact).collect()
}

/// One to three registers that are set to a number, each copied into others. Asked is what the last one of a chain
/// holds, or which ones hold its number.
fn chains(random: &mut Random, names: &mut Names) -> Vec<Fact> {
    let count = 1 + random.below(3);
    let fact = |i| {
        let number = names.number(random);
        let length = 2 + random.below(4);
        let registers: Vec<String> = (0..length).map(|_| names.register(random)).collect();
        let first = format!("Register {} starts as {number}.", registers[0]);
        let copies = registers
            .windows(2)
            .map(|pair| format!("Register {} copies register {}.", pair[1], pair[0]));
        let last = &registers[length - 1];
        let asked = match random.below(2) {
            0 => (
                format!("After these copies, register {last} holds"),
                number.clone(),
            ),
            _ => (
                format!("Registers that ended up with {number}:"),
                registers.join(" "),
            ),
        };
        Fact {
            statements: std::iter::once(first).chain(copies).collect(),
            asked: (i == 0).then_some(asked),
        }
    };
    (0..count).map(fact).collect()
}

/// One to three keys with two to four values each; one is asked for all of its.
fn lists(random: &mut Random, names: &mut Names) -> Vec<Fact> {
    let (statement, question) = LISTS[random.below(LISTS.len())];
    let count = 1 + random.below(3);
    let fact = |i| {
        let key = names.key(random, Style::Words);
        let values = 2 + random.below(3);
        let values: Vec<String> = (0..values).map(|_| names.number(random)).collect();
        Fact {
            statements: values.iter().map(|v| fill(statement, &key, v)).collect(),
            asked: (i == 0).then(|| (fill(question, &key, ""), values.join(", "))),
        }
    };
    (0..count).map(fact).collect()
}
