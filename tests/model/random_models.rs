//! Equal bits (docs/contract.md, section 4) on the CPU over random models: every role in every model, gates that are
//! closed, open or between, several group sizes, tied and untied heads, sequences of different lengths, and breaks from
//! none to nearly everywhere.

use crate::common::{model_on, random, values};
use proptest::prelude::*;
use segattn::device::Device;
use segattn::device::cpu::Cpu;
use segattn::model::config::ModelConfig;
use segattn::model::decoder::Decoder;
use segattn::model::files::OutputFile;
use segattn::model::parameters::{Role, index, specs};
use segattn::model::segmentation::{Sequence, Tokens};
use segattn::model::session::{Feed, Session, score};
use segattn::model::session_file::{Origin, StateFile, save};
use segattn::train::streams::{Gradients, StreamConfig, accumulate};

const VOCAB: usize = 23;

/// A model and sequences for it.
#[derive(Debug, Clone)]
struct Case {
    config: ModelConfig,
    sequences: Vec<Tokens>,
    seed: u64,
}

impl Case {
    fn model(&self) -> Decoder<Cpu> {
        let mut values = values(&self.config, self.seed);
        let mut next = random(self.seed + 1);
        for (spec, values) in specs(&self.config).iter().zip(&mut values) {
            if matches!(spec.role, Role::Gate { .. }) {
                // Closed, open, and between.
                values.iter_mut().for_each(|gate| {
                    *gate = [0.0, 1.0, *gate][((next() + 0.5) * 3.0) as usize];
                });
            }
        }
        model_on(Cpu, &self.config, &values)
    }

    fn longest(&self) -> usize {
        self.sequences.iter().map(|s| s.ids.len()).max().unwrap()
    }
}

/// Layers, KV heads: at least four pairs, so that each of the four roles occurs.
const SHAPES: [(usize, usize); 6] = [(1, 4), (2, 2), (2, 4), (4, 1), (3, 2), (2, 3)];

fn cases() -> impl Strategy<Value = Case> {
    let shape = (
        prop::sample::select(SHAPES.to_vec()),
        prop::sample::select(vec![1usize, 2, 3, 8]),
        prop::sample::select(vec![8usize, 16, 24]),
        prop::sample::select(vec![8usize, 20, 32]),
        any::<bool>(),
    );
    let segment = (
        prop::sample::select(vec![1usize, 2, 4]),
        1usize..5,
        0usize..5,
        0usize..4,
        1usize..20,
        prop::sample::select(vec![0usize, 0, 1, 4, 16]),
    );
    let lengths = prop::collection::vec(2usize..70, 1..4);
    // Of a hundred tokens, how many have a break behind them; and how many ids are breaks.
    let breaks = (
        prop::sample::select(vec![0usize, 8, 30, 90]),
        prop::sample::select(vec![0usize, 0, 1, 3]),
    );
    let sequences = (lengths, breaks, any::<u64>());
    (shape, segment, sequences).prop_map(|(shape, segment, (lengths, breaks, seed))| {
        let ((layers, kv_heads), group, head_dim, hidden, tied) = shape;
        let (block, blocks, prior, past, probes, sinks) = segment;
        let (segment_len, seed) = (4 * blocks.max(block), seed >> 8);
        let whole = |n: usize| (n * block).min(segment_len / block * block);
        let past_len = whole(past);
        // Half of the models select windows, whose lengths are multiples of nothing.
        let (retrieval, past_len) = match seed % 2 {
            0 => (
                serde_json::json!({
                    "block_len": block, "probe_len": probes, "probe_window": 3, "probe_stride": 2,
                }),
                past_len,
            ),
            _ => (
                serde_json::json!({"queries": probes, "window_len": block + 2}),
                past_len + past,
            ),
        };
        // Two thirds of the pools are bounded, half of these as tightly as can be.
        let pool_len = match seed / 6 % 3 {
            0 => 0,
            spare => {
                let (unit, sinks) = ([block, 1][seed as usize % 2], sinks.min(segment_len));
                let spare = (spare as usize - 1) * segment_len;
                (past_len + whole(prior) + sinks + spare).next_multiple_of(unit)
            }
        };
        let json = serde_json::json!({
            "model_type": if seed / 24 % 3 == 0 { "llama_sink_logits" } else { "llama" },
            "vocab_size": VOCAB, "hidden_size": hidden, "intermediate_size": hidden + 6,
            "num_hidden_layers": layers, "num_attention_heads": kv_heads * group,
            "num_key_value_heads": kv_heads, "head_dim": head_dim, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 128, "tie_word_embeddings": tied,
            "segment": {
                "segment_len": segment_len, "prior_len": whole(prior), "past_len": past_len,
                "sink_len": sinks.min(segment_len), "pool_bits": (16 >> (seed % 3)),
                "pool_len": pool_len,
                "retrieval": retrieval,
                "head_reads": roles(layers, kv_heads, seed),
                "break_ids": (0..breaks.1).collect::<Vec<_>>(),
            },
        });
        let mut next = random(seed + 2);
        let sequence = |n: &usize| Tokens {
            ids: (0..*n)
                .map(|_| ((next() + 0.5) * VOCAB as f64) as u32)
                .collect(),
            breaks: (0..=*n)
                .filter(|_| (next() + 0.5) * 100.0 < breaks.0 as f64)
                .collect(),
            // Of one case in three.
            rereads: (0..=2 * n)
                .filter(|_| seed % 3 == 0 && next() > 0.4)
                .map(|i| i / 2)
                .collect(),
        };
        let sequences = lengths.iter().map(sequence);
        Case {
            sequences: sequences.collect(),
            config: ModelConfig::from_json(json).unwrap(),
            seed,
        }
    })
}

/// What each head reads: the four roles in turn from a random one on, so that all occur.
fn roles(layers: usize, kv_heads: usize, seed: u64) -> Vec<Vec<Vec<&'static str>>> {
    let role = |i: usize| match (i as u64 + seed) % 4 {
        0 => vec!["prior"],
        1 => vec!["past"],
        2 => vec!["prior", "past"],
        _ => vec![],
    };
    let layer = |l: usize| (0..kv_heads).map(|g| role(l * kv_heads + g)).collect();
    (0..layers).map(layer).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Feeds all sequences side by side in pieces of 0 to `most` tokens, saved and loaded now and then;
/// the log-probabilities.
fn in_pieces(
    case: &Case,
    model: &Decoder<Cpu>,
    most: f64,
    folder: &std::path::Path,
) -> Vec<Vec<u32>> {
    let (sequences, path) = (&case.sequences, folder.join("state"));
    let mut next = random(case.seed + most as u64);
    let new = |side_by_side| Session::new(model, sequences.len(), case.longest(), side_by_side);
    let mut session = new(2).unwrap();
    let mut scored = vec![Vec::new(); sequences.len()];
    while (0..sequences.len()).any(|b| session.position(b) + 1 < sequences[b].ids.len()) {
        let mut pieces = Vec::new();
        for (b, sequence) in sequences.iter().enumerate() {
            let (whole, at) = (Sequence::from(sequence).inputs(), session.position(b));
            let piece = match ((next() + 0.5) * (most + 1.0)) as usize {
                0 => at..at,
                count => session.next_piece(b, whole, at, count),
            };
            let breaks = whole.breaks_within(piece.clone());
            let rereads = whole.rereads_within(piece.clone());
            pieces.push((&sequence.ids, piece, [breaks, rereads]));
        }
        let feeds: Vec<Feed<'_>> = pieces
            .iter()
            .enumerate()
            .map(|(sequence, (ids, piece, [breaks, rereads]))| Feed {
                sequence,
                tokens: &ids[piece.clone()],
                targets: &ids[piece.start + 1..=piece.end],
                breaks,
                rereads,
            })
            .collect();
        for (all, more) in scored.iter_mut().zip(session.feed(&feeds).unwrap()) {
            all.extend(bits(&more));
        }
        if next() > 0.3 {
            save(
                &session,
                Origin::default(),
                &OutputFile::open(&path).unwrap(),
            )
            .unwrap();
            session = new(1 + (case.seed % 3) as usize).unwrap();
            let mut file = StateFile::open(&path).unwrap();
            file.restore(&mut session, "").unwrap();
        }
    }
    scored
}

/// Log-probabilities of the training forward, and every gradient.
fn trained(
    model: &Decoder<Cpu>,
    sequences: &[Tokens],
    config: StreamConfig,
) -> (Vec<Vec<u32>>, Vec<Vec<u32>>) {
    let mut gradients = Gradients::new(model).unwrap();
    let scored = accumulate(model, sequences, config, 0.25, &mut gradients).unwrap();
    let narrow = |s: &Vec<f64>| s.iter().map(|x| (*x as f32).to_bits()).collect();
    let tensors = gradients.finish(&Cpu).unwrap().iter();
    let read = |t| bits(&Cpu.read(t, 0..Cpu.len(t)).unwrap());
    (
        scored.iter().map(narrow).collect(),
        tensors.map(read).collect(),
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn scoring_training_prefill_decoding_and_a_saved_state_agree_to_the_bit(case in cases()) {
        let (model, folder) = (case.model(), tempfile::tempdir().unwrap());
        let score_all = |n| -> Vec<Vec<u32>> {
            let one = |s: &Tokens| bits(&score(&model, s, n).unwrap());
            case.sequences.iter().map(one).collect()
        };
        let expected = score_all(1);
        for n in [2, 3, usize::MAX] {
            prop_assert_eq!(&score_all(n), &expected, "{} segments per step", n);
        }
        for most in [1.0, 5.0, 40.0] {
            let got = in_pieces(&case, &model, most, folder.path());
            prop_assert_eq!(&got, &expected, "pieces of {}", most);
        }
        let mut gradients = Vec::new();
        for (segments_per_step, recompute) in [(1, false), (2, true), (usize::MAX, false)] {
            let config = StreamConfig { tbptt: (case.seed % 4) as usize, segments_per_step, recompute };
            let (scored, gradient) = trained(&model, &case.sequences, config);
            prop_assert_eq!(&scored, &expected, "trained {} side by side", segments_per_step);
            gradients.push(gradient);
        }
        prop_assert!(gradients.iter().all(|g| *g == gradients[0]));
    }

    /// Documents of a batch share no token, so the embedding rows (untied) of one document's tokens get
    /// their gradient from that document alone.
    #[test]
    fn a_document_s_loss_and_gradient_do_not_depend_on_its_neighbours(case in cases(), own in 2usize..60) {
        let mut case = case;
        case.config.tie_word_embeddings = false;
        let model = case.model();
        let half = VOCAB as u32 / 2;
        let mut next = random(case.seed + 3);
        let document = Tokens {
            ids: (0..own).map(|_| ((next() + 0.5) * f64::from(half)) as u32).collect(),
            breaks: (1..own).filter(|_| next() > 0.3).collect(),
            rereads: (1..own).filter(|_| next() > 0.4).collect(),
        };
        let config = StreamConfig {
            tbptt: (case.seed % 3) as usize,
            segments_per_step: 1 + (case.seed % 2) as usize,
            recompute: false,
        };
        let (alone, gradient) = trained(&model, std::slice::from_ref(&document), config);
        let others = case.sequences.iter().map(|s| Tokens {
            ids: s.ids.iter().map(|t| half + t / 2).collect(),
            breaks: s.breaks.clone(),
            rereads: s.rereads.clone(),
        });
        let mut batch: Vec<Tokens> = others.collect();
        let place = (case.seed % (batch.len() as u64 + 1)) as usize;
        batch.insert(place, document);
        let (scored, mixed) = trained(&model, &batch, config);
        prop_assert_eq!(&scored[place], &alone[0]);
        let rows = ..half as usize * case.config.hidden_size;
        prop_assert!(gradient[index::EMBEDDING][rows].iter().any(|x| *x != 0));
        prop_assert_eq!(&mixed[index::EMBEDDING][rows], &gradient[index::EMBEDDING][rows]);
    }
}
