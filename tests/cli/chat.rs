//! `segattn chat`, run as a command.

use crate::cli_model::{self, config, fails, printed, save};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config();
    config.segment.as_mut().unwrap().break_after_prompt = true;
    save(folder.path(), &config);
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}\
                    {% if add_generation_prompt %}assistant: {% endif %}";
    std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    folder
}

fn said(folder: &Path, args: &[&str], input: &str) -> Output {
    let mut chat = Command::new(env!("CARGO_BIN_EXE_segattn"))
        .current_dir(folder)
        .args(["chat", ".", "--quiet", "-n", "12", "--seed", "3"])
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    chat.stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    chat.wait_with_output().unwrap()
}

fn answers(folder: &Path, args: &[&str], input: &str) -> Vec<u8> {
    let output = said(folder, args, input);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    output.stdout
}

#[test]
fn lines_of_a_script_are_answered_and_a_saved_chat_goes_on() {
    let dir = folder();
    let dir = dir.path();
    let all = answers(dir, &[], "Hello\n/save chat.state\nAnd more?\n");
    assert_eq!(answers(dir, &[], "Hello\n\nAnd more?"), all);
    let first = answers(dir, &[], "Hello\n/exit\nAnd more?\n");
    let second = answers(dir, &[], "Unheard\n/load chat.state\nAnd more?\n");
    let unheard = answers(dir, &[], "Unheard\n");
    assert_eq!([&unheard[..], &all[first.len()..]].concat(), second);
    assert_eq!(
        answers(dir, &[], "Hello\n/reset\nHello"),
        [&first[..], &first].concat()
    );
    assert_ne!(answers(dir, &["--system", "Be brief."], "Hello"), first);
    // The first answer is what `generate` writes after the template's text.
    let prompt = [
        "generate",
        ".",
        "-q",
        "-n",
        "12",
        "--seed",
        "3",
        "--prompt",
        "user: Hello\nassistant: ",
    ];
    assert_eq!(printed(dir, &prompt).into_bytes(), first);
    // Another template, which knows the tokens that the folder names.
    let template = "{{ bos_token }} {{ messages[-1].content }}";
    std::fs::write(dir.join("other.jinja"), template).unwrap();
    std::fs::write(dir.join("tokenizer_config.json"), r#"{"bos_token": "Say"}"#).unwrap();
    let mut config = cli_model::json(&dir.join("config.json"));
    config["byte_tokens"] = true.into();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let prompt = [&prompt[..7], &["--prompt", "Say Hello"]].concat();
    let other = answers(dir, &["--template", "other.jinja"], "Hello");
    assert_eq!(printed(dir, &prompt).into_bytes(), other);
}

#[test]
fn what_is_wrong_is_said() {
    let dir = folder();
    let dir = dir.path();
    let failed = |args: &[&str], input: &str, expected: &str| {
        let output = said(dir, args, input);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && errors.contains(expected),
            "{errors}"
        );
    };
    failed(&[], "/sav x\nHello", "/sav: no such command");
    failed(&[], "/load chat.state", "chat.state");
    failed(&[], "/load config.json", "config.json");
    failed(&["--stop", ""], "Hello", "stop[0]");
    failed(&["--temperature", "-1"], "", "temperature");
    std::fs::write(
        dir.join("refuses.jinja"),
        "{{ raise_exception('No more.') }}",
    )
    .unwrap();
    failed(
        &["--template", "refuses.jinja"],
        "Hello",
        "chat template: No more.",
    );
    std::fs::remove_file(dir.join("chat_template.jinja")).unwrap();
    fails(dir, &["chat", "."], "has no chat template");
    fails(dir, &["chat"], "MODEL");
    fails(dir, &["chat", ".", "-m", "."], "cannot be used");
}
