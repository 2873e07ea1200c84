//! Segments that are read again with what their queries select (docs/contract.md, section 2).

use crate::common::{config_of, model, model_on, tokens, values};
use segattn::device::cpu::Cpu;
use segattn::device::reference::Reference;
use segattn::device::sampler::SamplerConfig;
use segattn::device::{Device, PastPool, Probes, Rows, SelectedBlocks, Selection};
use segattn::generate::{Generator, GeneratorConfig, Prompt};
use segattn::model::config::{HeadReads, ModelConfig};
use segattn::model::decoder::{Decoder, Step};
use segattn::model::segmentation::{End, Sequence, Tokens};
use segattn::model::session::{Feed, SelectedTokens, Session, score};
use segattn::model::session_file::{Origin, StateFile, save};
use segattn::model::state::{Angles, Plan, SequenceState, Slots};
use std::ops::ControlFlow;

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Segments of 16 tokens with sinks; every head reads the tail and the past.
fn all_heads() -> ModelConfig {
    let mut config = config_of(true, 16);
    let kv_heads = config.num_key_value_heads;
    let segment = config.segment.as_mut().unwrap();
    let both = HeadReads {
        prior: true,
        past: true,
    };
    segment.head_reads.fill(vec![both; kv_heads]);
    (segment.segment_len, segment.sink_len) = (16, 2);
    config.validate().unwrap();
    config
}

fn feed<'a>(tokens: &'a [u32], [breaks, rereads]: [&'a [usize]; 2]) -> Feed<'a> {
    Feed {
        sequence: 0,
        tokens,
        targets: &tokens[1..],
        breaks,
        rereads,
    }
}

/// The second reading is that of a sequence which has not read the segment before, with another selection.
#[test]
fn the_first_reading_leaves_its_selection_and_nothing_else() {
    let config = all_heads();
    for (seed, suffix) in [(1, 3), (2, 7), (3, 12)] {
        let model = model_on(Cpu, &config, &values(&config, seed));
        let ids = tokens(seed + 4, 120);
        let (start, end) = (80 - suffix, 80);
        let mut session = Session::new(&model, 1, 130, 1).unwrap();
        session
            .feed(&[feed(&ids[..start], [&[start], &[]])])
            .unwrap();
        let before = session.selected(0).unwrap();
        let read = |session: &mut Session<'_, Cpu>, rereads: &[usize]| {
            let suffix = Feed {
                targets: &ids[start + 1..=end],
                ..feed(&ids[start..end], [&[], rereads])
            };
            session.feed(&[suffix]).unwrap().remove(0)
        };
        let mut twice = read(&mut session, &[suffix]);
        let asked = session.selected(0).unwrap();
        assert_ne!(
            asked, before,
            "the suffix selects other rows than the tokens before it"
        );
        let eligible = |selected: &[SelectedTokens]| -> Vec<_> {
            selected.iter().map(|head| head.eligible.clone()).collect()
        };
        assert_eq!(eligible(&asked), eligible(&before));

        let mut other = Session::new(&model, 1, 130, 1).unwrap();
        (other.feed(&[feed(&ids[..start], [&[start], &[]])])).unwrap();
        other.replace_selected(0, &asked).unwrap();
        assert_eq!(bits(&read(&mut other, &[])), bits(&twice));
        // On into the segment after the next.
        let mut rest = [&mut session, &mut other]
            .map(|session| session.feed(&[feed(&ids[end..], [&[], &[]])]).unwrap());
        assert_eq!(bits(&rest[0][0]), bits(&rest[1][0]));
        assert_eq!(session.selected(0).unwrap(), other.selected(0).unwrap());
        assert_eq!(session.logits(0).unwrap(), other.logits(0).unwrap());
        twice.append(&mut rest[0][0]);
        let whole = Tokens {
            ids,
            breaks: vec![start],
            rereads: vec![end],
        };
        let scored = score(&model, &whole, 3).unwrap();
        assert_eq!(bits(&scored[start..]), bits(&twice));
    }
}

/// In the first layer queries are functions of their token. So what the segment asks for is what the queries of the
/// same tokens select, computed as a segment that nothing came before.
#[test]
fn a_segment_asks_with_its_last_queries() {
    let config = all_heads();
    let model = model(&config, &values(&config, 3));
    let plan = Plan::new(&config, 90);
    let angles = Angles::new(&Reference, &config, &plan, plan.segment_len).unwrap();
    let run = |state: &mut SequenceState<Reference>, tokens: &[u32], end: End| {
        let mut slots = Slots::new(&Reference, &plan, &angles, 1, plan.segment_len).unwrap();
        let mut step = Step::default();
        step.push(0, 0, 0, tokens, end);
        let mut placed = step.rows(&plan, slots.room);
        (model.advance(&plan, &step, &mut placed, &mut [state], &mut slots)).unwrap();
        slots
    };
    let ids = tokens(8, 90);
    for rows in [1, 2, 5, plan.segment_len] {
        let mut state = SequenceState::new(&Reference, &plan).unwrap();
        for segment in ids[..80].chunks(plan.segment_len) {
            run(&mut state, segment, End::Complete);
        }
        let before = state.layers[0].clone();
        let suffix = &ids[90 - rows..];
        run(&mut state, suffix, End::Again);
        let after = &state.layers[0];
        let read = |pool: &<Reference as Device>::Pool| pool.read(&Reference, 0..pool.tokens());
        let pools = [&before, after].map(|carry| read(carry.pool.as_ref().unwrap()).unwrap());
        assert_eq!(pools[0], pools[1]);
        assert_eq!(
            (after.tokens, after.prior_rows),
            (before.tokens, before.prior_rows)
        );
        assert_eq!(
            (&after.prior_k, &after.prior_v),
            (&before.prior_k, &before.prior_v)
        );

        let mut alone = SequenceState::new(&Reference, &plan).unwrap();
        let slots = run(&mut alone, suffix, End::Open);
        let queries = slots.layers[0].probes.as_ref().unwrap();
        let count = plan.probe_rows.min(rows);
        let probes = Probes {
            q: Rows::packed(queries, 0, plan.q_width()),
            rows: count,
            first: (rows - count) % plan.probe_rows,
            capacity: plan.probe_rows,
            group: plan.heads.q / plan.heads.kv,
        };
        let kv_heads: Vec<usize> = (0..plan.heads.kv).collect();
        let tail = before.prior_rows;
        let eligible = vec![plan.sink_len..before.tokens - tail; kv_heads.len()];
        let selection = Selection {
            kv_heads: &kv_heads,
            eligible: &eligible,
            rows: plan.past_len,
            rule: plan.rule,
            scale: plan.scale,
        };
        let pool = before.pool.as_ref().unwrap();
        let expected = pool.select(&Reference, &probes, &selection).unwrap();
        let [got, expected] = [&after.selected, &expected].map(|s| s.tokens(&Reference).unwrap());
        assert_eq!(got, expected, "{rows} rows");
    }
}

fn rereading(suffix: usize, times: usize) -> ModelConfig {
    let mut config = all_heads();
    let segment = config.segment.as_mut().unwrap();
    (segment.break_after_prompt, segment.reread_suffix) = (true, times);
    segment.prompt_suffix_len = suffix;
    config.validate().unwrap();
    config
}

fn generated<D: Device>(
    model: &Decoder<D>,
    prompts: &[Vec<u32>],
    side_by_side: usize,
) -> Vec<Vec<u32>> {
    let prompts: Vec<Prompt<'_>> = prompts
        .iter()
        .map(|tokens| Prompt {
            before: &[],
            tokens,
            breaks: &[],
            rereads: &[],
            stream: 3,
        })
        .collect();
    let mut session = Session::new(model, prompts.len(), 120, side_by_side).unwrap();
    let config = GeneratorConfig {
        sampler: SamplerConfig::default(),
        max_new: 25,
        end_tokens: Vec::new(),
    };
    let mut generator = Generator::new(&mut session, &prompts, config).unwrap();
    let all = generator.run(|_| ControlFlow::Continue(())).unwrap();
    for (prompt, generated) in prompts.iter().zip(&all) {
        let own = model.config.prompt_break();
        let count = prompt.tokens.len();
        let whole = Tokens {
            ids: [prompt.tokens, &generated.tokens].concat(),
            breaks: own.of(count).into_iter().collect(),
            rereads: own.rereads_of(count),
        };
        let scored = score(model, &whole, 2).unwrap();
        assert_eq!(
            bits(&generated.log_probabilities),
            bits(&scored[count - 1..])
        );
    }
    all.into_iter().map(|generated| generated.tokens).collect()
}

/// What a model writes after prompts whose suffixes are read twice is what scoring says of the whole. Prompts of one
/// token have no suffix; those of two have one token.
#[test]
fn generation_reads_suffixes_as_scoring_does() {
    for (seed, suffix) in [(1, 1), (2, 6), (3, 16)] {
        let config = rereading(suffix, 1 + seed as usize % 3);
        let model = model_on(Cpu, &config, &values(&config, seed));
        let prompts = [1, 2, 9, 37, 71].map(|len| tokens(seed + len as u64, len));
        let alone: Vec<Vec<u32>> = prompts
            .iter()
            .map(|prompt| generated(&model, std::slice::from_ref(prompt), 1).remove(0))
            .collect();
        assert_eq!(generated(&model, &prompts, 3), alone);
    }
}

/// Prompts are read in pieces of any length, and none cuts a suffix.
#[test]
fn pieces_of_a_prompt_do_not_cut_its_suffix() {
    let config = rereading(10, 2);
    let model = model_on(Cpu, &config, &values(&config, 5));
    let ids = tokens(6, 75);
    let whole = Sequence {
        tokens: &ids,
        breaks: &[20, 65],
        rereads: &[23, 30, 30, 75],
    };
    let mut logits = Vec::new();
    for piece in [1, 3, 7, 16, 22, 40, 74, 200] {
        let mut session = Session::new(&model, 1, 100, 2).unwrap();
        while session.position(0) < ids.len() {
            let from = session.position(0);
            let range = session.next_piece(0, whole, from, piece);
            assert!(!range.is_empty() && range.start == from);
            let cut = |start: usize, end: usize| start < range.end && range.end < end;
            assert!(!cut(20, 30) && !cut(65, 75), "{range:?}");
            let breaks = whole.breaks_within(range.clone());
            let rereads = whole.rereads_within(range.clone());
            session
                .feed(&[Feed {
                    sequence: 0,
                    tokens: &ids[range],
                    targets: &[],
                    breaks: &breaks,
                    rereads: &rereads,
                }])
                .unwrap();
        }
        logits.push(bits(&session.logits(0).unwrap()));
    }
    assert!(logits.iter().all(|l| *l == logits[0]));
}

/// A saved state that a reread came before goes on as the session does.
#[test]
fn a_saved_state_goes_on_after_a_reread() {
    let config = rereading(10, 2);
    let model = model_on(Cpu, &config, &values(&config, 7));
    let ids = tokens(2, 70);
    let mut session = Session::new(&model, 1, 100, 1).unwrap();
    session.feed(&[feed(&ids[..50], [&[40], &[50]])]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let file = segattn::model::files::OutputFile::open(&path).unwrap();
    save(&session, Origin::default(), &file).unwrap();
    let mut restored = Session::new(&model, 1, 100, 1).unwrap();
    let mut file = StateFile::open(&path).unwrap();
    file.restore(&mut restored, "").unwrap();
    let [a, b] = [&mut session, &mut restored]
        .map(|session| session.feed(&[feed(&ids[50..], [&[], &[]])]).unwrap());
    assert_eq!(bits(&a[0]), bits(&b[0]));
}

#[test]
fn a_segment_that_began_in_another_call_is_not_read_again() {
    let config = all_heads();
    let model = model_on(Cpu, &config, &values(&config, 5));
    let ids = tokens(6, 60);
    let mut session = Session::new(&model, 1, 100, 2).unwrap();
    session.feed(&[feed(&ids[..40], [&[37], &[]])]).unwrap();
    let refused = session.feed(&[feed(&ids[40..], [&[], &[2]])]).unwrap_err();
    let message = refused.to_string();
    assert!(
        message.contains("rereads") && message.contains("3 tokens"),
        "{message}"
    );
    let refused = session.feed(&[feed(&ids[40..], [&[], &[0]])]).unwrap_err();
    assert!(refused.to_string().contains("from 1 on"), "{refused}");
    // Nothing has been read, and the segment after the next break can be.
    assert_eq!(session.position(0), 40);
    session.feed(&[feed(&ids[40..], [&[5], &[9]])]).unwrap();
}

#[test]
fn models_that_retrieve_nothing_pass_over_rereads() {
    let mut without = all_heads();
    without.segment.as_mut().unwrap().past_len = 0;
    let mut plain = all_heads();
    plain.segment = None;
    for config in [without, plain] {
        let model = model_on(Cpu, &config, &values(&config, 5));
        let ids = tokens(6, 60);
        let [once, twice] = [vec![], vec![7, 30, 59]].map(|rereads| {
            let tokens = Tokens {
                ids: ids.clone(),
                breaks: vec![20],
                rereads,
            };
            bits(&score(&model, &tokens, 2).unwrap())
        });
        assert_eq!(once, twice);
    }
}
