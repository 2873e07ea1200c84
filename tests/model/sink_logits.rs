//! Sink logits (docs/contract.md, section 2): a key without a value in the softmax of every query head. What they
//! compute, equal bits with and without segments, files, and training. Their gradient against finite differences is in
//! `tests/model/gradients.rs`.

use std::collections::BTreeMap;

use crate::common::{config_of, model, model_on, random, run_config, tokens, values};
use crate::pieces::in_pieces;
use crate::spread::{self, Run, Spread, same, sequences};
use segattn::device::cpu::Cpu;
use segattn::device::reference::Reference;
use segattn::device::{
    Device, Heads, Kind, Rows, RowsMut, SinkLogits, SinkLogitsGrad, SlotSpan, StepRows,
};
use segattn::model::config::{ModelConfig, WeightType};
use segattn::model::decoder::Decoder;
use segattn::model::error::{ModelError, WeightsError};
use segattn::model::parameters::{Extra, index, parameters, specs};
use segattn::model::session::score;
use segattn::model::weights::{Checkpoint, SaveOptions, initial, save};
use segattn::train::progress::Tensors;
use segattn::train::streams::{Gradients, StreamConfig, accumulate};
use segattn::train::trainer::Trainer;

/// The shared model with sink logits, and without segments if asked.
fn config(segments: bool) -> ModelConfig {
    let mut json = config_of(true, 8).to_json();
    json["model_type"] = "llama_sink_logits".into();
    json["architectures"] = serde_json::json!(["LlamaSinkLogitsForCausalLM"]);
    if !segments {
        json.as_object_mut().unwrap().remove("segment");
    }
    ModelConfig::from_json(json).unwrap()
}

fn sinks(config: &ModelConfig, l: usize) -> usize {
    index::extra(config, l, Extra::SinkLogits).unwrap()
}

const HEADS: Heads = Heads {
    q: 3,
    kv: 1,
    dim: 8,
};

fn spans() -> Vec<SlotSpan> {
    let mut row = 0;
    let lens = [2, 5, 1];
    let spans = lens.iter().enumerate().map(|(slot, rows)| {
        let span = SlotSpan {
            row,
            rows: *rows,
            start: 0,
            slot,
        };
        row += rows;
        span
    });
    spans.collect()
}

/// What a softmax over keys and one key more with this score makes of output and log-sum-exp without it.
fn with_key(logit: f64, lse: f64, out: &[f64]) -> Vec<f64> {
    let sum = lse.exp() + logit.exp();
    out.iter().map(|out| lse.exp() / sum * out).collect()
}

/// Outputs `[rows, heads * dim]`, then gradients of outputs, log-sum-exps and logits.
fn on<D: Device>(
    device: &D,
    logits: &[f64],
    lse: &[f64],
    out: &[f64],
    d_y: &[f64],
) -> Vec<Vec<f64>> {
    let upload = |kind, values: &[f64]| {
        let narrow: Vec<f32> = values.iter().map(|x| *x as f32).collect();
        let mut buffer = device.empty(kind, values.len()).unwrap();
        device.write(&mut buffer, 0, &narrow).unwrap();
        buffer
    };
    let (spans, width) = (spans(), HEADS.q * HEADS.dim);
    let rows = lse.len() / HEADS.q;
    let step = StepRows {
        tokens: vec![0; rows],
        angles: vec![0; rows],
        cache_rows: vec![0; rows],
        probe_rows: vec![None; rows],
        reach: 5,
        spans: spans.clone(),
    };
    let step = device.step(step).unwrap();
    let [out, d_y] = [out, d_y].map(|values| upload(Kind::Activation, values));
    let [lse, logits] = [lse, logits].map(|values| upload(Kind::Exact, values));
    let sinks = SinkLogits {
        logits: &logits,
        heads: HEADS,
        out: Rows::packed(&out, 0, width),
        lse: Rows::packed(&lse, 0, HEADS.q),
    };
    let mut results =
        [width, width, HEADS.q].map(|width| device.empty(Kind::Exact, rows * width).unwrap());
    let mut d_logits = device.empty(Kind::Exact, spans.len() * HEADS.q).unwrap();
    let [y, d_out, d_lse] = &mut results;
    let rows_of = RowsMut::packed(y, 0, width);
    device.sink_logits(&sinks, &step, rows_of).unwrap();
    let grad = SinkLogitsGrad {
        spans: &spans,
        d_y: Rows::packed(&d_y, 0, width),
        d_out: RowsMut::packed(d_out, 0, width),
        d_lse: RowsMut::packed(d_lse, 0, HEADS.q),
        d_logits: &mut d_logits,
    };
    device.sink_logits_grad(&sinks, grad).unwrap();
    let read = |buffer| device.read_wide(buffer, 0..device.len(buffer)).unwrap();
    results.iter().chain([&d_logits]).map(read).collect()
}

/// For each row and head, its span and the place of its log-sum-exp.
fn places() -> Vec<(usize, usize)> {
    let mut places = Vec::new();
    for (i, span) in spans().iter().enumerate() {
        for row in 0..span.rows {
            let at = |head| span.row * HEADS.q + head * span.rows + row;
            places.extend((0..HEADS.q).map(|head| (i, at(head))));
        }
    }
    places
}

/// The scaled output is that of a softmax with one more key, whose value is 0; the gradients are those of that formula
/// by finite differences, of output and log-sum-exp as if they were independent.
fn agrees_with_one_more_key<D: Device>(device: &D, bound: f64) {
    let mut next = random(4);
    let rows = 8;
    let mut draw = |len: usize, factor: f64| -> Vec<f64> {
        (0..len)
            .map(|_| f64::from((factor * next()) as f32))
            .collect()
    };
    let (logits, lse) = (draw(HEADS.q, 3.0), draw(rows * HEADS.q, 6.0));
    let [out, d_y] = [2.0, 1.5].map(|factor| draw(rows * HEADS.q * HEADS.dim, factor));
    let got = on(device, &logits, &lse, &out, &d_y);
    let close = |name: &str, got: f64, expected: f64| {
        let error = (got - expected).abs();
        assert!(
            error <= bound * (1.0 + expected.abs()),
            "{name}: {got}, {expected}"
        );
    };
    let mut d_logits = vec![0.0; spans().len() * HEADS.q];
    for (i, (span, at)) in places().into_iter().enumerate() {
        let head = i % HEADS.q;
        let columns = i * HEADS.dim..(i + 1) * HEADS.dim;
        let (out, d_y) = (&out[columns.clone()], &d_y[columns.clone()]);
        let y = with_key(logits[head], lse[at], out);
        let along = |logit: f64, lse: f64| -> f64 {
            with_key(logit, lse, out)
                .iter()
                .zip(d_y)
                .map(|(y, d)| y * d)
                .sum()
        };
        let step = 1e-4;
        let slope = |f: &dyn Fn(f64) -> f64| (f(step) - f(-step)) / (2.0 * step);
        close(
            "d_lse",
            got[2][at],
            slope(&|x| along(logits[head], lse[at] + x)),
        );
        d_logits[span * HEADS.q + head] += slope(&|x| along(logits[head] + x, lse[at]));
        let share = with_key(logits[head], lse[at], &[1.0])[0];
        for (j, column) in columns.enumerate() {
            close("y", got[0][column], y[j]);
            close("d_out", got[1][column], share * d_y[j]);
        }
    }
    for (got, expected) in got[3].iter().zip(&d_logits) {
        close("d_logits", *got, *expected);
    }
}

#[test]
fn the_output_is_that_of_one_more_key() {
    agrees_with_one_more_key(&Reference, 1e-6);
    agrees_with_one_more_key(&Cpu, 1e-5);
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn gradients<D: Device>(
    model: &Decoder<D>,
    tokens: &[u32],
    streams: StreamConfig,
) -> (Vec<f32>, Vec<Vec<f32>>) {
    let mut gradients = Gradients::new(model).unwrap();
    let scored = accumulate(model, &[tokens.to_vec()], streams, 1.0, &mut gradients).unwrap();
    let device = &model.device;
    let tensors = gradients.finish(device).unwrap();
    let read = |tensor| device.read(tensor, 0..device.len(tensor)).unwrap();
    let scored = scored[0].iter().map(|x| *x as f32).collect();
    (scored, tensors.iter().map(read).collect())
}

fn has_equal_bits<D: Device>(model: &Decoder<D>) {
    let tokens = tokens(6, 39);
    let expected = score(model, &tokens, 1).unwrap();
    assert_eq!(bits(&score(model, &tokens, 3).unwrap()), bits(&expected));
    assert_eq!(bits(&in_pieces(model, &tokens)), bits(&expected));
    let streams = StreamConfig {
        tbptt: 1,
        segments_per_step: 1,
        recompute: false,
    };
    let (scored, first) = gradients(model, &tokens, streams);
    assert_eq!(bits(&scored), bits(&expected), "training");
    let other = StreamConfig {
        segments_per_step: usize::MAX,
        recompute: true,
        ..streams
    };
    assert!(gradients(model, &tokens, other).1 == first, "gradients");
    for l in 0..2 {
        let gradient = &first[sinks(&model.config, l)];
        assert!(gradient.iter().all(|g| g.is_finite() && *g != 0.0));
    }
}

#[test]
fn training_scoring_and_decoding_agree_to_the_bit_with_segments_and_without() {
    for segments in [true, false] {
        let config = config(segments);
        let values = values(&config, 8);
        has_equal_bits(&model(&config, &values));
        has_equal_bits(&model_on(Cpu, &config, &values));
    }
}

/// A logit far below every score leaves the bits of a model without one; one far above leaves nothing of attention.
#[test]
fn far_logits_change_nothing_or_take_all() {
    for segments in [true, false] {
        let (with, tokens) = (config(segments), tokens(7, 30));
        let mut plain = config_of(true, 8);
        plain.segment.take_if(|_| !segments);
        let mut values = values(&with, 9);
        let scored =
            |values: &[Vec<f64>]| score(&model_on(Cpu, &with, values), &tokens, 1).unwrap();
        (0..2).for_each(|l| values[sinks(&with, l)].fill(-1e4));
        let base = &values[..specs(&plain).len()];
        let expected = score(&model_on(Cpu, &plain, base), &tokens, 1).unwrap();
        assert_eq!(bits(&scored(&values)), bits(&expected));
        (0..2).for_each(|l| values[sinks(&with, l)].fill(1e4));
        let nothing = scored(&values);
        let mut unread = values.clone();
        (0..2).for_each(|l| unread[index::output(l)].fill(0.0));
        assert_eq!(bits(&scored(&unread)), bits(&nothing));
    }
}

#[test]
fn runs_have_the_same_bits_on_any_number_of_ranks_and_stages() {
    let model = config(true);
    let config = spread::config(&[]);
    let run = Run {
        model: &model,
        config: &config,
        sequences: &|step| sequences(step, 5),
    };
    let one = run.to(Spread::Sequences(1), None, 3);
    for spread in [
        Spread::Sequences(2),
        Spread::Sequences(4),
        Spread::Layers(2),
    ] {
        same(&one, &run.to(spread, None, 3), &format!("{spread:?}"));
    }
    let batch = spread::config(&[("training.batch", "3")]);
    let run = Run {
        config: &batch,
        ..run
    };
    same(&one, &run.to(Spread::Sequences(1), None, 3), "side by side");
}

#[test]
fn a_new_model_begins_with_0_and_learns_them_without_decay() {
    let keys = [("data.train", "x"), ("model.shape.sink_logits", "true")];
    let more = [
        ("schedule.warmup_steps", "0"),
        ("schedule.lr", "1e-2"),
        ("optimizer.weight_decay", "0.5"),
        ("model.shape.hidden_size", "64"),
        ("model.shape.num_hidden_layers", "2"),
        ("training.train_only", "sink_logits"),
    ];
    let run = run_config(&keys, &more);
    let model = run.model.new_config(256).unwrap();
    assert_eq!(model.family.model_type, "llama_sink_logits");
    let json = model.to_json();
    assert!(json.get("sink_logits").is_none(), "{json}");
    assert_eq!(
        ModelConfig::from_json(json).unwrap().switches,
        model.switches
    );
    let mut before = Tensors::initial(&model, 3);
    for l in 0..2 {
        let logits = &mut before.values[sinks(&model, l)];
        assert_eq!(*logits, vec![0.0; 8]);
        logits.fill(0.5);
    }
    let mut trainer = Trainer::new(Cpu, model.clone(), run, &before, None).unwrap();
    trainer.step_on(&[vec![tokens(3, 40)]]).unwrap();
    let after = trainer.tensors().unwrap();
    for (i, (before, after)) in before.values.iter().zip(&after.values).enumerate() {
        let is_sink = (0..2).any(|l| i == sinks(&model, l));
        assert_eq!(after != before, is_sink, "tensor {i}");
        if is_sink {
            // One step of AdamW: the learning rate, whatever the gradient.
            let mut steps = after.iter().map(|x| (x - 0.5).abs());
            assert!(steps.all(|step| (step - 1e-2).abs() < 1e-4), "{after:?}");
        }
    }
}

/// Writes an untrained model with other logits.
fn written(config: &ModelConfig, folder: &std::path::Path) {
    let initial = initial(config, 5);
    let logits: Vec<usize> = (0..2).map(|l| sinks(config, l)).collect();
    let values = |i: usize| {
        let mut values = initial.tensor(i);
        if logits.contains(&i) {
            values.fill(1.0 / 3.0);
        }
        Ok::<_, WeightsError>(values)
    };
    save(folder, config, values, SaveOptions::new(WeightType::Bf16)).unwrap();
}

#[test]
fn files_hold_them_in_f32_and_are_refused_without_them() {
    let (config, root) = (config(true), tempfile::tempdir().unwrap());
    written(&config, root.path());
    let read = ModelConfig::load(root.path()).unwrap();
    assert_eq!(read.to_json()["model_type"], "llama_sink_logits");
    let checkpoint = Checkpoint::open(root.path()).unwrap();
    checkpoint.check(&read).unwrap();
    for l in 0..2 {
        let spec = &specs(&read)[sinks(&read, l)];
        assert_eq!(
            spec.parts[0].0,
            format!("model.layers.{l}.self_attn.sink_logits")
        );
        assert_eq!(checkpoint.read(spec).unwrap(), vec![1.0 / 3.0; 8]);
    }
    let formats: BTreeMap<_, _> = (checkpoint.tensors())
        .filter(|(name, _)| name.contains("self_attn"))
        .map(|(name, entry)| (name.to_owned(), entry.format.name()))
        .collect();
    assert_eq!(formats["model.layers.0.self_attn.sink_logits"], "F32");
    assert_eq!(formats["model.layers.0.self_attn.o_proj.weight"], "BF16");
    let names = parameters(&read).into_iter().map(|p| p.name);
    assert_eq!(
        names.filter(|name| name.ends_with("sink_logits")).count(),
        2
    );
    // A Llama without them refuses the file, and a model with them a file without.
    let plain = config_of(true, 8);
    let error = checkpoint.check(&plain).unwrap_err().to_string();
    assert!(error.contains("sink_logits"), "{error}");
    let other = tempfile::tempdir().unwrap();
    let values = initial(&plain, 5);
    let values = |i: usize| Ok::<_, WeightsError>(values.tensor(i));
    save(
        other.path(),
        &plain,
        values,
        SaveOptions::new(WeightType::F32),
    )
    .unwrap();
    let checkpoint = Checkpoint::open(other.path()).unwrap();
    let error = match checkpoint.load(Cpu, config, false).unwrap_err() {
        ModelError::Weights(error) => error.to_string(),
        other => panic!("{other}"),
    };
    assert!(
        error.contains("model.layers.0.self_attn.sink_logits"),
        "{error}"
    );
}

/// A key of the same name in a Llama's `config.json` is not passed over.
#[test]
fn a_key_beside_another_family_is_refused() {
    let mut json = config_of(true, 8).to_json();
    json["sink_logits"] = true.into();
    let error = ModelConfig::from_json(json.clone())
        .unwrap_err()
        .to_string();
    assert!(error.contains("sink_logits"), "{error}");
    json["sink_logits"] = false.into();
    ModelConfig::from_json(json).unwrap();
}
