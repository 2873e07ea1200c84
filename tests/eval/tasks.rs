//! The synthetic tasks: lengths, structure as in RULER, recoverable answers, seeds; and scoring.

use segattn::eval::score::{first_word_match, interval, string_match_all, string_match_part};
use segattn::eval::{EvalError, Sample, TaskKind, TaskOptions, generate};
use std::collections::HashMap;

/// One token a word or line end: the coarsest tokenizer there is.
fn words(text: &str) -> Result<Vec<u32>, EvalError> {
    let count = text.split_whitespace().count() + text.matches('\n').count();
    Ok(vec![0; count])
}

fn bytes(text: &str) -> Result<Vec<u32>, EvalError> {
    Ok(text.bytes().map(u32::from).collect())
}

fn sample(task: TaskKind, length: usize, index: usize, seed: u64) -> Sample {
    generate(task, length, index, seed, TaskOptions::default(), &bytes).unwrap()
}

/// The text between the first paragraph and the question.
fn haystack(sample: &Sample) -> &str {
    let text = &sample.prompt[..sample.question_at];
    text.split_once("\n\n").unwrap().1
}

fn occurrences(text: &str, part: &str) -> usize {
    text.matches(part).count()
}

#[test]
fn prompts_fill_their_length_and_one_more_unit_would_not_fit() {
    for task in TaskKind::ALL {
        for (length, encode) in [
            (
                6_000,
                &bytes as &dyn Fn(&str) -> Result<Vec<u32>, EvalError>,
            ),
            (33_000, &bytes),
            (3_000, &words),
        ] {
            let sample = generate(task, length, 1, 5, TaskOptions::default(), encode).unwrap();
            let tokens = sample.tokens.len();
            assert_eq!(sample.tokens, encode(&sample.prompt).unwrap());
            assert!(tokens <= length, "{task}: {tokens} tokens of {length}");
            // The longest unit is a needle of two UUIDs; of frequent words one step may add several.
            assert!(length - tokens < 200, "{task}: {tokens} tokens of {length}");
        }
    }
}

#[test]
fn room_for_the_answer_is_kept_on_request() {
    let options = TaskOptions {
        reserve_answer: true,
        ..TaskOptions::default()
    };
    for task in TaskKind::ALL {
        let sample = generate(task, 6_000, 0, 1, options, &bytes).unwrap();
        assert!(sample.tokens.len() + task.max_new() <= 6_000);
    }
}

#[test]
fn samples_depend_on_seed_index_and_length_only() {
    for task in TaskKind::ALL {
        let base = sample(task, 5_000, 3, 9);
        assert_eq!(base, sample(task, 5_000, 3, 9));
        for other in [
            sample(task, 5_000, 4, 9),
            sample(task, 5_000, 3, 10),
            sample(task, 5_001, 3, 9),
        ] {
            assert_ne!(base.references, other.references, "{task}");
        }
    }
}

#[test]
fn needle_answers_stand_in_the_text_as_often_as_the_task_says() {
    for task in TaskKind::niah().iter().chain([&TaskKind::Passkey]) {
        for index in 0..5 {
            let sample = sample(*task, 8_000, index, 2);
            let expected = match task {
                TaskKind::NiahMultivalue | TaskKind::NiahMultiquery => 4,
                _ => 1,
            };
            assert_eq!(sample.references.len(), expected, "{task}");
            assert_eq!(sample.depths.len(), expected, "{task}");
            for reference in &sample.references {
                let is = format!("is {reference}.");
                assert_eq!(occurrences(haystack(&sample), &is), 1, "{task} {reference}");
                assert!(!sample.prompt[sample.question_at..].contains(reference.as_str()));
            }
        }
    }
}

/// (key, value) of every needle "The secret X of KEY is VALUE."
fn needles(text: &str) -> Vec<(&str, &str)> {
    let parts = text.split("The secret ").skip(1);
    parts
        .map(|p| {
            let (key, rest) = p.split_once(" of ").unwrap().1.split_once(" is ").unwrap();
            (key, rest.split_once('.').unwrap().0)
        })
        .collect()
}

#[test]
fn needle_answers_can_be_recovered_by_reading() {
    for task in TaskKind::niah() {
        let sample = sample(*task, 9_000, 7, 3);
        let all = needles(haystack(&sample));
        let question = &sample.prompt[sample.question_at..];
        let mut found: Vec<&str> = all
            .iter()
            .filter(|(key, _)| question.contains(key))
            .map(|n| n.1)
            .collect();
        found.sort_unstable();
        let mut expected: Vec<&str> = sample.references.iter().map(String::as_str).collect();
        expected.sort_unstable();
        assert_eq!(found, expected, "{task}");
        let (low, high) = match task {
            TaskKind::NiahSingle1 | TaskKind::NiahSingle2 | TaskKind::NiahSingle3 => (1, 1),
            TaskKind::NiahMultikey2 | TaskKind::NiahMultikey3 => (50, usize::MAX),
            _ => (4, 4),
        };
        assert!((low..=high).contains(&all.len()), "{task}: {}", all.len());
        let values: std::collections::HashSet<&str> = all.iter().map(|n| n.1).collect();
        assert_eq!(values.len(), all.len(), "{task}: a value stands twice");
    }
}

#[test]
fn needles_lie_at_the_depth_asked_for() {
    for depth in [0.0, 0.25, 0.5, 1.0] {
        let options = TaskOptions {
            depth: Some(depth),
            ..TaskOptions::default()
        };
        let sample = generate(TaskKind::Passkey, 20_000, 0, 1, options, &bytes).unwrap();
        let text = haystack(&sample);
        let at = text.find("The passkey is").unwrap() as f64 / text.len() as f64;
        assert!((at - depth).abs() < 0.01, "{at} for {depth}");
    }
}

#[test]
fn variables_are_found_by_following_the_chain() {
    for index in 0..5 {
        let sample = sample(TaskKind::VariableTracking, 6_000, index, 4);
        let (_, question) = sample.prompt.split_at(sample.question_at);
        let value = question.split_once("have the value ").unwrap().1;
        let value = &value[..5];
        // The worked example before has its own value.
        let text = &sample.prompt[..sample.question_at];
        let statements = text
            .split(['.', '\n'])
            .filter_map(|s| s.trim().strip_prefix("VAR ")?.split_once(" = "))
            .map(|(name, source)| (name, source.trim_start_matches("VAR ")));
        let mut known = vec![value];
        let mut found: Vec<&str> = Vec::new();
        for (name, source) in statements {
            if known.contains(&source) && !found.contains(&name) {
                known.push(name);
                found.push(name);
            }
        }
        assert_eq!(found, sample.references);
        assert_eq!(found.len(), 5);
    }
}

fn counts(text: &str) -> HashMap<&str, usize> {
    let mut counts = HashMap::new();
    for word in text.split_whitespace() {
        *counts.entry(word).or_default() += 1;
    }
    counts
}

#[test]
fn common_words_stand_thirty_times_and_others_three_times() {
    let sample = sample(TaskKind::CommonWords, 12_000, 0, 8);
    let list = sample.prompt[..sample.question_at]
        .rsplit_once("\n\n")
        .unwrap()
        .1;
    let counts = counts(list);
    assert_eq!(sample.references.len(), 10);
    for word in &sample.references {
        assert_eq!(counts[word.as_str()], 30);
    }
    let others = counts
        .iter()
        .filter(|(w, _)| !w.ends_with('.') && !sample.references.iter().any(|r| r == *w));
    let mut number = 0;
    for (word, count) in others {
        assert_eq!(*count, 3, "{word}");
        number += 1;
    }
    assert!(number > 10);
}

#[test]
fn frequent_words_are_the_three_after_the_dots() {
    for length in [2_000, 20_000] {
        let sample = sample(TaskKind::FrequentWords, length, 0, 8);
        let counts = counts(haystack(&sample));
        let mut order: Vec<(usize, &str)> = counts.iter().map(|(w, n)| (*n, *w)).collect();
        order.sort_unstable_by(|a, b| b.cmp(a));
        assert_eq!(order[0].1, "...");
        let first: Vec<&str> = order[1..4].iter().map(|o| o.1).collect();
        assert_eq!(first, sample.references);
        assert!(
            order[3].0 > order[4].0,
            "the third answer is not the only third"
        );
        // Counts fall with the square of the rank (alpha 2).
        let ratio = order[1].0 as f64 / order[3].0 as f64;
        assert!((3.0..5.5).contains(&ratio), "{ratio}");
    }
}

#[test]
fn bad_arguments_are_typed_errors() {
    let make = |task, length, depth| {
        let options = TaskOptions {
            depth,
            ..TaskOptions::default()
        };
        generate(task, length, 0, 1, options, &bytes).unwrap_err()
    };
    assert!(
        matches!(make(TaskKind::Passkey, 20, None), EvalError::TooShort { got: 20, expected, .. } if expected > 100)
    );
    for depth in [-0.1, 1.5, f64::NAN] {
        let error = make(TaskKind::Passkey, 1_000, Some(depth));
        assert!(matches!(error, EvalError::Argument { name: "depth", .. }));
    }
    let error = make(TaskKind::CommonWords, 9_000, Some(0.5));
    assert!(matches!(error, EvalError::Argument { name: "depth", .. }));
    let error = make(TaskKind::Passkey, usize::MAX, None);
    assert!(matches!(error, EvalError::Argument { name: "length", .. }));
    let nothing = |_: &str| Ok(Vec::new());
    let error = generate(
        TaskKind::Passkey,
        100,
        0,
        1,
        TaskOptions::default(),
        &nothing,
    );
    assert!(matches!(error, Err(EvalError::Tokenizer { .. })));
    assert!("niah_single_4".parse::<TaskKind>().is_err());
    for task in TaskKind::ALL {
        assert_eq!(task.name().parse::<TaskKind>().unwrap(), task);
    }
}

#[test]
fn scores_are_shares_of_references_contained_whatever_the_case() {
    let references = ["Abc", "12", "xyz", "q"].map(str::to_owned);
    assert_eq!(
        string_match_all(" it is ABC, 12\u{1}and xyz ", &references),
        0.75
    );
    assert_eq!(string_match_all("", &references), 0.0);
    assert_eq!(string_match_all("anything", &[]), 0.0);
    assert_eq!(string_match_part("only 12 here", &references), 1.0);
    assert_eq!(string_match_part("no", &references), 0.0);
}

#[test]
fn the_first_word_alone_counts_where_one_is_asked_for_exactly() {
    let references = ["K".to_owned()];
    for (prediction, score) in [
        (" K", 1.0),
        ("K. More", 1.0),
        ("k", 0.0),
        ("Key", 0.0),
        ("A K", 0.0),
        ("", 0.0),
    ] {
        assert_eq!(
            first_word_match(prediction, &references),
            score,
            "{prediction:?}"
        );
    }
}

#[test]
fn intervals_hold_the_mean_and_shrink_with_samples() {
    assert_eq!(interval(0.5, 0), (0.0, 1.0));
    // Wilson's interval of 8 in 10, by hand: (0.490, 0.943).
    let (low, high) = interval(0.8, 10);
    assert!(
        (low - 0.490).abs() < 1e-3 && (high - 0.943).abs() < 1e-3,
        "{low} {high}"
    );
    for mean in [0.0, 1.0] {
        let (low, high) = interval(mean, 20);
        assert!(low <= mean && mean <= high && high - low > 0.1);
    }
    let width = |n| interval(0.4, n).1 - interval(0.4, n).0;
    assert!(width(100) < width(10));
}

/// Pairs of bytes: cuts of a text may fall into a token.
fn pairs(text: &str) -> Result<Vec<u32>, EvalError> {
    let pair = |b: &[u8]| b.iter().fold(0, |id, b| id * 256 + u32::from(*b));
    Ok(text.as_bytes().chunks(2).map(pair).collect())
}

#[test]
fn the_tokens_of_needles_are_those_of_the_statements_that_the_answer_needs() {
    for task in TaskKind::ALL {
        for index in 0..4 {
            let options = TaskOptions::default();
            let by_bytes = generate(task, 6_000, index, 5, options, &bytes).unwrap();
            let statements: Vec<&str> = (by_bytes.needles.iter())
                .map(|r| &by_bytes.prompt[r.clone()])
                .collect();
            assert_eq!(statements.len(), by_bytes.depths.len(), "{task}");
            if task == TaskKind::VariableTracking {
                for (statement, name) in statements.iter().zip(&by_bytes.references) {
                    assert!(
                        statement.starts_with(&format!("VAR {name} = ")),
                        "{statement}"
                    );
                }
            } else if task == TaskKind::Relay {
                assert_eq!(statements, [format!("Letter: {}", by_bytes.references[0])]);
                continue;
            } else if task == TaskKind::MultiHop {
                assert!(statements[0].contains(" picked up the "), "{statements:?}");
                assert!(statements[1].contains(" gave the "), "{statements:?}");
                assert!(
                    statements[2].contains(&by_bytes.references[0]),
                    "{statements:?}"
                );
            } else {
                for (statement, value) in statements.iter().zip(&by_bytes.references) {
                    assert!(statement.starts_with("The ") && statement.contains(value));
                    assert!(statement.ends_with('.') || statement.ends_with("passkey."));
                }
            }
            // A token that holds the first or the last byte belongs to the needle.
            let by_pairs = generate(task, 3_000, index, 5, options, &pairs).unwrap();
            for range in &by_pairs.needles {
                let text = &by_pairs.prompt[range.start * 2..range.end * 2];
                assert!(
                    text.contains("The ") || text.contains("VAR ") || task == TaskKind::MultiHop,
                    "{task}: {text:?}"
                );
                assert!(text.trim_end().contains('.'), "{task}: {text:?}");
            }
        }
    }
}

#[test]
fn the_verse_asked_for_is_that_of_its_place_among_those_of_its_title() {
    for index in 0..8 {
        let sample = sample(TaskKind::Ordinal, 9_000, index, 4);
        let question = &sample.prompt[sample.question_at..];
        let ordinals = ["first", "second", "third", "fourth"];
        let place = ordinals.iter().position(|o| question.contains(o)).unwrap();
        let title = question.split_once("Answer: The ").unwrap().1;
        let title = title
            .strip_suffix(" goes:")
            .unwrap()
            .split_once(' ')
            .unwrap()
            .1;
        let verses: Vec<&str> = haystack(&sample)
            .split("The ")
            .filter_map(|s| s.strip_prefix(title)?.strip_prefix(" goes: "))
            .collect();
        assert_eq!(verses.len(), 4);
        let words: Vec<&str> = verses[place]
            .trim_end()
            .trim_end_matches('.')
            .split(' ')
            .collect();
        assert_eq!(words, sample.references);
        for word in &sample.references {
            assert_eq!(occurrences(&sample.prompt, word), 1);
        }
    }
    let options = |depth| TaskOptions {
        depth: Some(depth),
        ..TaskOptions::default()
    };
    for depth in [0.0, 0.5, 1.0] {
        let sample = generate(TaskKind::Ordinal, 9_000, 1, 4, options(depth), &bytes).unwrap();
        assert_eq!(sample.depths, [depth]);
    }
}

#[test]
fn the_thing_is_where_its_last_holder_went_last() {
    for index in 0..8 {
        let sample = sample(TaskKind::MultiHop, 9_000, index, 4);
        let question = &sample.prompt[sample.question_at..];
        let thing = question
            .split_once("Where is the ")
            .unwrap()
            .1
            .split_once(' ')
            .unwrap()
            .0;
        let (mut holder, mut places) = ("", HashMap::new());
        for sentence in haystack(&sample)
            .split(". ")
            .map(|s| s.trim_end_matches('.'))
        {
            let words: Vec<&str> = sentence.split(' ').collect();
            match words[..] {
                [who, "picked", "up", "the", what] if what == thing => holder = who,
                [who, "gave", "the", what, "to", whom] if what == thing => {
                    assert_eq!(who, holder);
                    holder = whom;
                }
                [who, "went", "to", place] => {
                    places.insert(who, place);
                }
                [_, "picked", "up", "the", _] | [_, "gave", "the", _, "to", _] => {}
                _ => panic!("{sentence:?}"),
            }
        }
        assert_eq!(places[holder], sample.references[0]);
    }
}

#[test]
fn a_letter_stands_first_and_is_asked_for_last() {
    let mut letters = HashMap::<String, usize>::new();
    for index in 0..320 {
        let sample = sample(TaskKind::Relay, 256, index, 4);
        let (text, question) = sample.prompt.split_at(sample.question_at);
        let letter = &sample.references[0];
        let filler = text.strip_prefix(&format!("Letter: {letter} ")).unwrap();
        assert!(filler.bytes().all(|b| b == b' ' || b.is_ascii_lowercase()));
        assert_eq!(question, ". Letter:");
        // At most three tokens are missing, so the question is in the last segment.
        assert!((253..=256).contains(&sample.tokens.len()));
        *letters.entry(letter.clone()).or_default() += 1;
    }
    assert_eq!(letters.len(), 16);
    assert!(letters.values().all(|n| (8..36).contains(n)), "{letters:?}");
}
