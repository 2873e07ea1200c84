//! Conversations as training data: what the assistant writes is learned, and segments end before it.

use crate::reading::reading;
use segattn::model::chat::Chat;
use segattn::model::config::{ModelConfig, PromptBreak};
use segattn::model::tokenizer::Tokenizer;
use segattn::train::TrainError;
use segattn::train::config::DataSection;
use segattn::train::data::{Bytes, Conversed, Corpus, Encode, Example, Located, converse};
use std::path::Path;

const TEMPLATE: &str = "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}\
                        {{ m.content }}#{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\\n' }}{% endfor %}\
                        {% if add_generation_prompt %}[assistant]{% endif %}";

struct Templated(Chat, Tokenizer);

impl Templated {
    fn new(template: &str) -> Self {
        let json = serde_json::json!({
            "model_type": "llama", "vocab_size": 300, "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 1, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
        });
        let tokenizer = Tokenizer::bytes(&ModelConfig::from_json(json).unwrap());
        Self(Chat::of_template(template, &tokenizer).unwrap(), tokenizer)
    }
}

impl Encode for Templated {
    fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        Bytes.encode(text)
    }

    fn locate(&self, text: &str) -> Result<Vec<Located>, String> {
        Bytes.locate(text)
    }

    fn converse(&self, conversation: &str) -> Result<Vec<Conversed>, String> {
        converse(&self.0, &self.1, conversation)
    }

    fn ends_line(&self, id: u32) -> bool {
        Bytes.ends_line(id)
    }
}

/// A break so many tokens before the end of what a turn reads, if any.
fn before(suffix: Option<usize>) -> PromptBreak {
    suffix.map(PromptBreak::before_suffix).unwrap_or_default()
}

fn read(
    by: &dyn Encode,
    lines: &str,
    breaks: PromptBreak,
    section: &DataSection,
) -> Result<Vec<Example>, TrainError> {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("data.jsonl");
    std::fs::write(&path, lines).unwrap();
    let reading = segattn::train::data::Reading {
        encode: by,
        prompt_break: breaks,
        ..reading(section, scratch.path())
    };
    let corpus = Corpus::read(&[&[path]], &reading)?;
    let documents = corpus.documents().iter();
    documents.map(|d| corpus.example(d, 0..d.len)).collect()
}

const LINES: &str = concat!(
    r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}, "#,
    r#"{"role": "user", "content": "So"}, {"role": "assistant", "content": "No"}], "id": 7}"#,
    "\n{\"text\": \"plain\"}\n",
    r#"{"messages": [{"role": "assistant", "content": "First"}]}"#,
    "\n",
);

/// The text of the targets that count, with `|` where a segment ends.
fn learned(example: &Example) -> String {
    let weights = example.weights.as_ref().unwrap();
    let mut text = String::new();
    for (i, (id, weight)) in example.tokens.iter().zip(weights).enumerate() {
        if example.breaks.contains(&i) {
            text.push('|');
        }
        assert!(*weight == 0.0 || *weight == 1.0);
        text.push(if *weight == 1.0 {
            char::from(*id as u8)
        } else {
            '.'
        });
    }
    text
}

#[test]
fn what_the_assistant_writes_is_learned_in_whole_documents() {
    let by = Templated::new(TEMPLATE);
    let section = DataSection::default();
    for breaks in [None, Some(0)] {
        let examples = read(&by, LINES, before(breaks), &section).unwrap();
        let shown = learned(&examples[0]);
        // [user]Hi\n[assistant]Yes#\n[user]So\n[assistant]No#\n
        let expected = format!("{}|Yes#{}|No#.", ".".repeat(20), ".".repeat(21));
        assert_eq!(
            shown,
            if breaks.is_some() {
                expected
            } else {
                expected.replace('|', "")
            }
        );
        // Nothing stands around a conversation, and a text beside it stays a text.
        assert_eq!(examples[0].tokens[0], u32::from(b'['));
        assert_eq!(examples[1].tokens[0], 256);
        assert_eq!(examples[1].weights, None);
        assert_eq!(examples.len(), 3);
    }
    // By what a message adds to the text, where the template does not say it.
    let silent = TEMPLATE
        .replace("{% generation %}", "")
        .replace("{% endgeneration %}", "");
    let silent = Templated::new(&silent);
    let lines = LINES.split_inclusive('\n').take(2).collect::<String>();
    let examples = read(&silent, &lines, before(Some(0)), &section).unwrap();
    let expected = format!("{}|Yes#\n{}|No#\n", ".".repeat(20), ".".repeat(20));
    assert_eq!(learned(&examples[0]), expected);
    // Each answer by itself, where an earlier one is written otherwise than the last.
    let shortened = "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last or m.role == 'user' else '-' }}#\
                     {% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";
    let examples = read(
        &Templated::new(shortened),
        &lines,
        before(Some(0)),
        &section,
    )
    .unwrap();
    let expected = [
        format!("{}|Yes#", ".".repeat(20)),
        format!("{}|No#", ".".repeat(42)),
    ];
    assert_eq!(
        examples[..2].iter().map(learned).collect::<Vec<_>>(),
        expected
    );
    let text: Vec<u8> = examples[1].tokens.iter().map(|id| *id as u8).collect();
    assert_eq!(text, b"[user]Hi#[assistant]-#[user]So#[assistant]No#");
    // Another field of the same line comes first where it is asked for.
    let line = r#"{"text": "plain", "messages": [{"role": "assistant", "content": "x"}]}"#;
    assert_eq!(
        read(&by, line, before(None), &section).unwrap()[0].weights,
        None
    );
    let messages = DataSection {
        jsonl_field: "messages".into(),
        ..section
    };
    assert!(
        read(&by, line, before(None), &messages).unwrap()[0]
            .weights
            .is_some()
    );
}

#[test]
fn conversations_that_cannot_be_learned_from_are_refused_with_their_line() {
    let by = Templated::new(TEMPLATE);
    let section = DataSection::default();
    let refused = |by: &dyn Encode, line: &str, expected: &str| {
        let failed = read(
            by,
            &format!("{{\"text\": \"x\"}}\n{line}"),
            before(None),
            &section,
        )
        .unwrap_err();
        let text = failed.to_string();
        assert!(text.contains("line 2") || text.contains(":2"), "{text}");
        assert!(text.contains(expected), "{text}");
    };
    let one = r#"{"messages": [{"role": "user", "content": "x"}]}"#;
    refused(&by, one, "no message of the assistant");
    refused(&by, r#"{"messages": []}"#, "at least one message");
    refused(&by, r#"{"messages": "x"}"#, "expected a sequence");
    let silent = TEMPLATE
        .replace("{% generation %}", "")
        .replace("{% endgeneration %}", "");
    let first = r#"{"messages": [{"role": "assistant", "content": "x"}]}"#;
    refused(
        &Templated::new(&silent),
        first,
        "message 0: nothing is said before it",
    );
    refused(&Bytes, one, "no chat template");
    refused(
        &Templated::new("{{ raise_exception('Not so.') }}"),
        one,
        "Not so.",
    );
}

/// Gives every conversation the same answers.
struct Answering(Vec<std::ops::Range<usize>>);

impl Encode for Answering {
    fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        Bytes.encode(text)
    }

    fn locate(&self, text: &str) -> Result<Vec<Located>, String> {
        Bytes.locate(text)
    }

    fn converse(&self, _: &str) -> Result<Vec<Conversed>, String> {
        let answers = self.0.clone();
        Ok(vec![Conversed {
            ids: vec![7; 20],
            answers,
        }])
    }

    fn ends_line(&self, id: u32) -> bool {
        Bytes.ends_line(id)
    }
}

/// A token that crosses the border between two answers is in both.
#[test]
fn breaks_ascend_where_answers_touch_or_overlap() {
    let line = r#"{"messages": [{"role": "assistant", "content": "x"}]}"#;
    let breaks = |answers: &[std::ops::Range<usize>], suffix| {
        let by = Answering(answers.to_vec());
        let section = DataSection::default();
        read(&by, line, before(Some(suffix)), &section).unwrap()[0]
            .breaks
            .clone()
    };
    assert_eq!(breaks(&[4..8, 8..12], 0), [4, 8]);
    assert_eq!(breaks(&[4..8, 7..12], 0), [4, 7]);
    assert_eq!(breaks(&[4..8, 5..12], 0), [4, 7]);
    assert_eq!(breaks(&[4..5, 4..12, 15..18], 2), [2, 4, 13]);
    // Suffixes that are read again end where answers begin.
    let by = Answering(vec![4..8, 15..18]);
    let own = PromptBreak::before_suffix(2).with_rereads(2);
    let example = &read(&by, line, own, &DataSection::default()).unwrap()[0];
    assert_eq!(
        (&example.breaks[..], &example.rereads[..]),
        (&[2, 13][..], &[4, 4, 15, 15][..])
    );
}

#[test]
fn tokens_of_conversations_are_kept_under_what_they_depend_on() {
    let (by, section) = (Templated::new(TEMPLATE), DataSection::default());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data.jsonl");
    // Large enough for the cache.
    std::fs::write(&path, LINES.repeat(6000)).unwrap();
    let cache = folder.path().join("cache");
    let with = |breaks: Option<usize>, by: &dyn Encode| -> Vec<usize> {
        let reading = segattn::train::data::Reading {
            encode: by,
            prompt_break: before(breaks),
            cache: Some(Path::new(&cache)),
            ..reading(&section, folder.path())
        };
        let corpus = Corpus::read(&[std::slice::from_ref(&path)], &reading).unwrap();
        corpus
            .example(&corpus.documents()[0], 0..corpus.documents()[0].len)
            .unwrap()
            .breaks
    };
    assert_eq!(with(Some(0), &by), [20, 45]);
    // From the cache: this tokenizer could not make them.
    assert_eq!(with(Some(0), &Bytes), [20, 45]);
    assert_eq!(with(None, &by), [] as [usize; 0]);
    assert_eq!(with(Some(3), &by), [17, 42]);
    // A suffix longer than what a turn reads, which begins with the last token of the answer before: `#`.
    assert_eq!(with(Some(100), &by), [1, 24]);
}
