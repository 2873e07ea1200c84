//! The generation loop: sequences do not see their neighbours, log-probabilities are the model's
//! own, and every end is reached for its own reason.

use crate::common::{config, model, random, values};
use segattn::device::reference::Reference;
use segattn::generate::sampler::SamplerConfig;
use segattn::generate::{Finish, GenerateError, Generated, Generator, GeneratorConfig, Prompt};
use segattn::model::decoder::Decoder;
use segattn::model::session::{Session, score};
use std::ops::ControlFlow;

fn tokens(seed: u64, len: usize) -> Vec<u32> {
    let mut next = random(seed);
    (0..len).map(|_| ((next() + 0.5) * 11.0) as u32).collect()
}

fn sampled(max_new: usize) -> GeneratorConfig {
    GeneratorConfig {
        sampler: SamplerConfig {
            temperature: 0.9,
            top_k: 9,
            top_p: 0.97,
            repetition_penalty: 1.1,
            seed: 5,
            ..SamplerConfig::default()
        },
        max_new,
        end_tokens: Vec::new(),
    }
}

fn generate(
    model: &Decoder<Reference>,
    prompts: &[(Vec<u32>, u64)],
    config: &GeneratorConfig,
    segments_per_step: usize,
) -> Vec<Generated> {
    let longest = prompts.iter().map(|p| p.0.len()).max().unwrap() + config.max_new;
    let mut session = Session::new(model, prompts.len(), longest, segments_per_step).unwrap();
    let prompts: Vec<Prompt<'_>> = prompts
        .iter()
        .map(|(tokens, stream)| Prompt {
            before: &[],
            breaks: &[],
            tokens,
            stream: *stream,
            rereads: &[],
        })
        .collect();
    let mut generator = Generator::new(&mut session, &prompts, config.clone()).unwrap();
    generator.run(|_| ControlFlow::Continue(())).unwrap()
}

fn assert_same(got: &Generated, expected: &Generated) {
    assert_eq!(got.tokens, expected.tokens);
    assert_eq!(got.finish, expected.finish);
    let bits =
        |g: &Generated| -> Vec<u32> { g.log_probabilities.iter().map(|x| x.to_bits()).collect() };
    assert_eq!(bits(got), bits(expected));
}

#[test]
fn a_batch_of_mixed_prompts_gives_each_what_it_gives_alone() {
    for plain in [false, true] {
        let mut config = config(false);
        if plain {
            config.segment = None;
        }
        let model = model(&config, &values(&config, 3));
        // Lengths around segment boundaries (8), and a prompt of one token.
        let prompts: Vec<(Vec<u32>, u64)> = [21, 1, 8, 16, 7, 30]
            .into_iter()
            .enumerate()
            .map(|(i, len)| (tokens(i as u64 + 1, len), 40 + i as u64))
            .collect();
        let together = generate(&model, &prompts, &sampled(20), 2);
        for (i, prompt) in prompts.iter().enumerate() {
            let alone = generate(&model, std::slice::from_ref(prompt), &sampled(20), 1);
            assert_same(&together[i], &alone[0]);
            assert_eq!(alone[0].tokens.len(), 20);
        }
        let mut other_seed = sampled(20);
        other_seed.sampler.seed = 6;
        assert_ne!(generate(&model, &prompts, &other_seed, 2), together);
    }
}

#[test]
fn log_probabilities_are_those_that_score_gives_the_finished_sequence() {
    let config = config(true);
    let model = model(&config, &values(&config, 4));
    let prompt = tokens(9, 13);
    let generated = generate(&model, &[(prompt.clone(), 0)], &sampled(25), 1).remove(0);
    let mut whole = prompt.clone();
    whole.extend(&generated.tokens);
    let expected = score(&model, &whole, 2).unwrap();
    for (got, expected) in generated
        .log_probabilities
        .iter()
        .zip(&expected[prompt.len() - 1..])
    {
        // The logits pass through f32 on the way to the host; the device is f64 here.
        assert!((got - expected).abs() <= 1e-5, "{got} for {expected}");
    }
}

#[test]
fn greedy_choice_takes_the_likeliest_token() {
    let config = config(true);
    let model = model(&config, &values(&config, 6));
    let greedy = GeneratorConfig {
        sampler: SamplerConfig::greedy(),
        max_new: 12,
        end_tokens: Vec::new(),
    };
    let prompt = tokens(2, 10);
    let generated = generate(&model, &[(prompt.clone(), 0)], &greedy, 1).remove(0);
    let mut whole = prompt;
    for (token, got) in generated.tokens.iter().zip(&generated.log_probabilities) {
        for other in 0..11 {
            let mut with = whole.clone();
            with.push(other);
            let there = *score(&model, &with, 1).unwrap().last().unwrap();
            assert!(there <= got + 1e-5, "{other} is likelier than {token}");
        }
        whole.push(*token);
    }
}

#[test]
fn sequences_end_by_themselves_and_others_go_on() {
    let config = config(true);
    let model = model(&config, &values(&config, 4));
    let prompts = [(tokens(1, 9), 0), (tokens(2, 4), 1), (tokens(3, 17), 2)];
    let free = generate(&model, &prompts, &sampled(15), 1);
    let ender = free[0].tokens[6];
    let mut ended = sampled(15);
    ended.end_tokens = vec![ender];
    let mut session = Session::new(&model, 3, 64, 1).unwrap();
    let given = prompts.each_ref().map(|(tokens, stream)| Prompt {
        before: &[],
        breaks: &[],
        tokens,
        stream: *stream,
        rereads: &[],
    });
    let mut generator = Generator::new(&mut session, &given, ended).unwrap();
    let mut seen = vec![Vec::new(); 3];
    let got = generator
        .run(|token| {
            seen[token.sequence].push(token.token);
            if token.sequence == 2 && seen[2].len() == 3 {
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        })
        .unwrap();
    for (i, (got, free)) in got.iter().zip(&free).enumerate() {
        let end = free.tokens.iter().position(|t| *t == ender);
        let (len, finish) = match (i, end) {
            (2, None | Some(3..)) => (3, Finish::Stopped),
            (_, Some(at)) => (at + 1, Finish::EndToken),
            (_, None) => (15, Finish::Length),
        };
        assert_eq!(got.tokens, free.tokens[..len]);
        assert_eq!(got.tokens, seen[i]);
        assert_eq!(got.log_probabilities, free.log_probabilities[..len]);
        assert_eq!(got.finish, Some(finish));
    }
    assert_eq!(got[0].finish, Some(Finish::EndToken));
}

#[test]
fn a_session_goes_on_from_what_it_has_read() {
    let config = config(true);
    let model = model(&config, &values(&config, 4));
    let prompt = tokens(7, 26);
    let greedy = GeneratorConfig {
        sampler: SamplerConfig::greedy(),
        max_new: 9,
        end_tokens: Vec::new(),
    };
    let expected = generate(&model, &[(prompt.clone(), 0)], &greedy, 1).remove(0);
    for cut in [1, 11, 26] {
        let mut session = Session::new(&model, 1, 64, 1).unwrap();
        let read = |tokens| Prompt {
            before: &[],
            breaks: &[],
            tokens,
            stream: 0,
            rereads: &[],
        };
        let only_read = GeneratorConfig {
            max_new: 0,
            ..greedy.clone()
        };
        let first = [read(&prompt[..cut])];
        let mut generator = Generator::new(&mut session, &first, only_read).unwrap();
        let nothing = generator.run(|_| ControlFlow::Continue(())).unwrap();
        assert!(nothing[0].tokens.is_empty());
        assert_eq!(session.position(0), cut);
        let rest = [read(&prompt[cut..])];
        let mut generator = Generator::new(&mut session, &rest, greedy.clone()).unwrap();
        let got = generator.run(|_| ControlFlow::Continue(())).unwrap();
        assert_same(&got[0], &expected);
    }
}

#[test]
fn bad_prompts_are_typed_errors() {
    let mut config = config(true);
    config.segment = None;
    let model = model(&config, &values(&config, 4));
    let fails = |prompts: &[&[u32]], max_new| {
        let mut session = Session::new(&model, 2, 10, 1).unwrap();
        let prompts: Vec<Prompt<'_>> = prompts
            .iter()
            .map(|tokens| Prompt {
                before: &[],
                breaks: &[],
                tokens,
                stream: 0,
                rereads: &[],
            })
            .collect();
        Generator::new(&mut session, &prompts, sampled(max_new)).err()
    };
    assert!(fails(&[&[1; 6], &[2]], 5).is_none());
    assert!(matches!(
        fails(&[&[1; 6], &[2]], 6),
        Some(GenerateError::TooLong {
            prompt: 0,
            capacity: 10,
            got: 11
        })
    ));
    assert!(matches!(
        fails(&[&[1]], 1),
        Some(GenerateError::Prompts {
            expected: 2,
            got: 1
        })
    ));
    assert!(matches!(
        fails(&[&[1], &[]], 1),
        Some(GenerateError::EmptyPrompt { prompt: 1 })
    ));
    assert!(matches!(
        fails(&[&[1], &[0, 11]], 1),
        Some(GenerateError::Token {
            prompt: 1,
            at: 1,
            vocab_size: 11,
            got: 11
        })
    ));
}
