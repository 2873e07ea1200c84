//! Breaks on a simulated GPU: segments of any length, pools that take any number of rows, and the ring of the last
//! queries, to the bits that scoring, decoding, training and saved states share.

use std::ops::ControlFlow;

use crate::common::{config, gpu, model, tokens, values};
use crate::model::{SCORE_BOUND, assert_close, decoded, gradients, streams};
use segattn::device::cpu::Cpu;
use segattn::device::sampler::SamplerConfig;
use segattn::generate::{Generator, GeneratorConfig, Prompt};
use segattn::model::config::ModelConfig;
use segattn::model::files::OutputFile;
use segattn::model::segmentation::{Sequence, Tokens};
use segattn::model::session::{Feed, Session, score};
use segattn::model::session_file::{Origin, StateFile, save};
use segattn_sim::Checks;

/// Segments of one row, tails over several segments, whole segments between, and tokens that end their segment.
fn broken(seed: u64, len: usize) -> Tokens {
    let breaks = [3, 4, 5, 6, 14, 16, 17, 25, 27].into_iter();
    Tokens {
        ids: tokens(seed, len, 27),
        breaks: breaks.filter(|b| *b < len).collect(),
        rereads: Vec::new(),
    }
}

fn config_with_breaks(tied: bool) -> ModelConfig {
    let mut config = config(tied);
    config.segment.as_mut().expect("segments").break_ids = vec![2, 5];
    config
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn scores_with_breaks_agree_with_the_cpu_and_have_equal_bits_however_they_are_computed() {
    let config = config_with_breaks(true);
    let values = values(&config, 6);
    // No two blocks have nearly equal scores in it: 16 bits could choose the other one.
    let sequence = broken(31, 30);
    let model = |checks| model(gpu(2, checks), &config, &values);
    let one = score(&model(Checks::All), &sequence, 1).expect("scores");
    let on_cpu = score(&crate::common::model(Cpu, &config, &values), &sequence, 1).expect("scores");
    let worst = (on_cpu.iter().zip(&one)).map(|(a, b)| (a - b).abs());
    let worst = worst.fold(0.0, f32::max);
    assert!(worst < SCORE_BOUND, "{worst}: {one:?} and {on_cpu:?}");
    let model = model(Checks::None);
    for segments_per_step in [2, 3, 9] {
        let scores = score(&model, &sequence, segments_per_step).expect("scores");
        assert_eq!(bits(&one), bits(&scores), "{segments_per_step}");
    }
    assert_eq!(bits(&one), bits(&decoded(&model, &sequence)));
    let others = [broken(9, 12), sequence.clone(), broken(10, 20)];
    for (tbptt, segments_per_step) in [(0, 1), (1, 2), (2, 9)] {
        let (scores, _) = gradients(&model, &others, streams(tbptt, segments_per_step));
        let trained: Vec<f32> = scores[1].iter().map(|x| *x as f32).collect();
        assert_eq!(bits(&one), bits(&trained), "{tbptt}, {segments_per_step}");
    }
}

#[test]
fn gradients_with_breaks_agree_with_the_cpu_and_do_not_depend_on_segments_per_step() {
    let config = config_with_breaks(false);
    let values = values(&config, 11);
    let sequences = [broken(12, 25), broken(13, 18)];
    let (on_cpu, on_gpu) = (
        model(Cpu, &config, &values),
        model(gpu(3, Checks::None), &config, &values),
    );
    for tbptt in [1, 2] {
        let (_, expected) = gradients(&on_cpu, &sequences, streams(tbptt, 1));
        let (_, got) = gradients(&on_gpu, &sequences, streams(tbptt, 1));
        assert_close(&on_cpu, &got, &expected);
        let (_, all) = gradients(&on_gpu, &sequences, streams(tbptt, 9));
        assert!(got == all, "segments per step");
    }
}

/// Sequences of a batch come to their breaks at different steps; steps between are replayed.
#[test]
fn generation_with_breaks_has_the_bits_of_score() {
    let mut config = config_with_breaks(true);
    config
        .segment
        .as_mut()
        .expect("segments")
        .break_after_prompt = true;
    let model = model(gpu(1, Checks::All), &config, &values(&config, 21));
    let prompts: Vec<Vec<u32>> = [5, 9, 14].map(|n| tokens(n, n as usize, 27)).to_vec();
    let prompts: Vec<Prompt<'_>> = (prompts.iter())
        .map(|tokens| Prompt {
            before: &[],
            tokens,
            breaks: &[],
            stream: 1,
            rereads: &[],
        })
        .collect();
    let settings = GeneratorConfig {
        sampler: SamplerConfig {
            seed: 11,
            ..SamplerConfig::default()
        },
        max_new: 14,
        end_tokens: Vec::new(),
    };
    let before = model.device.driver().replays();
    let mut session = Session::new(&model, prompts.len(), 48, 1).expect("a session");
    let mut generator = Generator::new(&mut session, &prompts, settings).expect("prompts");
    let generated = generator
        .run(|_| ControlFlow::Continue(()))
        .expect("tokens");
    assert!(model.device.driver().replays() > before);
    for (prompt, generated) in prompts.iter().zip(&generated) {
        let whole = Tokens {
            ids: [prompt.tokens, &generated.tokens].concat(),
            breaks: vec![prompt.tokens.len()],
            rereads: Vec::new(),
        };
        let expected = score(&model, &whole, 2).expect("scores");
        let expected = &expected[prompt.tokens.len() - 1..];
        assert_eq!(bits(&generated.log_probabilities), bits(expected));
    }
}

#[test]
fn a_state_after_breaks_is_restored_wherever_its_pool_lies() {
    let config = config_with_breaks(false);
    let values = values(&config, 24);
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("state");
    let all = broken(22, 34);
    let limited = |bytes| {
        let gpu = gpu(4, Checks::None);
        gpu.limit_pool(bytes);
        model(gpu, &config, &values)
    };
    let expected = score(&limited(usize::MAX), &all, 1).expect("scores");
    // In a segment, right behind a break, and behind a segment of one row.
    for (cut, [from, to]) in [
        (15, [usize::MAX, 0]),
        (17, [0, usize::MAX]),
        (18, [2048, 1024]),
        (26, [usize::MAX, 1024]),
    ] {
        let mut scores = Vec::new();
        let model = limited(from);
        let mut session = Session::new(&model, 1, 64, 1).expect("a session");
        let mut read = |session: &mut Session<'_, _>, range: std::ops::Range<usize>| {
            let feed = Feed {
                sequence: 0,
                tokens: &all.ids[range.clone()],
                targets: &all.ids[range.start + 1..=range.end],
                breaks: &Sequence::from(&all).breaks_within(range),
                rereads: &[],
            };
            scores.extend(session.feed(&[feed]).expect("a feed").remove(0));
        };
        read(&mut session, 0..cut);
        let place = OutputFile::open(&path).expect("a place");
        save(&session, Origin::default(), &place).expect("a file");
        let model = limited(to);
        let mut session = Session::new(&model, 1, 64, 2).expect("a session");
        let mut file = StateFile::open(&path).expect("a file");
        file.restore(&mut session, "").expect("a state");
        read(&mut session, cut..33);
        assert_eq!(bits(&scores), bits(&expected), "cut at {cut}");
    }
}
