//! Tasks in training text: what is put in, where, with which weights; mixtures, and that they go on exactly.

use std::collections::HashSet;

use crate::reading::read_with;
use segattn::eval::{TaskKind, TaskOptions, generate};
use segattn::model::config::PromptBreak;
use segattn::train::config::{DataSection, MixtureSection, RelaySection, TaskSection};
use segattn::train::data::{
    Bytes, Corpus, Encode, Example, Mixture, Position, Relay, Sequences, Tasks,
};

const LEN: usize = 4096;

fn text() -> Example {
    let lines = (0..LEN).map(|i| format!("line {i} of <text>\n"));
    let text: String = lines.collect();
    Bytes.encode(&text[..LEN]).unwrap().into()
}

fn tasks(section: TaskSection) -> Tasks<'static> {
    Tasks::new(section, &Bytes, 256).unwrap()
}

fn string(tokens: &[u32]) -> String {
    tokens.iter().map(|t| char::from(*t as u8)).collect()
}

/// The lines of a sequence, each with the weights of its bytes.
fn lines(example: &Example) -> Vec<(String, Vec<f32>)> {
    let weights = example.weights.as_deref().unwrap();
    let (mut lines, mut from) = (Vec::new(), 0);
    for (i, token) in example.tokens.iter().enumerate() {
        if *token == 10 || i + 1 == example.tokens.len() {
            lines.push((
                string(&example.tokens[from..=i]),
                weights[from..=i].to_vec(),
            ));
            from = i + 1;
        }
    }
    lines
}

/// Everything that was put in, as text.
fn put_in(example: &Example) -> String {
    let lines = lines(example).into_iter();
    let lines = lines.filter(|(_, weights)| weights.iter().any(|w| *w != 1.0));
    lines.map(|(line, _)| line).collect()
}

/// For each question: where its break is, and its answer.
fn answers(example: &Example) -> Vec<(usize, String)> {
    let answer = |at: &usize| {
        let rest = string(&example.tokens[*at..]);
        (*at, rest.lines().next().unwrap().trim().to_owned())
    };
    example.breaks.iter().map(answer).collect()
}

#[test]
fn the_text_stays_in_order_and_only_answers_and_text_count() {
    let text = text();
    let tasks = tasks(TaskSection::default());
    for number in 0..40 {
        let woven = tasks.weave(text.clone(), 7, number).unwrap();
        let weights = woven.weights.clone().unwrap();
        assert_eq!((woven.tokens.len(), weights.len()), (LEN, LEN));
        // The first token of an answer weighs as much as text.
        let kept = (0..LEN).filter(|i| weights[*i] == 1.0 && !woven.breaks.contains(i));
        let kept: Vec<u32> = kept.map(|i| woven.tokens[i]).collect();
        assert!((LEN / 2..LEN).contains(&kept.len()), "{}", kept.len());
        assert!(kept == text.tokens[..kept.len()]);
        let found = answers(&woven);
        assert!((1..=9).contains(&found.len()), "{}", found.len());
        for (at, answer) in found {
            assert_eq!((weights[at - 1], weights[at]), (0.0, 1.0));
            let end = at + 1 + answer.len();
            assert!(weights[at + 1..=end].iter().all(|w| *w == 16.0));
            assert_eq!(woven.tokens[end], 10);
            let first = answer.split([' ', ',']).next().unwrap();
            let before = string(&woven.tokens[..at]);
            assert!(before.contains(first), "{answer:?} is not in {before}");
        }
    }
}

/// With a suffix the break stands that many bytes before the end of the question, and the answer's first token, which
/// is predicted behind it, counts as the others.
#[test]
fn the_end_of_a_question_is_read_after_its_break() {
    let text = text();
    let plain = tasks(TaskSection::default());
    let suffixed = tasks(TaskSection::default()).with_break(PromptBreak::before_suffix(4));
    let twice =
        tasks(TaskSection::default()).with_break(PromptBreak::before_suffix(4).with_rereads(2));
    for number in 0..10 {
        let before = plain.weave(text.clone(), 7, number).unwrap();
        let woven = suffixed.weave(text.clone(), 7, number).unwrap();
        assert_eq!(woven.tokens, before.tokens);
        let moved: Vec<usize> = before.breaks.iter().map(|at| at - 4).collect();
        assert_eq!(woven.breaks, moved);
        assert_eq!(woven.rereads, [0usize; 0]);
        let twice = twice.weave(text.clone(), 7, number).unwrap();
        let again: Vec<usize> = before.breaks.iter().flat_map(|at| [*at; 2]).collect();
        assert_eq!(twice.rereads, again);
        let rereads = Vec::new();
        assert_eq!(Example { rereads, ..twice }, woven);
        let (weights, plain) = (woven.weights.unwrap(), before.weights.unwrap());
        for at in 0..LEN {
            let first = before.breaks.contains(&at);
            assert_eq!(weights[at], if first { 16.0 } else { plain[at] });
        }
    }
}

#[test]
fn long_codes_are_asked_for_if_they_have_a_share() {
    let section = TaskSection {
        records: 0.0,
        entries: 0.0,
        chains: 0.0,
        lists: 0.0,
        codes: 1.0,
        ..TaskSection::default()
    };
    let tasks = tasks(section);
    for number in 0..10 {
        let woven = tasks.weave(text(), 5, number).unwrap();
        for (at, answer) in answers(&woven) {
            let digits = answer.chars().filter(char::is_ascii_hexdigit).count();
            assert!(
                matches!(digits, 16..=32) && digits.is_multiple_of(4),
                "{answer}"
            );
            assert!(string(&woven.tokens[..at]).contains(&answer), "{answer}");
        }
    }
}

/// The parts of the key in a line, of five letters each.
fn parts(line: &str) -> Vec<String> {
    let made = |word: &&str| word.len() == 5 && "aeiou".contains(&word[2..3]);
    let words = line.split(|c: char| !c.is_ascii_lowercase());
    let of_two: HashSet<&str> = ["bl", "dv", "fr", "gn", "kr", "pf", "sk", "tv", "vl", "zm"].into();
    let words = words.filter(made).filter(|w| of_two.contains(&w[..2]));
    words.map(str::to_owned).collect()
}

#[test]
fn lookalikes_share_their_parts_with_others_and_are_told_apart_by_all_of_them() {
    let section = TaskSection {
        records: 0.0,
        entries: 0.0,
        chains: 0.0,
        lists: 0.0,
        lookalikes: 1.0,
        ..TaskSection::default()
    };
    let tasks = tasks(section);
    let (mut asked, mut confusable) = (0, 0);
    for number in 0..20 {
        let woven = tasks.weave(text(), 5, number).unwrap();
        let whole = string(&woven.tokens);
        for (at, answer) in answers(&woven) {
            let question = whole[..at].lines().last().unwrap();
            let key = parts(question);
            assert!(key.len() >= 2, "{question}");
            let statements: Vec<&str> = whole[..at]
                .lines()
                .filter(|line| *line != question && !parts(line).is_empty())
                .collect();
            let own = statements.iter().filter(|line| parts(line) == key);
            let own: Vec<_> = own.filter(|line| line.contains(&answer)).collect();
            assert_eq!(own.len(), 1, "{question}{answer}");
            let alike =
                |line: &&str| parts(line) != key && parts(line).iter().any(|p| key.contains(p));
            asked += 1;
            confusable += usize::from(statements.iter().any(alike));
        }
    }
    assert!(
        asked > 100 && 2 * confusable > asked,
        "{confusable} of {asked}"
    );
}

#[test]
fn a_sequence_is_a_function_of_text_seed_and_number() {
    let tasks = tasks(TaskSection::default());
    let of = |seed, number| tasks.weave(text(), seed, number).unwrap();
    assert_eq!(of(1, 2), of(1, 2));
    assert_ne!(of(1, 2), of(1, 3));
    assert_ne!(of(1, 2), of(2, 2));
}

#[test]
fn every_octave_of_distances_is_as_likely_and_none_is_below_the_least() {
    let least = 512;
    let section = TaskSection {
        entries: 0.0,
        chains: 0.0,
        lists: 0.0,
        questions: 1,
        min_distance: least,
        ..TaskSection::default()
    };
    let tasks = tasks(section);
    let text: Example = Bytes.encode(&"a line\n".repeat(2400)).unwrap().into();
    let mut octaves = [0; 6];
    for number in 0..400 {
        let woven = tasks.weave(text.clone(), 3, number).unwrap();
        for (at, answer) in answers(&woven) {
            let before = string(&woven.tokens[..at]);
            let distance = at - before.find(&answer).unwrap();
            // The statement's own words before the value are not counted here.
            assert!(distance >= least - 64, "{distance}");
            octaves[(distance / least).max(1).ilog2() as usize] += 1;
        }
    }
    // Other statements between add to a distance, and a question near the start has no long one.
    assert!(
        octaves[..4].iter().all(|n| (60..250).contains(n)),
        "{octaves:?}"
    );
}

#[test]
fn a_text_without_room_or_without_lines_is_no_problem() {
    let tasks = tasks(TaskSection::default());
    for len in [0, 1, 2, 20] {
        let short: Example = vec![65; len].into();
        assert_eq!(tasks.weave(short.clone(), 1, 1).unwrap(), short);
    }
    for number in 0..20 {
        let one_line: Example = vec![65; 900].into();
        let woven = tasks.weave(one_line, 1, number).unwrap();
        assert_eq!(woven.tokens.len(), 900);
        assert!(woven.tokens[0] == 65 && !woven.breaks.is_empty());
    }
}

#[test]
fn weights_and_breaks_of_the_text_stay_with_their_tokens() {
    let text = Example {
        weights: Some((0..LEN).map(|i| i as f32 + 2.5).collect()),
        breaks: (1..40).map(|i| i * 100).collect(),
        ..text()
    };
    let woven = tasks(TaskSection::default())
        .weave(text.clone(), 1, 1)
        .unwrap();
    let weights = woven.weights.unwrap();
    let mut own = 0;
    for (i, weight) in weights.iter().enumerate() {
        if weight.fract() == 0.5 {
            assert_eq!(woven.tokens[i], text.tokens[own]);
            assert_eq!(*weight, own as f32 + 2.5);
            let is_break = text.breaks.contains(&(own + 1));
            assert!(!is_break || woven.breaks.contains(&(i + 1)), "{own}");
            own += 1;
        }
    }
    assert!(own >= LEN / 2 && woven.breaks.is_sorted());
}

/// The text without numbers and codes, of which both have some.
fn without_codes(text: &str) -> String {
    let code = |word: &str| {
        let mut letters = word.chars().filter(char::is_ascii_alphabetic);
        word.contains(|c: char| c.is_ascii_digit()) || letters.all(|c| c.is_ascii_hexdigit())
    };
    let words = text.split_whitespace().filter(|word| !code(word));
    words.collect::<Vec<_>>().join(" ")
}

/// Words of at least four letters.
fn words(text: &str) -> HashSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphabetic());
    let long = words.filter(|word| word.len() >= 4);
    long.map(str::to_lowercase).collect()
}

/// Three words in a row.
fn triples(text: &str) -> HashSet<[String; 3]> {
    let lower = text.to_lowercase();
    let words: Vec<&str> = lower
        .split(|c: char| !c.is_ascii_alphabetic())
        .filter(|word| !word.is_empty())
        .collect();
    let triple = |w: &[&str]| [w[0], w[1], w[2]].map(str::to_owned);
    words.windows(3).map(triple).collect()
}

#[test]
fn words_and_sentences_are_not_those_of_the_tests() {
    let encode = |text: &str| Ok(Bytes.encode(text).expect("bytes"));
    let mut tested = String::new();
    for task in TaskKind::ALL {
        for index in 0..4 {
            let sample = generate(task, 12_000, index, 1, TaskOptions::default(), &encode).unwrap();
            tested += &sample.prompt;
        }
    }
    let section = TaskSection {
        codes: 1.0,
        lookalikes: 1.0,
        ..TaskSection::default()
    };
    let tasks = tasks(section);
    let trained: String = (0..200)
        .map(|number| put_in(&tasks.weave(text(), 1, number).unwrap()))
        .collect();
    let (tested, trained) = (without_codes(&tested), without_codes(&trained));
    // What any English sentence may have.
    let usual = [
        "that", "which", "with", "what", "from", "went", "after", "must",
    ];
    let shared: Vec<String> = words(&tested)
        .intersection(&words(&trained))
        .cloned()
        .collect();
    let shared: Vec<&String> = shared
        .iter()
        .filter(|w| !usual.contains(&w.as_str()))
        .collect();
    assert!(shared.is_empty(), "{shared:?}");
    let (tested, trained) = (triples(&tested), triples(&trained));
    let shared: Vec<_> = tested.intersection(&trained).collect();
    assert!(shared.is_empty(), "{shared:?}");
}

fn corpus(folder: &std::path::Path) -> Corpus {
    for (name, letter) in [("a.txt", 'a'), ("b.txt", 'b')] {
        let line = format!("{}\n", letter.to_string().repeat(30));
        std::fs::write(folder.join(name), line.repeat(400)).unwrap();
    }
    let paths = ["a.txt", "b.txt"].map(|name| folder.join(name));
    read_with(&paths, &DataSection::default()).unwrap()
}

fn part(name: &str, weight: f64, tasks: Option<TaskSection>) -> MixtureSection {
    MixtureSection {
        name: name.into(),
        paths: Vec::new(),
        weight,
        tasks,
        relay: None,
    }
}

fn mixture(corpus: &Corpus) -> Mixture<'static> {
    let sections = [
        part("plain", 3.0, None),
        part("asked", 1.0, Some(TaskSection::default())),
    ];
    let cut = |i: usize| Sequences::new(corpus.documents()[i..=i].to_vec(), 700);
    Mixture::new(cut(0), &sections, vec![cut(0), cut(1)], &Bytes, 300).unwrap()
}

#[test]
fn a_mixture_draws_its_parts_by_weight_and_goes_on_exactly() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = corpus(folder.path());
    let mixture = mixture(&corpus);
    let take =
        |position: &mut Position, count| mixture.next_batch(&corpus, 5, position, count).unwrap();
    let mut position = Position::default();
    let all = take(&mut position, 400);
    assert_eq!(position.index, 400);
    let asked = all.iter().filter(|e| !e.breaks.is_empty()).count();
    assert!((70..130).contains(&asked), "{asked}");
    let passes: Vec<u64> = position.parts.iter().map(|p| p.epoch).collect();
    assert!(passes[0] > passes[1] && passes[1] > 1, "{passes:?}");
    for example in &all {
        let letter = if example.breaks.is_empty() { 97 } else { 98 };
        assert!(example.tokens.contains(&letter));
    }
    // In the middle of a pass, over a file.
    let mut first = Position::default();
    let mut again = take(&mut first, 123);
    let saved = serde_json::to_string(&first).unwrap();
    let mut resumed: Position = serde_json::from_str(&saved).unwrap();
    again.extend(take(&mut resumed, 77));
    again.extend(take(&mut resumed, 200));
    assert!(again == all && resumed == position);
    // A place in plain data is none in a mixture.
    let mut plain = Position {
        index: 3,
        ..Position::default()
    };
    let error = mixture.next_batch(&corpus, 5, &mut plain, 1).unwrap_err();
    assert!(error.to_string().contains("2 parts"), "{error}");
}

#[test]
fn without_parts_the_sequences_are_those_of_the_documents() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = corpus(folder.path());
    let sequences = Sequences::new(corpus.documents().to_vec(), 700);
    let mixture = Mixture::new(sequences.clone(), &[], Vec::new(), &Bytes, 300).unwrap();
    let (mut a, mut b) = (Position::default(), Position::default());
    let plain = sequences.next_batch(&corpus, 9, &mut a, 100).unwrap();
    assert_eq!(plain, mixture.next_batch(&corpus, 9, &mut b, 100).unwrap());
    assert_eq!(a, b);
    assert_eq!(
        serde_json::to_string(&a).unwrap(),
        r#"{"epoch":2,"index":28}"#
    );
    assert_eq!(mixture.fingerprint(), sequences.fingerprint());
}

#[test]
fn a_part_without_a_sequence_is_an_error_that_names_it() {
    let empty = || Sequences::new(Vec::new(), 0);
    let sections = [part("nothing", 1.0, None)];
    let made = Mixture::new(empty(), &sections, vec![empty()], &Bytes, 300);
    let error = made.err().unwrap().to_string();
    assert!(error.contains("data.mixture.nothing"), "{error}");
}

fn relay(segment_len: usize, distances: &[usize]) -> RelaySection {
    let distances = distances.to_vec();
    RelaySection {
        segment_len,
        distances,
    }
}

#[test]
fn a_relay_asks_in_a_later_segment_for_the_letter_that_it_begins_with() {
    let made = Relay::new(relay(32, &[1, 3]), &Bytes, 256, "relay").unwrap();
    let (mut distances, mut letters, mut places) = ([0; 4], HashSet::new(), HashSet::new());
    for number in 0..400 {
        let example = made.make(5, number);
        assert_eq!(example, made.make(5, number));
        let text = string(&example.tokens);
        let (before, letter) = text.split_at(text.len() - 1);
        let filler = before.strip_prefix(&format!("Letter: {letter}"));
        let filler = filler.unwrap().strip_suffix(". Letter: ").unwrap();
        let said = |b: u8| b == b' ' || b.is_ascii_lowercase();
        assert!(filler.bytes().all(said), "{text}");
        // Question and answer are in one segment.
        let (question, last) = (text.len() - 11, text.len() - 1);
        assert_eq!(question / 32, last / 32);
        distances[last / 32] += 1;
        letters.insert(letter.to_owned());
        places.insert(question % 32);
        let mut weights = vec![0.0; last - 1];
        weights.extend([1.0; 2]);
        assert_eq!(example.weights, Some(weights));
        assert!(example.breaks.is_empty());
    }
    assert!(distances[0] == 0 && distances[2] == 0 && distances[1].min(distances[3]) > 150);
    assert_eq!((letters.len(), places.len()), (16, 22));
    assert_ne!(made.make(5, 1), made.make(6, 1));
    let longest = (0..400).map(|n| made.make(5, n).tokens.len()).max();
    assert_eq!(longest, Some(128));
    assert_eq!(made.longest(), 127);
}

#[test]
fn words_between_are_not_those_of_the_test() {
    let words = |text: String| -> HashSet<String> {
        let words = text.split([' ', '.']).filter(|word| word.len() == 3);
        words.map(str::to_owned).collect()
    };
    let encode = |text: &str| Ok(Bytes.encode(text).expect("bytes"));
    let test = |index| {
        generate(
            TaskKind::Relay,
            4000,
            index,
            1,
            TaskOptions::default(),
            &encode,
        )
    };
    let tested: String = (0..8).map(|index| test(index).unwrap().prompt).collect();
    let made = Relay::new(relay(512, &[3]), &Bytes, 256, "relay").unwrap();
    let trained: String = (0..20).map(|n| string(&made.make(1, n).tokens)).collect();
    let (tested, trained) = (words(tested), words(trained));
    assert!(tested.len() > 400 && trained.len() > 400);
    assert_eq!(tested.intersection(&trained).count(), 0);
}

#[test]
fn a_relay_is_a_part_that_needs_no_text() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = corpus(folder.path());
    let made = MixtureSection {
        relay: Some(relay(32, &[2])),
        ..part("relay", 1.0, None)
    };
    let sections = [part("plain", 1.0, None), made];
    let none = Sequences::new(Vec::new(), 0);
    let text = Sequences::new(corpus.documents().to_vec(), 700);
    let parts = vec![text.clone(), none.clone()];
    let mixture = Mixture::new(text.clone(), &sections, parts, &Bytes, 256).unwrap();
    assert_eq!((mixture.len(), mixture.longest_made()), (text.len(), 95));
    let take = |position: &mut Position, n| mixture.next_batch(&corpus, 5, position, n).unwrap();
    let mut position = Position::default();
    let all = take(&mut position, 100);
    let asked = all.iter().filter(|e| e.weights.is_some()).count();
    assert!((30..70).contains(&asked), "{asked}");
    let mut again = Position::default();
    let mut cut = take(&mut again, 41);
    cut.extend(take(&mut again, 59));
    assert!(cut == all && again == position);
    let alone = Mixture::new(none.clone(), &sections[1..], vec![none], &Bytes, 256).unwrap();
    assert_eq!((alone.is_empty(), alone.len()), (false, 0));
}

#[test]
fn a_segment_without_room_for_a_question_is_an_error_that_names_it() {
    let error = Relay::new(relay(10, &[1]), &Bytes, 256, "data.mixture.a.relay").err();
    let error = error.unwrap().to_string();
    assert!(
        error.contains("data.mixture.a.relay.segment_len") && error.contains("at least 11"),
        "{error}"
    );
    for distances in [&[][..], &[0], &[usize::MAX], &[1 << 21]] {
        let error = Relay::new(relay(32, distances), &Bytes, 256, "relay").err();
        assert!(error.unwrap().to_string().contains("`relay.distances`"));
    }
    let error = Relay::new(relay(32, &[1]), &Bytes, 90, "relay").err();
    assert!(error.unwrap().to_string().contains("ids below 90"));
}
