//! Chat templates against Transformers: `tests/golden/chat/make.py` has rendered and encoded the same.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use segattn::model::chat::{Chat, Conversation, Data, Rendered};
use segattn::model::tokenizer::Tokenizer;
use serde::Deserialize;
use serde::de::DeserializeOwned;

#[derive(Deserialize)]
struct Row {
    template: String,
    conversation: String,
    prompt: bool,
    text: Option<String>,
    #[serde(default)]
    generated: Vec<[usize; 2]>,
    error: Option<String>,
}

#[derive(Deserialize)]
struct Ids {
    template: String,
    conversation: String,
    ids: Vec<u32>,
    mask: Option<Vec<u8>>,
}

fn golden(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    folder.join("tests/golden/chat").join(name)
}

fn read<T: DeserializeOwned>(name: &str) -> T {
    serde_json::from_slice(&std::fs::read(golden(name)).unwrap()).unwrap()
}

fn conversation(name: &str) -> Conversation {
    let mut all: BTreeMap<String, Conversation> = read("conversations.json");
    all.remove(name).unwrap()
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_file(&golden("tokenizer.json")).unwrap()
}

/// The template in a model folder as it is published.
fn chat(template: &str, tokenizer: &Tokenizer) -> Chat {
    let folder = tempfile::tempdir().unwrap();
    let path = golden(&format!("templates/{template}.jinja"));
    std::fs::copy(path, folder.path().join("chat_template.jinja")).unwrap();
    let tokens = r#"{"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "not this one"}"#;
    std::fs::write(folder.path().join("tokenizer_config.json"), tokens).unwrap();
    Chat::open(folder.path(), tokenizer).unwrap().unwrap()
}

fn of_template(template: &str) -> Chat {
    Chat::of_template(template, &tokenizer()).unwrap()
}

fn messages(json: serde_json::Value) -> Conversation {
    serde_json::from_value(serde_json::json!({"messages": json})).unwrap()
}

#[test]
fn texts_and_marked_parts_are_those_of_transformers() {
    let (tokenizer, mut wrong) = (tokenizer(), Vec::new());
    for row in read::<Vec<Row>>("rendered.json") {
        // A marked spelling is a character longer for a template that cuts it.
        if (row.template.as_str(), row.conversation.as_str()) == ("filters", "controls") {
            continue;
        }
        let chat = chat(&row.template, &tokenizer);
        let got = chat.render(&conversation(&row.conversation), row.prompt);
        let place = format!(
            "{} on {}, prompt {}",
            row.template, row.conversation, row.prompt
        );
        match (got, row.text, row.error) {
            (Ok(got), Some(text), _) => {
                let generated: Vec<_> = got.generated.iter().map(|r| [r.start, r.end]).collect();
                if got.text != text {
                    wrong.push(format!("{place}:\n{:?}\nexpected\n{text:?}", got.text));
                } else if generated != row.generated {
                    wrong.push(format!(
                        "{place}: {generated:?}, expected {:?}",
                        row.generated
                    ));
                }
            }
            (Err(_), None, Some(_)) => {}
            (got, text, error) => {
                wrong.push(format!("{place}: {got:?}, expected {text:?} {error:?}"))
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "{}\n{} differ",
        wrong.join("\n"),
        wrong.len()
    );
}

#[test]
fn tokens_are_those_of_transformers_and_control_tokens_in_messages_are_text() {
    let tokenizer = tokenizer();
    for row in read::<Vec<Ids>>("encoded.json") {
        let chat = chat(&row.template, &tokenizer);
        let rendered = chat.render(&conversation(&row.conversation), true).unwrap();
        let encoded = chat.encode(&tokenizer, &rendered).unwrap();
        let place = format!("{} on {}", row.template, row.conversation);
        assert_eq!(encoded.ids, row.ids, "{place}");
        if let Some(mask) = row.mask {
            let mut got = vec![0; mask.len()];
            for range in encoded.generated {
                got[range].fill(1);
            }
            assert_eq!(got, mask, "{place}");
        }
    }
}

#[test]
fn a_message_cannot_end_its_turn() {
    let (tokenizer, chat) = (
        tokenizer(),
        of_template("<s>{{ messages[0].content }}<|im_end|>"),
    );
    let control = |name: &str| tokenizer.encode(name, false).unwrap()[0];
    let (bos, end) = (control("<s>"), control("<|im_end|>"));
    for content in [
        "<|im_end|>",
        "<s>",
        "a<|im_end|>b<s>",
        "\u{10fffd}<|im_end|>",
        "<|im_<|im_end|>end|>",
    ] {
        let rendered = chat
            .render(&messages(serde_json::json!([{"content": content}])), false)
            .unwrap();
        assert_eq!(rendered.text, format!("<s>{content}<|im_end|>"));
        let ids = chat.encode(&tokenizer, &rendered).unwrap().ids;
        let controls = ids.iter().filter(|id| [bos, end].contains(id)).count();
        assert_eq!(
            (ids[0], ids[ids.len() - 1], controls),
            (bos, end, 2),
            "{content}"
        );
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), rendered.text);
    }
}

#[test]
fn answers_are_found_by_the_text_that_they_add() {
    let tokenizer = tokenizer();
    let written = |template: &str, on: &str| {
        let texts = chat(template, &tokenizer)
            .answers(&conversation(on))
            .unwrap();
        let of = |r: &Rendered| -> Vec<String> {
            let each = r.generated.iter();
            each.map(|range| r.text[range.clone()].to_owned()).collect()
        };
        texts.iter().map(of).collect::<Vec<_>>()
    };
    // The line's end behind the control token is the template's.
    assert_eq!(
        written("chatml_tools", "turns"),
        [["\n4, of course. <|im_end|>", "Fünf\n\n<|im_end|>"]]
    );
    assert_eq!(
        written("headers", "turns"),
        [["4, of course.<|eot_id|>", "Fünf<|eot_id|>"]]
    );
    // What was thought stands in the last answer alone, so each has a text in which it is the last.
    let answered = [
        "<think>\nTwo and two.\n</think>\n\nFour.<|im_end|>",
        "<think>\nThree twice.\n</think>\n\nSix.<|im_end|>",
    ];
    assert_eq!(
        written("reasoning", "answered"),
        answered.map(|text| [text])
    );
    // The template's own marks come first.
    assert_eq!(written("generation", "answered"), [answered]);
    let other =
        "{{ 'x' if add_generation_prompt }}{% for m in messages %}{{ m.content }}{% endfor %}";
    let failed = of_template(other)
        .answers(&conversation("turns"))
        .unwrap_err();
    let expected = "message 2: its text does not go on from the prompt for it";
    assert!(failed.to_string().contains(expected), "{failed}");
}

#[test]
fn what_follows_an_answer_goes_on_from_its_text() {
    let tokenizer = tokenizer();
    let mut begun = conversation("one");
    let more = [Data::message("user", "More <|im_end|>?")];
    for template in [
        "chatml_tools",
        "reasoning",
        "headers",
        "generation",
        "parts",
        "alternating",
    ] {
        let chat = chat(template, &tokenizer);
        let after = chat.after_answer(&begun, &more).unwrap();
        let prompt = chat.render(&begun, true).unwrap().text;
        let mut whole = begun.clone();
        whole.push("assistant", "Hi");
        whole.messages.extend(more.clone());
        let whole = chat.render(&whole, true).unwrap();
        // One template puts a space before an answer.
        let answer = whole.text[prompt.len()..]
            .strip_suffix(&after.text)
            .unwrap();
        assert_eq!(answer.trim(), "Hi", "{template}");
        let spelled = |r: &Rendered| {
            r.plain
                .iter()
                .map(|p| r.text[p.clone()].to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(spelled(&after), ["<|im_end|>"]);
    }
    begun.push("assistant", "x");
    let silent = of_template("{{ messages | length }}");
    let failed = silent.after_answer(&begun, &more).unwrap_err();
    assert!(
        failed.to_string().contains("does not stand once"),
        "{failed}"
    );
}

#[test]
fn templates_are_found_where_folders_keep_them() {
    let (folder, tokenizer) = (tempfile::tempdir().unwrap(), tokenizer());
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    let text = |name: Option<&str>| {
        let chat = Chat::open_named(folder.path(), name, &tokenizer)?;
        let one = messages(serde_json::json!([{"role": "user"}]));
        chat.map(|chat| chat.render(&one, false).map(|r| r.text))
            .transpose()
    };
    assert_eq!(text(None).unwrap(), None);
    let failed = text(Some("rag")).unwrap_err().to_string();
    assert!(
        failed.contains("expected the chat template `rag`, found none"),
        "{failed}"
    );
    write(
        "tokenizer_config.json",
        r#"{"chat_template": "a {{ eos_token }}", "eos_token": "</s>"}"#,
    );
    assert_eq!(text(None).unwrap().unwrap(), "a </s>");
    let named = r#"[{"name": "default", "template": "b"}, {"name": "rag", "template": "c"}]"#;
    write(
        "tokenizer_config.json",
        &format!(r#"{{"chat_template": {named}}}"#),
    );
    assert_eq!(text(None).unwrap().unwrap(), "b");
    assert_eq!(text(Some("rag")).unwrap().unwrap(), "c");
    write("chat_template.jinja", "d");
    write("additional_chat_templates/tool_use.jinja", "e");
    assert_eq!(text(None).unwrap().unwrap(), "d");
    assert_eq!(text(Some("tool_use")).unwrap().unwrap(), "e");
    let failed = text(Some("rag")).unwrap_err().to_string();
    assert!(failed.contains("found tool_use, default"), "{failed}");
    write(
        "tokenizer_config.json",
        r#"{"chat_template": [{"name": "x"}]}"#,
    );
    std::fs::remove_file(folder.path().join("chat_template.jinja")).unwrap();
    std::fs::remove_dir_all(folder.path().join("additional_chat_templates")).unwrap();
    let failed = text(None).unwrap_err().to_string();
    assert!(
        failed.contains("expected objects with `name` and `template`"),
        "{failed}"
    );
}

#[test]
fn hostile_templates_and_messages_are_errors() {
    let one = messages(serde_json::json!([{"role": "user", "content": "x"}]));
    let fails = |template: &str, expected: &str| {
        let chat = Chat::of_template(template, &tokenizer());
        let failed = chat.and_then(|chat| chat.render(&one, true)).unwrap_err();
        assert!(
            failed.to_string().contains(expected),
            "{template}: {failed}"
        );
    };
    fails("{% for m in messages %}", "unexpected end of input");
    fails("{% generation %}", "unexpected end of input");
    fails(
        "{{ raise_exception('No <b>tools</b>.') }}",
        "chat template: No <b>tools</b>. (line 1)",
    );
    fails("{{ messages.x.y }}", "undefined");
    fails(
        "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
        "fuel",
    );
    fails("{{ 'x' * 10000000000 }}", "");
    fails(
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "recursion",
    );
    fails("{% include 'other' %}", "other");
    fails("{{ messages | tojson(indent=-1) }}", "");
    fails(
        "{{ messages | tojson(indent=10000000000) }}",
        "expected at most",
    );
    let wide = of_template("{{ messages | tojson(indent=70000) }}").render(&one, true);
    assert!(wide.unwrap().text.len() > 70_000);
    let refused = |json: &str, expected: &str| {
        let given: Result<Conversation, _> = serde_json::from_str(json);
        let text = match given {
            Ok(given) => of_template("x")
                .render(&given, true)
                .unwrap_err()
                .to_string(),
            Err(error) => error.to_string(),
        };
        assert!(text.contains(expected), "{json}: {text}");
    };
    refused(r#"{"messages": []}"#, "at least one message");
    refused(
        r#"{"messages": ["x"]}"#,
        "message 0: expected an object, got string",
    );
    refused(r#"{"messages": 3}"#, "expected a sequence");
    refused(
        r#"{"messages": [{}], "chat_template_kwargs": 1}"#,
        "chat_template_kwargs: expected an object",
    );
    refused(
        r#"{"messages": [{}], "chat_template_kwargs": {"messages": []}}"#,
        "chat_template_kwargs: expected names",
    );
}
