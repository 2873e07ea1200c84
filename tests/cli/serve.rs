//! `segattn serve`, run as a command: what it answers has the bits of `segattn generate` and `segattn score`.

use std::io::Read;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::cli_model::{config, fails, json, printed, save, tokens};
use crate::serving::Serving;
use serde_json::{Value, json};

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), &config());
    folder
}

/// What `generate` gives after each of some prompts in a batch: tokens and log-probabilities.
fn generated(folder: &Path, prompts: &[Vec<u32>], args: &[&str]) -> Vec<Value> {
    let mut all = vec![
        "generate",
        "-m",
        ".",
        "-q",
        "-n",
        "20",
        "--logprobs",
        "out.json",
    ];
    let names: Vec<String> = (0..prompts.len())
        .map(|i| format!("prompt-{i}.json"))
        .collect();
    for (name, prompt) in names.iter().zip(prompts) {
        std::fs::write(folder.join(name), json!(prompt).to_string()).unwrap();
        all.extend(["--tokens", name]);
    }
    printed(folder, &[&all, args].concat());
    match json(&folder.join("out.json")) {
        Value::Array(each) => each,
        one => vec![one],
    }
}

/// A request for what `generated` gives with `--temperature 0.8 --top-k 40 --seed 7`.
fn request(prompt: &[u32]) -> Value {
    json!({
        "model": "tiny", "prompt": prompt, "max_tokens": 20, "temperature": 0.8, "top_k": 40, "seed": 7,
        "logprobs": 0, "return_token_ids": true,
    })
}

const SAMPLING: [&str; 6] = ["--temperature", "0.8", "--top-k", "40", "--seed", "7"];

/// A choice must have the tokens that `generate` gave, and the bits of their log-probabilities.
fn assert_same(choice: &Value, expected: &Value) {
    assert_eq!(choice["token_ids"], expected["tokens"]);
    assert_eq!(choice["logprobs"]["token_logprobs"], expected["logprobs"]);
}

/// Prompts around the ends of segments (64).
fn prompts() -> Vec<Vec<u32>> {
    let lengths = [70, 5, 128, 64, 1, 200, 33, 63, 127, 90];
    let each = lengths.into_iter().enumerate();
    each.map(|(i, len)| tokens(i as u64 + 1, len)).collect()
}

#[test]
fn requests_side_by_side_have_the_bits_of_each_alone() {
    let dir = folder();
    let prompts = prompts();
    let expected = generated(dir.path(), &prompts, &SAMPLING);
    let serving = Serving::start(dir.path(), &["--running", "4", "--read-at-once", "50"]);
    // Read anew, then from the states that were kept.
    for round in 0..2 {
        std::thread::scope(|scope| {
            for (prompt, expected) in prompts.iter().zip(&expected) {
                let serving = &serving;
                scope.spawn(move || {
                    let answer = serving.good("/v1/completions", &request(prompt));
                    assert_same(&answer["choices"][0], expected);
                    let usage = &answer["usage"];
                    assert_eq!(usage["prompt_tokens"], prompt.len());
                    let cached = if round == 0 { 0 } else { prompt.len() };
                    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], cached);
                });
            }
        });
    }
    let new: usize = expected
        .iter()
        .map(|e| e["tokens"].as_array().unwrap().len())
        .sum();
    assert_eq!(serving.metric("segattn_new_tokens_total"), 2 * new as u64);
    let tokens: usize = prompts.iter().map(Vec::len).sum();
    assert_eq!(
        serving.metric("segattn_prompt_tokens_total"),
        2 * tokens as u64
    );
    assert_eq!(serving.metric("segattn_cached_tokens_total"), tokens as u64);
    assert_eq!(
        serving.metric("segattn_sequences_total{how=\"ended\"}"),
        2 * prompts.len() as u64
    );
}

#[test]
fn what_prompts_begin_with_is_read_once_and_changes_no_bit() {
    let dir = folder();
    let begins = |seed, own: usize| [tokens(9, 150), tokens(seed, own)].concat();
    let prompts: Vec<Vec<u32>> = (0..4).map(|i| begins(20 + i, 60)).collect();
    for (execution, cached) in [
        ("segmented", [0, 0, 128, 128]),
        ("full", [0, 150, 150, 150]),
    ] {
        let execution = ["--execution", execution];
        let serving = Serving::start(dir.path(), &execution);
        for (prompt, cached) in prompts.iter().zip(cached) {
            let alone = generated(
                dir.path(),
                std::slice::from_ref(prompt),
                &[&SAMPLING[..], &execution].concat(),
            );
            let answer = serving.good("/v1/completions", &request(prompt));
            assert_same(&answer["choices"][0], &alone[0]);
            let of = &answer["usage"]["prompt_tokens_details"]["cached_tokens"];
            assert_eq!(*of, cached, "{execution:?}");
        }
        // A second turn begins with all that the first read and wrote, but the last token, which nobody has read.
        let first = serving.good("/v1/completions", &request(&prompts[0]));
        let new: Vec<u32> =
            serde_json::from_value(first["choices"][0]["token_ids"].clone()).unwrap();
        let turn = [&prompts[0][..], &new, &tokens(40, 10)].concat();
        let alone = generated(
            dir.path(),
            std::slice::from_ref(&turn),
            &[&SAMPLING[..], &execution].concat(),
        );
        let answer = serving.good("/v1/completions", &request(&turn));
        assert_same(&answer["choices"][0], &alone[0]);
        let of = &answer["usage"]["prompt_tokens_details"]["cached_tokens"];
        assert_eq!(*of, prompts[0].len() + new.len() - 1);
    }
}

#[test]
fn states_stay_within_their_budget() {
    let dir = folder();
    let prompts = prompts();
    let expected = generated(dir.path(), &prompts, &SAMPLING);
    // 256 KiB hold some of the states, and no bit depends on which.
    let serving = Serving::start(dir.path(), &["--cache", "0.000244140625"]);
    for _ in 0..2 {
        for (prompt, expected) in prompts.iter().zip(&expected) {
            let answer = serving.good("/v1/completions", &request(prompt));
            assert_same(&answer["choices"][0], expected);
            let bytes = serving.metric("segattn_cache_bytes");
            assert!(bytes > 0 && bytes <= 256 << 10, "{bytes}");
        }
    }
}

#[test]
fn copies_of_a_prompt_are_those_of_a_batch_of_generate() {
    let dir = folder();
    let prompt = tokens(3, 100);
    let expected = generated(dir.path(), &vec![prompt.clone(); 5], &SAMPLING);
    let serving = Serving::start(dir.path(), &["--running", "2"]);
    let mut wanted = request(&prompt);
    wanted["n"] = 5.into();
    let answer = serving.good("/v1/completions", &wanted);
    for (i, expected) in expected.iter().enumerate() {
        assert_eq!(answer["choices"][i]["index"], i);
        assert_same(&answer["choices"][i], expected);
    }
    assert_ne!(expected[0]["tokens"], expected[1]["tokens"]);
    // The prompt was read once.
    assert_eq!(serving.metric("segattn_cached_tokens_total"), 400);
    // Two prompts in one request.
    let both = json!([tokens(4, 30), tokens(5, 31)]);
    let expected = generated(dir.path(), &[tokens(4, 30), tokens(5, 31)], &SAMPLING);
    let mut wanted = request(&prompt);
    wanted["prompt"] = both;
    let answer = serving.good("/v1/completions", &wanted);
    assert_same(&answer["choices"][0], &expected[0]);
    assert_same(&answer["choices"][1], &expected[1]);
}

#[test]
fn prompts_are_scored_as_score_does() {
    let dir = folder();
    let prompt = tokens(3, 150);
    std::fs::write(dir.path().join("t.json"), json!(prompt).to_string()).unwrap();
    printed(
        dir.path(),
        &[
            "score", "-m", ".", "-q", "--tokens", "t.json", "--out", "s.json",
        ],
    );
    let expected = json(&dir.path().join("s.json"))["logprobs"].clone();
    let expected = expected.as_array().unwrap();
    let serving = Serving::start(dir.path(), &[]);
    for top in [0, 3] {
        let wanted = json!({"prompt": prompt, "max_tokens": 0, "echo": true, "logprobs": top, "prompt_logprobs": top});
        let answer = serving.good("/v1/completions", &wanted);
        let choice = &answer["choices"][0];
        assert_eq!(choice["finish_reason"], "length");
        let places = choice["prompt_logprobs"].as_array().unwrap();
        let echoed = &choice["logprobs"];
        assert!(places[0].is_null() && echoed["token_logprobs"][0].is_null());
        assert_eq!(places.len(), 150);
        for (i, id) in prompt.iter().enumerate().skip(1) {
            let place = &places[i][id.to_string()];
            assert_eq!(place["logprob"], expected[i - 1], "{i}");
            assert_eq!(echoed["token_logprobs"][i], expected[i - 1], "{i}");
            let all = places[i].as_object().unwrap();
            assert!((top.max(1)..=top + 1).contains(&all.len()), "{all:?}");
            let best = all
                .values()
                .filter_map(|p| p["logprob"].as_f64())
                .fold(f64::MIN, f64::max);
            if top > 0 {
                let first = all.values().find(|p| p["rank"] == 1).unwrap();
                assert_eq!(first["logprob"].as_f64(), Some(best));
            }
        }
    }
}

#[test]
fn streams_say_what_whole_answers_say() {
    let dir = folder();
    let serving = Serving::start(dir.path(), &[]);
    let mut wanted = json!({
        "prompt": ["Once upon", "a time"], "max_tokens": 24, "n": 2, "seed": 3, "logprobs": 2, "echo": true,
        "return_token_ids": true, "ignore_eos": true,
    });
    let whole = serving.good("/v1/completions", &wanted);
    wanted["stream"] = true.into();
    wanted["stream_options"] = json!({"include_usage": true});
    let mut chunks = serving.stream("/v1/completions", &wanted);
    let usage = chunks.pop().unwrap();
    assert_eq!(usage["choices"], json!([]));
    for key in ["prompt_tokens", "completion_tokens", "total_tokens"] {
        assert_eq!(usage["usage"][key], whole["usage"][key]);
    }
    for index in 0..4 {
        let expected = &whole["choices"][index];
        let (mut text, mut ids, mut scores) = (String::new(), Vec::new(), Vec::new());
        let (mut top, mut offsets, mut finish) = (Vec::new(), Vec::new(), Value::Null);
        for chunk in &chunks {
            let choice = &chunk["choices"][0];
            if choice["index"] != index {
                continue;
            }
            assert!(finish.is_null(), "more after the end");
            text.push_str(choice["text"].as_str().unwrap());
            let list = |value: &Value| value.as_array().unwrap().clone();
            ids.extend(list(&choice["token_ids"]));
            scores.extend(list(&choice["logprobs"]["token_logprobs"]));
            top.extend(list(&choice["logprobs"]["top_logprobs"]));
            offsets.extend(list(&choice["logprobs"]["text_offset"]));
            finish = choice["finish_reason"].clone();
        }
        assert_eq!(json!(text), expected["text"]);
        assert_eq!(json!(ids), expected["token_ids"]);
        assert_eq!(ids.len(), 24);
        assert_eq!(json!(scores), expected["logprobs"]["token_logprobs"]);
        assert_eq!(json!(top), expected["logprobs"]["top_logprobs"]);
        assert_eq!(json!(offsets), expected["logprobs"]["text_offset"]);
        assert_eq!(finish, "length");
    }
}

#[test]
fn text_ends_where_that_of_generate_ends() {
    let dir = folder();
    let serving = Serving::start(dir.path(), &[]);
    let fixed = [
        "generate",
        "-m",
        ".",
        "-q",
        "-p",
        "Once upon a time",
        "-t",
        "0",
        "--ignore-eos",
        "-n",
        "40",
    ];
    let whole = printed(dir.path(), &fixed);
    let mut letters = whole.char_indices().skip(4);
    let (_, stop) = letters
        .find(|(at, c)| *c != '\u{fffd}' && whole.find(*c) == Some(*at))
        .unwrap();
    for (stops, finish) in [(json!(null), "length"), (json!(stop.to_string()), "stop")] {
        let stop = stop.to_string();
        let args = if stops.is_null() {
            vec![]
        } else {
            vec!["--stop", &stop]
        };
        let expected = printed(dir.path(), &[&fixed[..], &args].concat());
        let wanted = json!({
            "prompt": "Once upon a time", "temperature": 0, "ignore_eos": true, "max_tokens": 40, "stop": stops,
        });
        let answer = serving.good("/v1/completions", &wanted);
        assert_eq!(
            answer["choices"][0]["text"],
            expected.strip_suffix('\n').unwrap()
        );
        assert_eq!(answer["choices"][0]["finish_reason"], finish);
    }
}

#[test]
fn nobody_waits_for_a_sequence_that_ends() {
    let dir = folder();
    let serving = Serving::start(dir.path(), &["--running", "1", "--waiting", "1"]);
    let long =
        json!({"prompt": "x", "max_tokens": 30000, "ignore_eos": true, "stream": true}).to_string();
    let mut running = serving.send("POST", "/v1/completions", "", long.as_bytes());
    assert_eq!(running.read(&mut [0; 20]).unwrap(), 20);
    let waiting = serving.send("POST", "/v1/completions", "", long.as_bytes());
    serving.wait_for("segattn_waiting", 1);
    // Both places are taken.
    let (status, answer) = serving.post("/v1/completions", &json!({"prompt": "y"}));
    assert_eq!(status, 429);
    assert_eq!(answer["error"]["type"], "rate_limit_error");
    drop(waiting);
    serving.wait_for("segattn_sequences_total{how=\"cancelled\"}", 1);
    drop(running);
    serving.wait_for("segattn_sequences_total{how=\"cancelled\"}", 2);
    serving.wait_for("segattn_running", 0);
    serving.good("/v1/completions", &json!({"prompt": "y", "max_tokens": 3}));
}

#[test]
fn wrong_requests_are_explained() {
    let dir = folder();
    let serving = Serving::start(
        dir.path(),
        &[
            "--max-len",
            "100",
            "--max-body",
            "1",
            "--running",
            "2",
            "--waiting",
            "2",
        ],
    );
    for (body, param) in [
        (json!({}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": ""}), "prompt"),
        (json!({"prompt": [256]}), "prompt"),
        (json!({"prompt": [[1], [-1]]}), "prompt"),
        (json!({"prompt": "a", "temperature": "hot"}), "temperature"),
        (json!({"prompt": "a", "n": 0}), "n"),
        (json!({"prompt": "a", "n": 5}), "n"),
        (json!({"prompt": "a", "max_tokens": 101}), "max_tokens"),
        (json!({"prompt": "a", "logprobs": 21}), "logprobs"),
        (json!({"prompt": "a", "stop": ""}), "stop"),
        (json!({"prompt": "a", "stream": 1}), "stream"),
        (json!({"prompt": "a", "logit_bias": {"1": 5}}), "logit_bias"),
        (
            json!({"prompt": "a", "presence_penalty": 0.5}),
            "presence_penalty",
        ),
    ] {
        let (status, answer) = serving.post("/v1/completions", &body);
        assert_eq!(status, 400, "{body}: {answer}");
        assert_eq!(answer["error"]["type"], "invalid_request_error");
        assert_eq!(answer["error"]["param"], param, "{body}: {answer}");
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(
            message.contains("expected") && message.contains("got"),
            "{message}"
        );
    }
    let (status, answer) = serving.post(
        "/v1/completions",
        &json!({"prompt": "a", "temperature": -1}),
    );
    assert!(
        status == 400 && answer.to_string().contains("temperature"),
        "{answer}"
    );
    let (status, answer) =
        serving.post("/v1/completions", &json!({"prompt": "a", "model": "other"}));
    assert_eq!(
        (status, &answer["error"]["code"]),
        (404, &json!("model_not_found"))
    );
    for (prompt, max_tokens) in [(101, 1), (100, 1), (60, 41)] {
        let wanted = json!({"prompt": tokens(1, prompt), "max_tokens": max_tokens});
        let (status, answer) = serving.post("/v1/completions", &wanted);
        assert_eq!(
            (status, &answer["error"]["code"]),
            (400, &json!("context_length_exceeded")),
            "{answer}"
        );
    }
    // Up to the last token there is room.
    let full = serving.good(
        "/v1/completions",
        &json!({"prompt": tokens(1, 60), "max_tokens": 40, "ignore_eos": true}),
    );
    assert_eq!(full["usage"]["total_tokens"], 100);
    for (method, path, body, expected) in [
        ("POST", "/v1/completions", &b"{"[..], 400),
        ("POST", "/v1/completions", b"[]", 400),
        ("POST", "/v1/completions", &vec![b' '; 2 << 20], 413),
        ("GET", "/v1/completions", b"", 405),
        ("GET", "/v2", b"", 404),
        ("GET", "/v1/models/other", b"", 404),
    ] {
        let (status, text) = serving.text(method, path, "", body);
        assert_eq!(status, expected, "{text}");
        let answer: Value = serde_json::from_str(&text).unwrap();
        assert!(answer["error"]["message"].is_string(), "{text}");
    }
    fails(
        dir.path(),
        &["serve", "-m", ".", "--cache", "-1"],
        "--cache",
    );
    fails(
        dir.path(),
        &["serve", "-m", ".", "--max-len", "1"],
        "--max-len",
    );
    fails(
        dir.path(),
        &["serve", "-m", ".", "--host", "nowhere.invalid"],
        "cannot listen",
    );
}

const TEMPLATE: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}\
                        {% if add_generation_prompt %}<assistant>{% endif %}";

/// A model with a chat template, whose prompts end segments where `breaks`: `suffix` bytes before their end, which are
/// read again if there are any.
fn chat_folder(breaks: bool, suffix: usize) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config();
    let segment = config.segment.as_mut().unwrap();
    (segment.break_after_prompt, segment.prompt_suffix_len) = (breaks, suffix);
    segment.reread_suffix = suffix.min(1);
    config.validate().unwrap();
    save(folder.path(), &config);
    std::fs::write(folder.path().join("chat_template.jinja"), TEMPLATE).unwrap();
    folder
}

/// A turn that is shorter than the suffix of prompts: what was read before it is not read again.
#[test]
fn a_short_turn_of_a_chat_is_read_again_alone() {
    let (dir, plain) = (chat_folder(true, 40), chat_folder(false, 0));
    let first = "<system>Be short.\n<user>What is a segment?\n<assistant>";
    let answered = format!("{first}A part.\n");
    let second = format!("{answered}<user>Of what?\n<assistant>");
    let tokens = json!({
        "tokens": second.bytes().map(u32::from).collect::<Vec<_>>(),
        // The last byte of the answer is read with the turn that follows.
        "breaks": [first.len() - 40, answered.len()],
        "rereads": [first.len(), second.len()],
    });
    std::fs::write(plain.path().join("t.json"), tokens.to_string()).unwrap();
    let fixed = ["generate", "-m", ".", "-q", "-n", "20", "--logprobs"];
    let files = ["out.json", "--tokens", "t.json"];
    printed(plain.path(), &[&fixed[..], &files, &SAMPLING].concat());
    let expected = json(&plain.path().join("out.json"));
    let serving = Serving::start(dir.path(), &[]);
    let mut wanted = request(&[]);
    wanted["messages"] = json!([
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What is a segment?"},
        {"role": "assistant", "content": "A part."},
        {"role": "user", "content": "Of what?"},
    ]);
    wanted["logprobs"] = true.into();
    let answer = serving.good("/v1/chat/completions", &wanted);
    let choice = &answer["choices"][0];
    let places = choice["logprobs"]["content"].as_array().unwrap();
    let scores: Vec<&Value> = places.iter().map(|place| &place["logprob"]).collect();
    assert_eq!(json!(scores), expected["logprobs"]);
    assert_eq!(choice["token_ids"], expected["tokens"]);
}

#[test]
fn chats_have_the_bits_of_the_templates_text() {
    for (breaks, suffix) in [(false, 0), (true, 0), (true, 7)] {
        let dir = chat_folder(breaks, suffix);
        let serving = Serving::start(dir.path(), &[]);
        let parts =
            json!([{"type": "text", "text": "What is a segment"}, {"type": "text", "text": "?"}]);
        let mut messages = vec![
            json!({"role": "system", "content": "Be short."}),
            json!({"role": "user", "content": parts}),
        ];
        let first = "<system>Be short.\n<user>What is a segment?\n<assistant>";
        let second = format!("{first}A part.\n<user>Of what?\n<assistant>");
        for (text, earlier) in [(first, None), (&second, Some(first.len()))] {
            let ids: Vec<u32> = text.bytes().map(u32::from).collect();
            let marked = earlier.filter(|_| breaks);
            let tokens = json!({
                "tokens": ids,
                "breaks": marked.map(|end| end - suffix).as_slice(),
                "rereads": marked.filter(|_| suffix > 0).as_slice(),
            });
            std::fs::write(dir.path().join("t.json"), tokens.to_string()).unwrap();
            let fixed = [
                "generate",
                "-m",
                ".",
                "-q",
                "-n",
                "20",
                "--logprobs",
                "out.json",
                "--tokens",
                "t.json",
            ];
            printed(dir.path(), &[&fixed[..], &SAMPLING].concat());
            let expected = json(&dir.path().join("out.json"));
            let mut wanted = request(&[]);
            wanted["messages"] = messages.clone().into();
            wanted["logprobs"] = true.into();
            wanted["top_logprobs"] = 2.into();
            let answer = serving.good("/v1/chat/completions", &wanted);
            assert_eq!(answer["prompt_token_ids"], json!(ids));
            let choice = &answer["choices"][0];
            assert_eq!(choice["token_ids"], expected["tokens"]);
            let places = choice["logprobs"]["content"].as_array().unwrap();
            let scores: Vec<&Value> = places.iter().map(|place| &place["logprob"]).collect();
            assert_eq!(json!(scores), expected["logprobs"]);
            for (place, id) in places.iter().zip(expected["tokens"].as_array().unwrap()) {
                assert_eq!(place["bytes"], json!([id]));
                assert_eq!(place["top_logprobs"].as_array().unwrap().len(), 2);
            }
            // The second turn begins from the state after the first prompt.
            let cached = &answer["usage"]["prompt_tokens_details"]["cached_tokens"];
            assert_eq!(*cached, earlier.unwrap_or(0));
            wanted["stream"] = true.into();
            let chunks = serving.stream("/v1/chat/completions", &wanted);
            assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
            let parts = chunks
                .iter()
                .map(|c| c["choices"][0]["delta"]["content"].as_str().unwrap());
            assert_eq!(
                json!(parts.collect::<String>()),
                choice["message"]["content"]
            );
            assert_eq!(
                chunks.last().unwrap()["choices"][0]["finish_reason"],
                choice["finish_reason"]
            );
            messages.push(json!({"role": "assistant", "content": "A part."}));
            messages.push(json!({"role": "user", "content": "Of what?"}));
        }
        for messages in [
            json!(null),
            json!([]),
            json!(["hello"]),
            json!([{"role": "user", "content": [{"type": "image_url"}]}]),
        ] {
            let (status, answer) =
                serving.post("/v1/chat/completions", &json!({"messages": messages}));
            assert_eq!(
                (status, &answer["error"]["param"]),
                (400, &json!("messages")),
                "{answer}"
            );
        }
    }
    let dir = folder();
    let serving = Serving::start(dir.path(), &[]);
    let wanted = json!({"messages": [{"role": "user", "content": "x"}]});
    let (status, answer) = serving.post("/v1/chat/completions", &wanted);
    assert!(
        status == 400 && answer.to_string().contains("no chat template"),
        "{answer}"
    );
}

/// Needs a Python with the package `openai`: `SEGATTN_OPENAI_PYTHON` names it.
#[test]
fn the_openai_package_agrees() {
    let Some(python) = std::env::var_os("SEGATTN_OPENAI_PYTHON") else {
        println!("not run: SEGATTN_OPENAI_PYTHON names no Python");
        return;
    };
    let dir = chat_folder(false, 0);
    let serving = Serving::start(dir.path(), &["--api-key", "secret"]);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/serving/openai_client.py");
    let url = format!("http://{}/v1", serving.address);
    let output = std::process::Command::new(python)
        .arg(script)
        .args([&url, "secret"])
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr]
        .map(|text| String::from_utf8(text).unwrap())
        .concat();
    assert!(output.status.success(), "{said}");
}

#[test]
fn a_key_keeps_others_out() {
    let dir = folder();
    let serving = Serving::start(dir.path(), &["--api-key", "secret"]);
    let models = |headers| serving.text("GET", "/v1/models", headers, b"").0;
    assert_eq!(models("Authorization: Bearer secret\r\n"), 200);
    for headers in [
        "",
        "Authorization: Bearer secre\r\n",
        "Authorization: Bearer secrets\r\n",
        "Authorization: secret\r\n",
    ] {
        assert_eq!(models(headers), 401);
    }
    assert_eq!(serving.get("/health").0, 200);
    assert_eq!(serving.get("/metrics").0, 401);
}

#[test]
fn tokens_and_text_are_exchanged() {
    let dir = folder();
    let serving = Serving::start(dir.path(), &[]);
    let answer = serving.good("/tokenize", &json!({"prompt": "é!"}));
    assert_eq!(answer["tokens"], json!([0xc3, 0xa9, 0x21]));
    assert_eq!(answer["count"], 3);
    let answer = serving.good("/detokenize", &json!({"tokens": [0xc3, 0xa9, 0x21]}));
    assert_eq!(answer["prompt"], "é!");
    let (status, answer) = serving.post("/detokenize", &json!({"tokens": [33, 256]}));
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("tokens")));
    let (_, models) = serving.get("/v1/models");
    let models: Value = serde_json::from_str(&models).unwrap();
    assert_eq!(models["data"][0]["id"], "tiny");
}

#[cfg(unix)]
#[test]
fn a_server_that_is_stopped_lets_requests_end() {
    let dir = folder();
    for (grace, cut) in [("60", false), ("0", true)] {
        let mut serving = Serving::start(dir.path(), &["--grace", grace]);
        let tokens = if cut { 30000 } else { 2000 };
        let wanted =
            json!({"prompt": "x", "max_tokens": tokens, "ignore_eos": true, "stream": true})
                .to_string();
        let mut running = serving.send("POST", "/v1/completions", "", wanted.as_bytes());
        let mut begun = [0; 20];
        running.read_exact(&mut begun).unwrap();
        serving.terminate();
        let mut text = String::from_utf8(begun.to_vec()).unwrap();
        running.read_to_string(&mut text).unwrap();
        assert_eq!(text.contains("[DONE]"), !cut);
        assert_eq!(text.contains("the server is stopping"), cut);
        assert!(serving.process.wait().unwrap().success());
    }
}

/// Many clients at once for some seconds, `SEGATTN_SERVE_SECONDS` of them: each answer has the bits of `generate`, and
/// every token that the server counts reaches somebody.
#[test]
fn no_token_of_many_clients_is_lost() {
    const CLIENTS: usize = 64;
    let seconds = std::env::var("SEGATTN_SERVE_SECONDS").ok();
    let seconds = seconds.map_or(3, |text| text.parse().unwrap());
    let dir = folder();
    let prompts: Vec<Vec<u32>> = (0..24)
        .map(|i| tokens(i + 1, 1 + 13 * i as usize))
        .collect();
    let expected = generated(dir.path(), &prompts, &SAMPLING);
    let serving = Serving::start(dir.path(), &["--running", "16", "--waiting", "64"]);
    let (until, received) = (
        Instant::now() + Duration::from_secs(seconds),
        Mutex::new([0u64; 2]),
    );
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            let (serving, prompts, expected, received) = (&serving, &prompts, &expected, &received);
            scope.spawn(move || {
                let mut number = client;
                while Instant::now() < until {
                    number = (number * 5 + 1) % prompts.len();
                    let mut wanted = request(&prompts[number]);
                    let ids = match client % 2 {
                        0 => {
                            let answer = serving.good("/v1/completions", &wanted);
                            assert_same(&answer["choices"][0], &expected[number]);
                            answer["choices"][0]["token_ids"].clone()
                        }
                        _ => {
                            wanted["stream"] = true.into();
                            let chunks = serving.stream("/v1/completions", &wanted);
                            let ids = chunks
                                .iter()
                                .flat_map(|c| c["choices"][0]["token_ids"].as_array().unwrap());
                            ids.cloned().collect()
                        }
                    };
                    assert_eq!(ids, expected[number]["tokens"]);
                    let mut received = received.lock().unwrap();
                    received[0] += ids.as_array().unwrap().len() as u64;
                    received[1] += 1;
                }
            });
        }
    });
    let [tokens, answers] = *received.lock().unwrap();
    println!("{answers} answers, {tokens} tokens in {seconds} s");
    assert_eq!(serving.metric("segattn_new_tokens_total"), tokens);
    assert_eq!(
        serving.metric("segattn_sequences_total{how=\"ended\"}"),
        answers
    );
    assert_eq!(
        serving.metric("segattn_sequences_total{how=\"cancelled\"}"),
        0
    );
    assert_eq!(serving.metric("segattn_sequences_total{how=\"failed\"}"), 0);
    assert_eq!(serving.metric("segattn_running"), 0);
}
