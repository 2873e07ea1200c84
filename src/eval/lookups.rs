//! Prompts with a statement that the answer copies, for measuring heads. Sentences are others than those of the tasks.

use super::error::EvalError;
use super::text::{distinct, key, prose};
use crate::random::Random;
use std::collections::HashSet;
use std::ops::Range;

/// A prompt with its answer, in tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lookup {
    /// Text, question and answer.
    pub tokens: Vec<u32>,
    /// Where the statement that is asked for stands in `tokens`.
    pub statement: Range<usize>,
    /// Where the answer stands in `tokens`; its first token is not the first of all.
    pub answer: Range<usize>,
}

/// A statement of a key and its value, and the question, which is the beginning of the answer.
const FORMS: [(&str, &str); 4] = [
    (
        "The code of the {k} is {v}.",
        "Question: what is the code of the {k}?\nAnswer: the code of the {k} is",
    ),
    (
        "Note: {k} was filed under {v}.",
        "Where was {k} filed? Looking it up, {k} was filed under",
    ),
    (
        "// {k}: ticket {v}",
        "// Which ticket belongs to {k}? {k}: ticket",
    ),
    ("{k} = {v}", "lookup({k}) returns"),
];
/// Statements of a prompt, of which one is asked for.
const STATEMENTS: usize = 4;
/// Sentences of a line of text.
const SENTENCES: usize = 4;
/// Distinguishes these random numbers from others of the same seed.
const PURPOSE: u8 = 0x6c;

/// The tokens of a text, with those that stand around a text where it is told so.
pub type EncodeFramed<'a> = dyn Fn(&str, bool) -> Result<Vec<u32>, EvalError> + 'a;

/// `count` prompts of about `length` tokens: prose with four statements of one form in it, and a question for one of
/// them. Each piece is encoded by itself and ends with its line, so that the places of statements are exact.
///
/// # Errors
/// What `encode` returns, and [`EvalError::Argument`] for a tokenizer without tokens for a text.
pub fn lookups(
    encode: &EncodeFramed<'_>,
    count: usize,
    length: usize,
    seed: u64,
) -> Result<Vec<Lookup>, EvalError> {
    (0..count as u64)
        .map(|i| lookup(encode, length, [seed, i]))
        .collect()
}

fn lookup(encode: &EncodeFramed<'_>, length: usize, seeds: [u64; 2]) -> Result<Lookup, EvalError> {
    let mut seed = [0; 32];
    seed[..8].copy_from_slice(&seeds[0].to_le_bytes());
    seed[8..16].copy_from_slice(&seeds[1].to_le_bytes());
    seed[31] = PURPOSE;
    let mut random = Random::from_key(seed);
    let (statement, question) = FORMS[random.below(FORMS.len())];
    let mut seen = HashSet::new();
    let facts: Vec<[String; 2]> = (0..STATEMENTS)
        .map(|_| {
            let key = distinct(&mut seen, "", || key(&mut random));
            [key, distinct(&mut seen, "", || random.number(7))]
        })
        .collect();
    let fill = |form: &str, [k, v]: &[String; 2]| form.replace("{k}", k).replace("{v}", v);
    let asked = random.below(STATEMENTS);
    let mut places: Vec<f64> = facts.iter().map(|_| random.unit()).collect();
    places.sort_by(f64::total_cmp);
    // The tokens before a text, such as BOS, and not those after it.
    let framed = encode("a", true)?;
    let plain = encode("a", false)?;
    let before = framed.windows(plain.len().max(1)).position(|w| w == plain);
    let mut tokens = framed[..before.unwrap_or(0)].to_vec();
    let (mut next, mut range) = (0, 0..0);
    while tokens.len() < length {
        while next < STATEMENTS && places[next] * length as f64 <= tokens.len() as f64 {
            let piece = encode(&format!("{}\n", fill(statement, &facts[next])), false)?;
            if next == asked {
                range = tokens.len()..tokens.len() + piece.len();
            }
            tokens.extend(piece);
            next += 1;
        }
        let line: Vec<String> = (0..SENTENCES).map(|_| prose(&mut random)).collect();
        let line = encode(&format!("{}\n", line.join(" ")), false)?;
        if line.is_empty() {
            return Err(EvalError::argument(
                "tokenizer",
                "tokens for a line of text",
                "none",
            ));
        }
        tokens.extend(line);
    }
    // Statements near the end come behind the last line.
    for (i, fact) in facts.iter().enumerate().skip(next) {
        let piece = encode(&format!("{}\n", fill(statement, fact)), false)?;
        if i == asked {
            range = tokens.len()..tokens.len() + piece.len();
        }
        tokens.extend(piece);
    }
    tokens.extend(encode(&fill(question, &facts[asked]), false)?);
    let start = tokens.len();
    tokens.extend(encode(&format!(" {}", facts[asked][1]), false)?);
    Ok(Lookup {
        answer: start..tokens.len(),
        tokens,
        statement: range,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_statement_of_a_lookup_holds_its_answer() {
        let encode = |text: &str, framed: bool| {
            let bytes = text.bytes().map(u32::from);
            Ok(match framed {
                true => [256].into_iter().chain(bytes).chain([257]).collect(),
                false => bytes.collect(),
            })
        };
        let prompts = lookups(&encode, 12, 900, 3).unwrap();
        assert_eq!(prompts, lookups(&encode, 12, 900, 3).unwrap());
        assert_ne!(prompts, lookups(&encode, 12, 900, 4).unwrap());
        for Lookup {
            tokens,
            statement,
            answer,
        } in prompts
        {
            assert_eq!(tokens.iter().filter(|t| **t > 255).count(), 1);
            assert_eq!(tokens[0], 256);
            let text = |r: Range<usize>| -> String {
                tokens[r].iter().map(|t| char::from(*t as u8)).collect()
            };
            let value = text(answer.clone());
            assert_eq!((answer.len(), answer.end), (8, tokens.len()));
            assert!(text(statement.clone()).contains(value.trim()));
            assert!(text(statement.clone()).ends_with('\n'));
            assert_eq!(text(1..tokens.len()).matches(value.trim()).count(), 2);
            assert!((900..1400).contains(&tokens.len()), "{}", tokens.len());
        }
    }
}
