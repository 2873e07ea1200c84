//! Decoding on a simulated GPU: steps that are recorded and replayed give the bits of those that are not, and of
//! scoring; tokens are chosen on the device as the host's sampler chooses them.

use std::ops::ControlFlow;

use crate::common::{config, gpu, model, tokens, upload, values};
use segattn::cuda::kernels::Error;
use segattn::device::gpu::Gpu;
use segattn::device::sampler::{Sampler, SamplerConfig, SamplerError};
use segattn::device::{
    Accumulate, Device, DeviceError, Kind, Recording, Rows, RowsMut, Sampled, Samplers,
};
use segattn::generate::{Finish, Generated, Generator, GeneratorConfig, Prompt};
use segattn::model::decoder::Decoder;
use segattn::model::files::OutputFile;
use segattn::model::session::{Feed, Session, score};
use segattn::model::session_file::{Origin, SavedSequence, StateFile, save};
use segattn_sim::{Checks, Driver};

type Model = Decoder<Gpu<Driver>>;
type Choosers = <Gpu<Driver> as Device>::Samplers;

fn sampled() -> SamplerConfig {
    SamplerConfig {
        temperature: 0.9,
        top_k: 9,
        top_p: 0.95,
        min_p: 0.01,
        repetition_penalty: 1.2,
        seed: 11,
    }
}

fn bits(scores: &[f32]) -> Vec<u32> {
    scores.iter().map(|x| x.to_bits()).collect()
}

fn session<'m>(
    model: &'m Model,
    prompts: &[Vec<u32>],
    by: &SamplerConfig,
) -> Session<'m, Gpu<Driver>> {
    let mut session = Session::new(model, prompts.len(), 48, 1).expect("a session");
    let streams: Vec<u64> = (0..prompts.len() as u64).collect();
    let histories: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    session
        .choose_by(by, &streams, &histories)
        .expect("settings");
    for (sequence, tokens) in prompts.iter().enumerate() {
        feed(&mut session, sequence, tokens);
    }
    session
}

fn feed(session: &mut Session<'_, Gpu<Driver>>, sequence: usize, tokens: &[u32]) {
    let feed = Feed {
        sequence,
        tokens,
        targets: &[],
        breaks: &[],
        rereads: &[],
    };
    session.feed(&[feed]).expect("a step");
}

/// The same step by calls that are never recorded.
fn unrecorded(session: &mut Session<'_, Gpu<Driver>>, next: &[(usize, u32)]) -> Vec<Sampled> {
    let tokens: Vec<[u32; 1]> = next.iter().map(|(_, token)| [*token]).collect();
    let feeds: Vec<Feed<'_>> = (next.iter().zip(&tokens))
        .map(|((sequence, _), tokens)| Feed {
            sequence: *sequence,
            tokens,
            targets: &[],
            breaks: &[],
            rereads: &[],
        })
        .collect();
    session.feed(&feeds).expect("a step");
    let sequences: Vec<usize> = next.iter().map(|(sequence, _)| *sequence).collect();
    session.sample(&sequences).expect("tokens")
}

fn generate(model: &Model, prompts: &[Vec<u32>], settings: &GeneratorConfig) -> Vec<Generated> {
    let mut session = Session::new(model, prompts.len(), 48, 1).expect("a session");
    let prompts: Vec<Prompt<'_>> = (prompts.iter().enumerate())
        .map(|(i, tokens)| Prompt {
            before: &[],
            breaks: &[],
            tokens,
            stream: i as u64,
            rereads: &[],
        })
        .collect();
    let mut generator = Generator::new(&mut session, &prompts, settings.clone()).expect("prompts");
    generator
        .run(|_| ControlFlow::Continue(()))
        .expect("tokens")
}

/// Sequences at different places of their segments, which end and retrieve while others go on; what is said of each
/// token is what scoring the whole says. Under every check.
#[test]
fn a_batch_decodes_to_the_bits_of_score() {
    for (tied, plain) in [(true, false), (false, true)] {
        let mut config = config(tied);
        if plain {
            config.segment = None;
            config.switches.sink_logits = true;
        }
        let model = model(gpu(1, Checks::All), &config, &values(&config, 21));
        let prompts: Vec<Vec<u32>> = [5, 9, 14].map(|n| tokens(n, n as usize, 27)).to_vec();
        let settings = GeneratorConfig {
            sampler: sampled(),
            max_new: 14,
            end_tokens: Vec::new(),
        };
        let before = model.device.driver().replays();
        let generated = generate(&model, &prompts, &settings);
        // Of 13 steps all but the first, and but those in which a segment begins or is complete.
        let replays = model.device.driver().replays() - before;
        assert_eq!(replays, if plain { 12 } else { 4 });
        for (prompt, generated) in prompts.iter().zip(&generated) {
            let whole = [&prompt[..], &generated.tokens].concat();
            let expected = score(&model, &whole, 2).expect("scores");
            let expected = &expected[prompt.len() - 1..];
            assert_eq!(bits(&generated.log_probabilities), bits(expected));
        }
    }
}

/// Also where other tokens are read in between, over the end of a segment, and where sequences leave and come back.
#[test]
fn recorded_steps_equal_unrecorded_ones() {
    let mut config = config(true);
    config.switches.sink_logits = true;
    let model = model(gpu(2, Checks::None), &config, &values(&config, 22));
    let prompts: Vec<Vec<u32>> = [3, 10, 6].map(|n| tokens(n, n as usize, 27)).to_vec();
    let mut one = session(&model, &prompts, &sampled());
    let mut other = session(&model, &prompts, &sampled());
    let all = [0, 1, 2];
    let mut last = one.sample(&all).expect("tokens");
    assert_eq!(last, other.sample(&all).expect("tokens"));
    let going: [&[usize]; 5] = [&[0, 1, 2], &[0, 2], &[0, 1, 2], &[1], &[2, 0]];
    for (round, going) in going.into_iter().enumerate() {
        for step in 0..5 {
            let next: Vec<(usize, u32)> = going.iter().map(|i| (*i, last[*i].token)).collect();
            let got = one.decode(&next).expect("tokens");
            assert_eq!(
                got,
                unrecorded(&mut other, &next),
                "round {round}, step {step}"
            );
            going.iter().zip(got).for_each(|(i, got)| last[*i] = got);
            if step == 2 {
                let tokens = tokens(round as u64, 3, 27);
                feed(&mut one, going[0], &tokens);
                feed(&mut other, going[0], &tokens);
            }
        }
        for i in all {
            let logits = |s: &Session<'_, Gpu<Driver>>| bits(&s.logits(i).expect("logits"));
            assert_eq!(logits(&one), logits(&other), "round {round}");
        }
    }
    assert!(model.device.driver().replays() >= 8);
}

#[test]
fn a_sequence_that_ends_leaves_the_others_as_they_are() {
    let config = config(true);
    let model = model(gpu(3, Checks::None), &config, &values(&config, 23));
    let prompts: Vec<Vec<u32>> = [7, 2, 12].map(|n| tokens(n, n as usize, 27)).to_vec();
    let mut settings = GeneratorConfig {
        sampler: sampled(),
        max_new: 12,
        end_tokens: Vec::new(),
    };
    let free = generate(&model, &prompts, &settings);
    settings.end_tokens = vec![free[1].tokens[4]];
    let ended = generate(&model, &prompts, &settings);
    for (ended, free) in ended.iter().zip(&free) {
        let end = free
            .tokens
            .iter()
            .position(|t| settings.end_tokens.contains(t));
        let len = end.map_or(12, |at| at + 1);
        assert_eq!(ended.tokens, free.tokens[..len]);
        assert_eq!(
            bits(&ended.log_probabilities),
            bits(&free.log_probabilities[..len])
        );
        let expected = end.map_or(Finish::Length, |_| Finish::EndToken);
        assert_eq!(ended.finish, Some(expected));
    }
    assert_eq!(ended[1].finish, Some(Finish::EndToken));
}

/// Also where a sequence goes on from a state that was saved in memory, and others go on beside it.
#[test]
fn sequences_that_join_and_leave_yield_what_each_yields_alone() {
    let config = config(true);
    let model = model(gpu(9, Checks::All), &config, &values(&config, 26));
    let settings = |i: usize| GeneratorConfig {
        sampler: SamplerConfig {
            seed: i as u64,
            repetition_penalty: [1.3, 1.0][i % 2],
            ..sampled()
        },
        max_new: 6 + 3 * i,
        end_tokens: Vec::new(),
    };
    let prompts: Vec<Vec<u32>> = [7, 2, 12, 9].map(|n| tokens(n, n as usize, 27)).to_vec();
    let alone = |i: usize| generate(&model, &prompts[i..=i], &settings(i)).remove(0);
    let alone: Vec<Generated> = (0..4).map(alone).collect();
    // The third comes again at the end, from the state after so many of its tokens.
    const KEPT: usize = 9;
    let all = [0, 1, 2, 3, 2];
    let mut session = Session::new(&model, 2, 48, 1).expect("a session");
    let mut generator = Generator::idle(&mut session);
    let (mut places, mut joined, mut state) = ([None; 2], 0, None::<SavedSequence>);
    let mut got = vec![(Vec::new(), Vec::new()); all.len()];
    while joined < all.len() || places.iter().any(Option::is_some) {
        let free: Vec<usize> = (0..2).filter(|place| places[*place].is_none()).collect();
        for place in free.into_iter().take(all.len() - joined) {
            let kept = state.as_ref().filter(|_| joined == 4);
            if let Some(state) = kept {
                generator.restore(place, state, KEPT).expect("a state");
            }
            let i = all[joined];
            let (before, tokens) = prompts[i].split_at(kept.map_or(0, |_| KEPT));
            let prompt = Prompt {
                before,
                tokens,
                breaks: &[],
                stream: 0,
                rereads: &[],
            };
            generator
                .join(place, &prompt, settings(i), false)
                .expect("a prompt");
            places[place] = Some(joined);
            joined += 1;
        }
        generator.read(&[(0, 3), (1, 3)]).expect("tokens");
        let session = generator.session();
        let third =
            (0..2).find(|place| places[*place] == Some(2) && session.position(*place) == KEPT);
        if let Some(third) = third {
            state = Some(SavedSequence::new(session, third, None).expect("a state"));
        }
        for token in generator.advance(&generator.ready()).expect("tokens") {
            let (tokens, scores) = &mut got[places[token.sequence].expect("one that joined")];
            tokens.push(token.token);
            scores.push(token.log_probability.to_bits());
            if token.finish.is_some() {
                generator.leave(token.sequence).expect("a place");
                places[token.sequence] = None;
            }
        }
    }
    assert!(state.is_some());
    for (i, (tokens, scores)) in all.into_iter().zip(&got) {
        assert_eq!(*tokens, alone[i].tokens, "sequence {i}");
        assert_eq!(*scores, bits(&alone[i].log_probabilities), "sequence {i}");
    }
}

#[test]
fn a_session_saved_between_replays_goes_on_to_the_same_bits() {
    let config = config(false);
    let model = model(gpu(4, Checks::None), &config, &values(&config, 24));
    let prompts: Vec<Vec<u32>> = [9, 13].map(|n| tokens(n, n as usize, 27)).to_vec();
    let by = SamplerConfig::greedy();
    let mut one = session(&model, &prompts, &by);
    let mut last = one.sample(&[0, 1]).expect("tokens");
    let next = |last: &[Sampled]| [(0, last[0].token), (1, last[1].token)];
    let steps = |session: &mut Session<'_, Gpu<Driver>>, last: &mut Vec<Sampled>, count| {
        let step = |_| {
            *last = session.decode(&next(last)).expect("tokens");
            last.clone()
        };
        (0..count).map(step).collect::<Vec<_>>()
    };
    steps(&mut one, &mut last, 6);
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("state");
    let place = OutputFile::open(&path).expect("a place");
    save(&one, Origin::default(), &place).expect("a file");
    let mut again = Session::new(&model, 2, 48, 1).expect("a session");
    StateFile::open(&path)
        .and_then(|mut file| file.restore(&mut again, ""))
        .expect("the state");
    again
        .choose_by(&by, &[0, 1], &[&[], &[]])
        .expect("settings");
    let mut restored = last.clone();
    assert_eq!(
        steps(&mut one, &mut last, 9),
        steps(&mut again, &mut restored, 9)
    );
}

#[test]
fn tokens_are_chosen_as_the_host_chooses_them() {
    let config = config(true);
    let model = model(gpu(5, Checks::All), &config, &values(&config, 25));
    let prompts: Vec<Vec<u32>> = [6, 8].map(|n| tokens(n, n as usize, 27)).to_vec();
    let mut session = session(&model, &prompts, &sampled());
    let host = |i: u64| Sampler::new(sampled(), i).expect("settings");
    let mut hosts: Vec<Sampler> = (0..2).map(host).collect();
    let mut histories = prompts.clone();
    let mut chosen = session.sample(&[0, 1]).expect("tokens");
    for step in 0..9 {
        for (i, chosen) in chosen.iter().enumerate() {
            let logits = session.logits(i).expect("logits");
            let token = hosts[i].sample(&logits, &histories[i]).expect("a token");
            assert_eq!(chosen.token, token, "step {step}, sequence {i}");
            let score = session.log_probability(i, token).expect("a score");
            assert_eq!(chosen.log_probability.to_bits(), score.to_bits());
            histories[i].push(token);
        }
        let next = [(0, chosen[0].token), (1, chosen[1].token)];
        chosen = session.decode(&next).expect("tokens");
    }
}

#[test]
fn logits_without_a_choice_are_the_hosts_errors() {
    let gpu = gpu(6, Checks::All);
    let (vocab, infinite) = (40, f32::NEG_INFINITY);
    let choose = |bad: &[(usize, f32)], rest: f32| {
        let mut values = vec![rest; 2 * vocab];
        bad.iter().for_each(|(at, x)| values[vocab + at] = *x);
        let mut logits = upload(&gpu, Kind::Exact, &values);
        let settings = SamplerConfig::default();
        let mut samplers = Choosers::new(&gpu, &settings, &[0, 1], &[&[], &[]], vocab)?;
        samplers.select(&gpu, &[1])?;
        samplers.sample(&gpu, &mut logits)?;
        samplers.sampled(&gpu, &logits)
    };
    let failed = |result: Result<Vec<Sampled>, DeviceError>| match result {
        Err(DeviceError::Sampler(error)) => error,
        other => panic!("{other:?}"),
    };
    let got = failed(choose(&[(7, f32::INFINITY)], 0.5));
    let expected = SamplerError::Logit {
        id: 7,
        got: f32::INFINITY,
    };
    assert_eq!(got, expected);
    assert_eq!(
        failed(choose(&[], infinite)),
        SamplerError::NoCandidate { len: vocab }
    );
    let chosen = choose(&[(3, 1.0)], infinite).expect("a token");
    assert_eq!((chosen[0].token, chosen[0].log_probability), (3, 0.0));
    let settings = SamplerConfig {
        top_p: 0.0,
        ..SamplerConfig::default()
    };
    let refused = Choosers::new(&gpu, &settings, &[0], &[&[]], vocab).expect_err("a bad setting");
    assert!(matches!(
        refused,
        DeviceError::Sampler(SamplerError::Setting { name: "top_p", .. })
    ));
}

/// What a recording has asked for is nobody else's while it can be replayed, and is given back with it.
#[test]
fn a_recording_keeps_its_memory() {
    let gpu = gpu(7, Checks::All);
    let numbers: Vec<f32> = (0..64).map(|i| i as f32).collect();
    let from = upload(&gpu, Kind::Exact, &numbers);
    let mut to = gpu.zeros(Kind::Exact, 64).expect("memory");
    let used = gpu.memory_use().buffers.used;
    let ((), recording) = gpu
        .record(|| {
            let mut between = gpu.empty(Kind::Exact, 64)?;
            gpu.copy(
                Rows::packed(&from, 0, 64),
                RowsMut::packed(&mut between, 0, 64),
                1,
                64,
                Accumulate::No,
            )?;
            gpu.copy(
                Rows::packed(&between, 0, 64),
                RowsMut::packed(&mut to, 0, 64),
                1,
                64,
                Accumulate::Yes,
            )
        })
        .expect("a recording")
        .expect("a device that records");
    assert_eq!(gpu.memory_use().buffers.used, used + 256);
    assert_eq!(gpu.read(&to, 0..64).expect("a read"), [0.0; 64]);
    let others: Vec<_> = (0..4)
        .map(|_| upload(&gpu, Kind::Exact, &[9.0; 64]))
        .collect();
    for times in [1.0, 2.0] {
        recording.replay().expect("a replay");
        let expected: Vec<f32> = numbers.iter().map(|x| times * x).collect();
        assert_eq!(gpu.read(&to, 0..64).expect("a read"), expected);
    }
    for other in &others {
        assert_eq!(gpu.read(other, 0..64).expect("a read"), [9.0; 64]);
    }
    drop((recording, others));
    assert_eq!(gpu.memory_use().buffers.used, used);
}

#[test]
fn what_the_host_takes_part_in_cannot_be_recorded() {
    let gpu = gpu(8, Checks::All);
    let mut buffer = gpu.zeros(Kind::Exact, 8).expect("memory");
    let refused = |error: DeviceError, expected: &str| match error {
        DeviceError::Gpu(Error::Recording { call }) => assert_eq!(call, expected),
        other => panic!("{other}"),
    };
    let written = gpu.record(|| gpu.write(&mut buffer, 0, &[1.0]));
    refused(written.expect_err("a write"), "upload");
    let read = gpu.record(|| gpu.read(&buffer, 0..1));
    refused(read.expect_err("a read"), "download");
    // Later calls are done again.
    gpu.write(&mut buffer, 0, &[2.0]).expect("a write");
    assert_eq!(gpu.read(&buffer, 0..2).expect("a read"), [2.0, 0.0]);
}
