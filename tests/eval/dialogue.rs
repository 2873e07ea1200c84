//! A chat turn by turn gives the bits of generation that reads everything anew, and goes on after it was saved.

use crate::common::{config_of, model_on, values};
use segattn::device::cpu::Cpu;
use segattn::generate::dialogue::{Answer, Dialogue, DialogueError, Progress};
use segattn::generate::sampler::SamplerConfig;
use segattn::generate::{Finish, GenerateError, Generated, Generator, GeneratorConfig, Prompt};
use segattn::model::chat::Chat;
use segattn::model::config::ModelConfig;
use segattn::model::decoder::Decoder;
use segattn::model::files::OutputFile;
use segattn::model::parameters::{Role, specs};
use segattn::model::session::Session;
use segattn::model::tokenizer::Tokenizer;
use std::ops::ControlFlow;

/// `#` ends an answer.
const TEMPLATE: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }}#\n{% endfor %}\
                        {% if add_generation_prompt %}assistant: {% endif %}";
const END: u32 = b'#' as u32;

/// A model of bytes.
fn bytes(break_after_prompt: bool, suffix: usize) -> ModelConfig {
    let mut config = config_of(false, 8);
    config.vocab_size = 256;
    config.eos_token_id = vec![END];
    let segment = config.segment.as_mut().unwrap();
    (segment.break_after_prompt, segment.prompt_suffix_len) = (break_after_prompt, suffix);
    config
}

fn settings(max_new: usize, seed: u64) -> GeneratorConfig {
    GeneratorConfig {
        sampler: SamplerConfig {
            temperature: 0.9,
            top_k: 40,
            repetition_penalty: 1.1,
            seed,
            ..SamplerConfig::default()
        },
        max_new,
        end_tokens: vec![END],
    }
}

fn take(dialogue: &mut Dialogue<'_, Cpu>, message: &str, max_new: usize) -> Answer {
    let go_on = |_: Progress<'_>| ControlFlow::Continue(());
    dialogue.turn(message, settings(max_new, 5), go_on).unwrap()
}

#[test]
fn a_turn_that_failed_within_is_not_gone_on_from() {
    let config = bytes(false, 0);
    let mut values = values(&config, 3);
    for (spec, values) in specs(&config).iter().zip(&mut values) {
        if matches!(spec.role, Role::Norm { .. }) {
            values.fill(3e38);
        }
    }
    let model = model_on(Cpu, &config, &values);
    let tokenizer = Tokenizer::bytes(&config);
    let chat = Chat::of_template(TEMPLATE, &tokenizer).unwrap();
    let mut dialogue = Dialogue::new(&model, &chat, &tokenizer, None, (64, 1)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let place = OutputFile::open(&folder.path().join("state")).unwrap();
    for _ in 0..2 {
        let turn = |dialogue: &mut Dialogue<'_, Cpu>| {
            dialogue.turn("Hello", settings(4, 5), |_| ControlFlow::Continue(()))
        };
        let failed = turn(&mut dialogue).unwrap_err();
        assert!(
            matches!(failed, DialogueError::Generate(GenerateError::Sampler(_))),
            "{failed}"
        );
        assert!(matches!(turn(&mut dialogue), Err(DialogueError::Torn)));
        let saved = dialogue.save("", &place);
        assert!(matches!(saved, Err(DialogueError::Torn)));
        dialogue.reset().unwrap();
    }
    dialogue.save("", &place).unwrap();
}

/// What the model generates after these tokens, read anew, with the breaks and rereads of each turn but the last.
fn anew(
    model: &Decoder<Cpu>,
    tokens: &[u32],
    [breaks, rereads]: [&[usize]; 2],
    config: GeneratorConfig,
) -> Generated {
    let longest = tokens.len() + config.max_new;
    let mut session = Session::new(model, 1, longest, 2).unwrap();
    let prompt = Prompt {
        before: &[],
        tokens,
        breaks,
        stream: 0,
        rereads,
    };
    let mut generator = Generator::new(&mut session, &[prompt], config).unwrap();
    generator
        .run(|_| ControlFlow::Continue(()))
        .unwrap()
        .remove(0)
}

fn bits(generated: &Generated) -> Vec<u32> {
    generated
        .log_probabilities
        .iter()
        .map(|x| x.to_bits())
        .collect()
}

#[test]
fn a_turn_has_the_bits_of_generation_on_all_tokens_so_far() {
    for (break_after_prompt, suffix, times) in [
        (false, 0, 0),
        (true, 0, 0),
        (true, 1, 0),
        (true, 11, 0),
        (true, 1, 1),
        (true, 5, 2),
    ] {
        let mut config = bytes(break_after_prompt, suffix);
        config.segment.as_mut().unwrap().reread_suffix = times;
        config.validate().unwrap();
        let model = model_on(Cpu, &config, &values(&config, 3));
        let tokenizer = Tokenizer::bytes(&config);
        let chat = Chat::of_template(TEMPLATE, &tokenizer).unwrap();
        let system = Some("Be brief.".to_owned());
        let mut dialogue = Dialogue::new(&model, &chat, &tokenizer, system, (64, 1)).unwrap();
        let (mut breaks, mut rereads) = (Vec::new(), Vec::new());
        let mut ends = Vec::new();
        for (turn, message) in ["Hello", "And?", "What else is there to say?"]
            .into_iter()
            .enumerate()
        {
            let before = dialogue.tokens().to_vec();
            let answer = take(&mut dialogue, message, 12 + turn);
            let tokens = [&before[..], &answer.read].concat();
            let breaks_given: &[usize] = if break_after_prompt { &breaks } else { &[] };
            let given = [breaks_given, &rereads];
            let expected = anew(&model, &tokens, given, settings(12 + turn, 5 + turn as u64));
            assert_eq!(answer.generated.tokens, expected.tokens);
            assert_eq!(bits(&answer.generated), bits(&expected));
            let text = tokenizer.decode(&tokens, false).unwrap();
            assert!(
                text.ends_with(&format!("#\nuser: {message}#\nassistant: ")),
                "{text:?}"
            );
            assert!(
                text.starts_with("system: Be brief.#\nuser: Hello#\nassistant: "),
                "{text:?}"
            );
            breaks.push(tokens.len() - suffix);
            rereads.extend(vec![tokens.len(); times]);
            ends.push(answer.generated.finish);
        }
        assert!(ends.contains(&Some(Finish::Length)), "{ends:?}");
    }
}

#[test]
fn an_answer_that_ends_is_followed_by_the_template_and_one_cut_short_by_its_last_token() {
    let config = bytes(false, 0);
    let model = model_on(Cpu, &config, &values(&config, 3));
    let tokenizer = Tokenizer::bytes(&config);
    let chat = Chat::of_template(TEMPLATE, &tokenizer).unwrap();
    let mut dialogue = Dialogue::new(&model, &chat, &tokenizer, None, (64, 1)).unwrap();
    let cut = take(&mut dialogue, "Hi", 5).generated;
    let next = take(&mut dialogue, "So", 1);
    let expected = [
        &cut.tokens[4..],
        b"#\nuser: So#\nassistant: ".map(u32::from).as_slice(),
    ]
    .concat();
    assert_eq!(next.read, expected);
    // The first token that the model chooses ends the answer.
    dialogue.reset().unwrap();
    let mut ending = settings(5, 5);
    ending.end_tokens = vec![cut.tokens[0]];
    let answer = dialogue
        .turn("Hi", ending, |_| ControlFlow::Continue(()))
        .unwrap();
    assert_eq!(
        (answer.text.as_str(), answer.generated.tokens.len()),
        ("", 1)
    );
    let next = take(&mut dialogue, "So", 1);
    assert_eq!(next.read, b"#\nuser: So#\nassistant: ".map(u32::from));
}

#[test]
fn a_saved_chat_goes_on_to_the_same_bits() {
    let config = bytes(true, 0);
    let model = model_on(Cpu, &config, &values(&config, 3));
    let tokenizer = Tokenizer::bytes(&config);
    let chat = Chat::of_template(TEMPLATE, &tokenizer).unwrap();
    let new = || Dialogue::new(&model, &chat, &tokenizer, None, (64, 1)).unwrap();
    let mut dialogue = new();
    take(&mut dialogue, "Hello", 12);
    take(&mut dialogue, "And?", 7);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("chat.state");
    dialogue
        .save("these", &OutputFile::open(&path).unwrap())
        .unwrap();
    let expected = take(&mut dialogue, "More", 9);
    let mut loaded = new();
    take(&mut loaded, "Something else", 3);
    loaded.load(&path, "these").unwrap();
    let got = take(&mut loaded, "More", 9);
    assert_eq!(got, expected);
    assert_eq!(bits(&got.generated), bits(&expected.generated));
    // What cannot be restored leaves an empty chat.
    let failed = loaded.load(&path, "others").unwrap_err();
    assert!(
        failed.to_string().contains("the model's weights"),
        "{failed}"
    );
    assert!(loaded.tokens().is_empty());
    let mut session = Session::new(&model, 1, 8, 1).unwrap();
    session
        .feed(&[segattn::model::session::Feed {
            sequence: 0,
            tokens: &[1],
            targets: &[],
            breaks: &[],
            rereads: &[],
        }])
        .unwrap();
    let place = OutputFile::open(&path).unwrap();
    segattn::model::session_file::save(&session, Default::default(), &place).unwrap();
    let failed = loaded.load(&path, "").unwrap_err();
    assert!(
        failed
            .to_string()
            .contains("expected the state of one chat"),
        "{failed}"
    );
}

#[test]
fn a_message_too_long_leaves_the_chat_as_it_was() {
    let mut config = bytes(false, 0);
    config.segment = None;
    let model = model_on(Cpu, &config, &values(&config, 3));
    let tokenizer = Tokenizer::bytes(&config);
    let chat = Chat::of_template(TEMPLATE, &tokenizer).unwrap();
    let mut dialogue = Dialogue::new(&model, &chat, &tokenizer, None, (60, 1)).unwrap();
    take(&mut dialogue, "Hi", 4);
    let before = dialogue.tokens().to_vec();
    let failed = dialogue
        .turn(&"long ".repeat(12), settings(4, 5), |_| {
            ControlFlow::Continue(())
        })
        .unwrap_err();
    assert!(
        matches!(
            failed,
            DialogueError::Generate(GenerateError::TooLong { .. })
        ),
        "{failed}"
    );
    assert_eq!(dialogue.tokens(), before);
    take(&mut dialogue, "Hi", 4);
    let mut seen = String::new();
    dialogue.reset().unwrap();
    let stopped = dialogue.turn("Hi", settings(20, 5), |progress| match progress {
        Progress::Text(text) => {
            seen += text;
            ControlFlow::Break(())
        }
        Progress::Reading(_) => ControlFlow::Continue(()),
    });
    let stopped = stopped.unwrap();
    assert_eq!(stopped.generated.tokens.len(), 1);
    assert_eq!(stopped.text, seen);
}
