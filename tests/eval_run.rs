//! Runs of synthetic tasks: what a perfect, a wrong and a real (random) model score.

#[allow(dead_code, reason = "each test uses a part")]
mod common;

use common::{config, model, values};
use segattn::eval::{
    EvalError, Greedy, Report, Respond, RunConfig, Sample, TaskKind, TaskOptions, generate, run,
};

/// Answers with the first `share` of the references.
struct Oracle {
    share: usize,
    batches: Vec<usize>,
}

impl Respond for Oracle {
    fn encode(&self, text: &str) -> Result<Vec<u32>, EvalError> {
        Ok(text.bytes().map(u32::from).collect())
    }

    fn respond(&mut self, samples: &[Sample]) -> Result<Vec<String>, EvalError> {
        self.batches.push(samples.len());
        let answer = |s: &Sample| {
            let known = s.references.len().div_ceil(self.share);
            format!(" {}.\n", s.references[..known].join(", ").to_uppercase())
        };
        Ok(samples.iter().map(answer).collect())
    }
}

fn settings(tasks: &[TaskKind], lengths: &[usize]) -> RunConfig {
    RunConfig {
        tasks: tasks.to_vec(),
        lengths: lengths.to_vec(),
        samples: 5,
        seed: 3,
        batch: 2,
        depth: None,
    }
}

#[test]
fn a_perfect_model_scores_a_hundred_and_half_an_answer_its_share() {
    let config = settings(&TaskKind::ALL, &[7_000, 9_000]);
    let mut oracle = Oracle {
        share: 1,
        batches: Vec::new(),
    };
    let mut seen = Vec::new();
    let report = run(&config, &mut oracle, |p| {
        assert_eq!(p.total, 12 * 2 * 5);
        seen.push(p.done);
    })
    .unwrap();
    assert!(report.cells.iter().all(|c| c.score == Some(100.0)));
    assert_eq!(oracle.batches[..3], [2, 2, 1]);
    assert_eq!(seen[..4], [0, 2, 4, 5]);
    oracle.share = 2;
    let half = run(&config, &mut oracle, |_| ()).unwrap();
    for cell in half.cells {
        let expected = match cell.task {
            TaskKind::CommonWords | TaskKind::NiahMultivalue | TaskKind::NiahMultiquery => 50.0,
            TaskKind::VariableTracking => 60.0,
            TaskKind::FrequentWords => 100.0 * 2.0 / 3.0,
            _ => 100.0,
        };
        assert!(
            (cell.score.unwrap() - expected).abs() < 1e-9,
            "{}",
            cell.task
        );
        let (low, high) = cell.interval.unwrap();
        assert!(low <= expected && expected <= high + 1e-9 && high - low > 1.0);
    }
    // The report survives its file.
    let text = serde_json::to_string(&report).unwrap();
    assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
}

#[test]
fn the_table_has_a_row_for_each_task_and_a_dash_where_nothing_fits() {
    let config = settings(&[TaskKind::Passkey, TaskKind::CommonWords], &[1_000, 8_000]);
    let mut oracle = Oracle {
        share: 2,
        batches: Vec::new(),
    };
    let report = run(&config, &mut oracle, |_| ()).unwrap();
    let rows: Vec<Vec<String>> = report
        .table()
        .lines()
        .map(|l| l.split_whitespace().map(str::to_owned).collect())
        .collect();
    assert_eq!(rows[0], ["task", "1000", "8000"]);
    assert_eq!(rows[1], ["passkey", "100.0", "100.0"]);
    assert_eq!(rows[2], ["cwe", "-", "50.0"]);
    assert_eq!(rows[3], ["mean", "100.0", "75.0"]);
    let skipped = report.cells[2].skipped.as_deref().unwrap();
    assert!(
        skipped.contains("cwe") && skipped.contains("880"),
        "{skipped}"
    );
}

#[test]
fn settings_that_ask_for_nothing_are_refused() {
    let good = settings(&[TaskKind::Passkey], &[1_000]);
    let refused = |config: RunConfig| {
        let mut oracle = Oracle {
            share: 1,
            batches: Vec::new(),
        };
        match run(&config, &mut oracle, |_| ()) {
            Err(EvalError::Argument { name, .. }) => name,
            other => panic!("{other:?}"),
        }
    };
    let with = |change: fn(&mut RunConfig)| {
        let mut config = good.clone();
        change(&mut config);
        config
    };
    assert_eq!(refused(with(|c| c.tasks.clear())), "tasks");
    assert_eq!(refused(with(|c| c.lengths.clear())), "lengths");
    assert_eq!(refused(with(|c| c.samples = 0)), "samples");
    assert_eq!(refused(with(|c| c.batch = 0)), "batch");
    assert_eq!(refused(with(|c| c.depth = Some(2.0))), "depth");
}

#[test]
fn a_model_answers_each_sample_as_it_does_alone() {
    let config = config(true);
    let model = model(&config, &values(&config, 4));
    // A model of 11 tokens: a byte stands for its remainder, a token for a letter.
    let encode = |text: &str| Ok(text.bytes().map(|b| u32::from(b % 11)).collect());
    let decode = |tokens: &[u32]| {
        let letter = |t: &u32| char::from(b'a' + *t as u8);
        Ok(tokens.iter().map(letter).collect::<String>())
    };
    let samples: Vec<Sample> = (0..3)
        .map(|i| {
            let length = 400 + 30 * i;
            let options = TaskOptions::default();
            generate(TaskKind::Passkey, length, i, 1, options, &encode).unwrap()
        })
        .collect();
    let mut greedy = Greedy {
        model: &model,
        encode: &encode,
        decode: &decode,
        segments_per_step: 3,
    };
    let together = greedy.respond(&samples).unwrap();
    for (sample, got) in samples.iter().zip(&together) {
        assert_eq!(got.chars().count(), 16);
        let alone = greedy.respond(std::slice::from_ref(sample)).unwrap();
        assert_eq!(&alone[0], got);
    }
    // What the model says first is what it holds likeliest after the prompt.
    let first = u32::from(together[0].as_bytes()[0] - b'a');
    let likelihood = |token| {
        let mut whole = samples[0].tokens.clone();
        whole.push(token);
        *segattn::model::session::score(&model, &whole, 1)
            .unwrap()
            .last()
            .unwrap()
    };
    assert!((0..11).all(|t| likelihood(t) <= likelihood(first)));
}
