//! Runs of synthetic tasks: what a perfect, a wrong and a real (random) model score.

use crate::common::{config, model, values};
use segattn::eval::{
    Answer, EvalError, Greedy, Oracle as EvalOracle, Report, Respond, RunConfig, Sample, TaskKind,
    TaskOptions, generate, run,
};
use segattn::model::session::{Feed, Session};

/// Answers with the first `share` of the references.
struct Oracle {
    share: usize,
    batches: Vec<usize>,
}

impl Respond for Oracle {
    fn encode(&self, text: &str) -> Result<Vec<u32>, EvalError> {
        Ok(text.bytes().map(u32::from).collect())
    }

    fn respond(&mut self, samples: &[Sample]) -> Result<Vec<Answer>, EvalError> {
        self.batches.push(samples.len());
        let answer = |s: &Sample| {
            let known = s.references.len().div_ceil(self.share);
            let text = format!(" {}.\n", s.references[..known].join(", ").to_uppercase());
            Answer::from(text)
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
        oracle: None,
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
        assert_eq!(p.total, TaskKind::ALL.len() * 2 * 5);
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
            TaskKind::CommonWords
            | TaskKind::NiahMultivalue
            | TaskKind::NiahMultiquery
            | TaskKind::Ordinal => 50.0,
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
        oracle: None,
    };
    let together = greedy.respond(&samples).unwrap();
    for (sample, got) in samples.iter().zip(&together) {
        assert_eq!(got.text.chars().count(), 16);
        let alone = greedy.respond(std::slice::from_ref(sample)).unwrap();
        assert_eq!(&alone[0], got);
    }
    // What the model says first is what it holds likeliest after the prompt.
    let first = u32::from(together[0].text.as_bytes()[0] - b'a');
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

#[test]
fn an_oracle_lets_a_prompts_suffix_read_what_the_whole_prompt_selects() {
    let mut config = config(true);
    let segment = config.segment.as_mut().unwrap();
    (segment.break_after_prompt, segment.past_len) = (true, 64);
    let encode = |text: &str| Ok(text.bytes().map(|b| u32::from(b % 11)).collect());
    let decode = |tokens: &[u32]| Ok(format!("{tokens:?}"));
    let options = TaskOptions::default();
    let sample = |i| generate(TaskKind::NiahSingle1, 600, i, 1, options, &encode).unwrap();
    // The second is like one of a task without statements that are asked for.
    let mut samples = [sample(0), sample(1)];
    samples[1].needles.clear();
    let answers = |suffix_len: usize, oracle| {
        let mut config = config.clone();
        config.segment.as_mut().unwrap().prompt_suffix_len = suffix_len;
        let model = model(&config, &values(&config, 4));
        let mut greedy = Greedy {
            model: &model,
            encode: &encode,
            decode: &decode,
            segments_per_step: 1,
            oracle,
        };
        let answers = greedy.respond(&samples).unwrap();
        answers.into_iter().map(|a| a.text).collect::<Vec<_>>()
    };
    // With the break at the prompt's end, it is what the model selects anyway.
    assert_eq!(answers(0, Some(EvalOracle::Prompt)), answers(0, None));
    let told = answers(40, Some(EvalOracle::Prompt));
    for (told, own) in told.iter().zip(answers(40, None)) {
        assert_ne!(*told, own);
    }
    // As a session whose selection is replaced by hand.
    config.segment.as_mut().unwrap().prompt_suffix_len = 40;
    let model = model(&config, &values(&config, 4));
    let tokens = &samples[0].tokens;
    let read = |session: &mut Session<'_, _>, tokens: &[u32]| {
        let feed = Feed {
            sequence: 0,
            tokens,
            targets: &[],
            breaks: &[tokens.len()],
            rereads: &[],
        };
        session.feed(&[feed]).unwrap();
        session.selected(0).unwrap()
    };
    let mut whole = Session::new(&model, 1, 1000, 1).unwrap();
    let at_end = read(&mut whole, tokens);
    let mut session = Session::new(&model, 1, 1000, 1).unwrap();
    let (before, suffix) = tokens.split_at(tokens.len() - 40);
    let mut heads = read(&mut session, before);
    for (head, at_end) in heads.iter_mut().zip(at_end) {
        let eligible = |t: &usize| {
            head.eligible.contains(&(t / 2 * 2)) && head.eligible.contains(&(t / 2 * 2 + 1))
        };
        head.tokens = at_end.tokens.into_iter().filter(eligible).collect();
    }
    session.replace_selected(0, &heads).unwrap();
    let feed = Feed {
        sequence: 0,
        tokens: suffix,
        targets: &[],
        breaks: &[],
        rereads: &[],
    };
    session.feed(&[feed]).unwrap();
    let logits = session.logits(0).unwrap();
    let first = (0..11).max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
    assert!(told[0].starts_with(&format!("[{}", first.unwrap())));
}

#[test]
fn an_oracle_gives_every_head_the_statements_asked_for() {
    let mut config = config(true);
    let segment = config.segment.as_mut().unwrap();
    (segment.break_after_prompt, segment.past_len) = (true, 64);
    let model = model(&config, &values(&config, 4));
    let encode = |text: &str| Ok(text.bytes().map(|b| u32::from(b % 11)).collect());
    let decode = |tokens: &[u32]| Ok(format!("{tokens:?}"));
    let options = TaskOptions::default();
    let sample = generate(TaskKind::NiahSingle1, 600, 0, 1, options, &encode).unwrap();
    let greedy = |oracle| Greedy {
        model: &model,
        encode: &encode,
        decode: &decode,
        segments_per_step: 1,
        oracle,
    };
    let samples = std::slice::from_ref(&sample);
    let own = greedy(None).respond(samples).unwrap().remove(0);
    let told = greedy(Some(EvalOracle::Alone))
        .respond(samples)
        .unwrap()
        .remove(0);
    // What is reported is what the model itself selects: of the four heads that read the past, not all of it.
    assert_eq!(own.recall, told.recall);
    assert_eq!(own.recall.len(), 4);
    assert!(own.recall.iter().any(|head| head.share < 1.0));
    assert_ne!(own.text, told.text);
    // The oracle's answer is that of a session whose selection is replaced by hand.
    let mut session = Session::new(&model, 1, 1000, 1).unwrap();
    let feed = |session: &mut Session<'_, _>, tokens: &[u32], breaks: &[usize]| {
        let feed = Feed {
            sequence: 0,
            tokens,
            targets: &[],
            breaks,
            rereads: &[],
        };
        session.feed(&[feed]).unwrap();
        let logits = session.logits(0).unwrap();
        (0..11u32)
            .max_by(|a, b| logits[*a as usize].total_cmp(&logits[*b as usize]))
            .unwrap()
    };
    let mut next = feed(&mut session, &sample.tokens, &[sample.tokens.len()]);
    let mut heads = session.selected(0).unwrap();
    let needle = &sample.needles[0];
    for head in &mut heads {
        let blocks = needle.start / 2 * 2..needle.end.div_ceil(2) * 2;
        head.tokens = blocks.filter(|t| head.eligible.contains(t)).collect();
    }
    session.replace_selected(0, &heads).unwrap();
    let answer: Vec<u32> = (0..128)
        .map(|_| {
            let token = next;
            next = feed(&mut session, &[token], &[]);
            token
        })
        .collect();
    assert_eq!(told.text, format!("{answer:?}"));
    // Tokens that cannot be selected are refused.
    heads[0].tokens = vec![session.position(0)];
    session.replace_selected(0, &heads).unwrap_err();
}
