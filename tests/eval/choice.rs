//! Multiple choice by log-probability, on files in the form of LongBench v2.

use crate::common::{config_of, model_on, values};
use segattn::device::cpu::Cpu;
use segattn::eval::EvalError;
use segattn::eval::choice::{LETTERS, Question, Reading, read};
use segattn::model::config::ModelConfig;
use segattn::model::session::score;

/// A token a byte, and one before a text.
fn encode(text: &str, framed: bool) -> Result<Vec<u32>, EvalError> {
    let before = framed.then_some(256);
    Ok(before
        .into_iter()
        .chain(text.bytes().map(u32::from))
        .collect())
}

fn line(id: usize, answer: &str, context: &str) -> serde_json::Value {
    let difficulty = ["easy", "hard"][id % 2];
    serde_json::json!({
        "_id": id.to_string(), "domain": "d", "sub_domain": "s", "difficulty": difficulty,
        "length": "short", "question": format!("Which {id}?"), "choice_A": "one", "choice_B": "two",
        "choice_C": "three", "choice_D": "four", "answer": answer, "context": context,
    })
}

fn questions() -> Vec<Question> {
    let all: Vec<_> = (0..4)
        .map(|i| line(i, LETTERS[i], &"Some words. ".repeat(3 + i)))
        .collect();
    read(&serde_json::Value::from(all).to_string()).unwrap()
}

#[test]
fn the_choice_is_the_letter_with_the_best_score_of_the_whole_text() {
    // The break stands where the model's configuration says, and what is behind it may be read again.
    for (suffix, times) in [(0, 0), (5, 0), (5, 2)] {
        let mut config = config_of(false, 8);
        config.vocab_size = 257;
        let segment = config.segment.as_mut().unwrap();
        (segment.break_after_prompt, segment.prompt_suffix_len) = (true, suffix);
        segment.reread_suffix = times;
        config.validate().unwrap();
        choices_have_the_best_scores(&config);
    }
}

fn choices_have_the_best_scores(config: &ModelConfig) {
    let model = model_on(Cpu, config, &values(config, 3));
    let reading = Reading {
        encode: &encode,
        longest: None,
        segments_per_step: 2,
    };
    let questions = questions();
    let report = reading.run(&model, &questions, |_| ()).unwrap();
    let mut right = 0;
    for (question, choice) in questions.iter().zip(&report.choices) {
        let prompt = reading.prompt(question).unwrap();
        let scores = LETTERS.map(|letter| {
            let mut whole = prompt.tokens.clone();
            whole.extend(letter.bytes().map(u32::from));
            let (own, count) = (config.prompt_break(), prompt.tokens.len());
            let (breaks, rereads) = (own.of(count), own.rereads_of(count));
            let sequence = segattn::model::segmentation::Sequence {
                tokens: &whole,
                breaks: breaks.as_slice(),
                rereads: &rereads,
            };
            *score(&model, sequence, 1).unwrap().last().unwrap()
        });
        let bits = |x: f64| (x as f32).to_bits();
        assert_eq!(choice.log_probabilities.map(bits), scores.map(f32::to_bits));
        let best = (0..4)
            .max_by(|a, b| scores[*a].total_cmp(&scores[*b]))
            .unwrap();
        assert_eq!(choice.chosen, LETTERS[best]);
        assert_eq!(
            (choice.prompt_tokens, choice.left_out),
            (prompt.tokens.len(), 0)
        );
        right += usize::from(choice.chosen == choice.answer);
    }
    let names: Vec<(&str, usize)> = report
        .groups
        .iter()
        .map(|g| (g.name.as_str(), g.count))
        .collect();
    assert_eq!(names, [("all", 4), ("easy", 2), ("hard", 2), ("short", 4)]);
    assert_eq!(report.groups[0].score, 25.0 * right as f64);
}

#[test]
fn of_a_long_text_the_middle_is_left_out() {
    let context: String = ('a'..='z').collect();
    let question = read(&line(1, "B", &context).to_string()).unwrap().remove(0);
    let reading = |longest| Reading {
        encode: &encode,
        longest,
        segments_per_step: 1,
    };
    let whole = reading(None).prompt(&question).unwrap();
    let text: String = whole.tokens[1..]
        .iter()
        .map(|t| char::from(*t as u8))
        .collect();
    assert!(
        text.contains("\n\nabc") && text.ends_with("D) four\nThe letter of the right answer: ")
    );
    assert_eq!(whole.letters, LETTERS.map(|l| u32::from(l.as_bytes()[0])));
    let cut = reading(Some(whole.tokens.len() - 6))
        .prompt(&question)
        .unwrap();
    assert_eq!(
        (cut.tokens.len(), cut.left_out),
        (whole.tokens.len() - 6, 6)
    );
    let text: String = cut.tokens[1..]
        .iter()
        .map(|t| char::from(*t as u8))
        .collect();
    assert!(text.contains("\n\nabcdefghijqrstuvwxyz\n\n"), "{text}");
    let failed = reading(Some(20)).prompt(&question).unwrap_err();
    assert!(
        failed.to_string().contains("tokens for the question 1"),
        "{failed}"
    );
}

#[test]
fn files_of_questions_are_checked() {
    let lines = format!("{}\n\n{}\n", line(0, "A", "x"), line(1, " D", "y"));
    assert_eq!(read(&lines).unwrap().len(), 2);
    let refused = |text: &str, expected: &str| {
        let failed = read(text).unwrap_err().to_string();
        assert!(failed.contains(expected), "{failed}");
    };
    refused(&line(0, "E", "x").to_string(), "one of A, B, C, D");
    refused("[]", "at least one");
    refused("{}", "missing field");
    refused("not JSON", "a JSON array of questions");
}
