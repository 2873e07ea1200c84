//! The training configuration: file, flags over it, and errors that name the key.

use segattn::model::config::RopeScaling;
use segattn::train::TrainError;
use segattn::train::config::{Config, EXAMPLE, TaskSection, flags};

fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
    let owned = |(k, v): &(&str, &str)| ((*k).to_owned(), (*v).to_owned());
    list.iter().map(owned).collect()
}

const SMALL: &str = "[data]\ntrain = [\"a.txt\"]\n";

fn refusal(text: &str, overrides: &[(&str, &str)]) -> (String, String, String) {
    match Config::parse(text, &pairs(overrides)).unwrap_err() {
        TrainError::Config { key, expected, got } => (key, expected, got),
        other => panic!("{other}"),
    }
}

#[test]
fn the_example_loads_and_differs_from_the_defaults_only_where_a_run_needs_it() {
    let example = Config::parse(EXAMPLE, &[]).unwrap();
    let mut default = Config::default();
    default.model.segment = example.model.segment.clone();
    default.data.train = example.data.train.clone();
    default.data.extensions = example.data.extensions.clone();
    assert_eq!(example, default);
    assert!(example.model.new_config(256).unwrap().segment.is_some());
}

#[test]
fn the_run_for_long_texts_is_one() {
    let data = pairs(&[("data.train", "text")]);
    let run = Config::parse(include_str!("../../configs/long.toml"), &data).unwrap();
    assert_eq!(run.training.sequence_len, 32_768);
    let tasks = run.data.mixture[1].tasks.as_ref().unwrap();
    assert_eq!((tasks.questions, tasks.lookalikes), (32, 2.0));
}

#[test]
fn every_key_is_a_flag_with_an_explanation_from_the_example() {
    let flags = flags();
    assert!(flags.len() > 60, "{}", flags.len());
    for flag in &flags {
        assert!(!flag.help.is_empty(), "{} is not explained", flag.key);
    }
    let keys: Vec<&str> = flags.iter().map(|f| f.key.as_str()).collect();
    for key in [
        "model.folder",
        "model.segment.past_len",
        "guard.z_score",
        "log.plot",
    ] {
        assert!(keys.contains(&key), "{key}");
    }
}

#[test]
fn every_flag_accepts_its_own_default() {
    let plain = Config::parse(SMALL, &[]).unwrap();
    for flag in flags() {
        if flag.key == "data.train" {
            continue;
        }
        let same = Config::parse(SMALL, &pairs(&[(&flag.key, &flag.default)])).unwrap();
        assert_eq!(same, plain, "{}", flag.key);
    }
}

#[test]
fn flags_win_over_the_file_and_may_be_written_with_dashes() {
    let text = "[data]\ntrain = [\"a.txt\"]\n[training]\nsteps = 7\n[guard]\nz_score = 3.0\n";
    let overrides = [
        ("training.steps", "9"),
        ("schedule.warmup-steps", "2"),
        ("guard.z_score", "none"),
        ("data.train", "b.txt, c.txt"),
        ("data.extensions", "[\"rs\"]"),
        ("model.folder", "here/models"),
        ("training.output", "2024"),
        ("optimizer.betas", "[0.8, 0.9]"),
        ("schedule.kind", "wsd"),
        ("model.segment.segment_len", "64"),
    ];
    let config = Config::parse(text, &pairs(&overrides)).unwrap();
    assert_eq!(config.training.steps, 9);
    assert_eq!(config.schedule.warmup_steps, Some(2));
    assert_eq!(config.guard.z_score, None);
    assert_eq!(
        config.data.train,
        ["b.txt", "c.txt"].map(std::path::PathBuf::from)
    );
    assert_eq!(config.data.extensions, ["rs"]);
    assert_eq!(config.model.folder, Some("here/models".into()));
    assert_eq!(config.training.output, std::path::PathBuf::from("2024"));
    assert_eq!(config.optimizer.betas, [0.8, 0.9]);
    assert_eq!(config.model.segment.segment_len, Some(64));
}

#[test]
fn a_written_configuration_reads_back_the_same() {
    let config = Config::parse(EXAMPLE, &pairs(&[("guard.z_score", "5.5")])).unwrap();
    assert_eq!(
        Config::parse(&config.to_toml().unwrap(), &[]).unwrap(),
        config
    );
}

#[test]
fn errors_name_the_key_what_it_expects_and_what_it_got() {
    let (key, expected, got) = refusal(SMALL, &[("training.steps", "many")]);
    assert_eq!((key.as_str(), expected.as_str()), ("training.steps", "u64"));
    assert!(got.contains("many"), "{got}");

    let (key, expected, got) = refusal(SMALL, &[("training.stepz", "3")]);
    assert_eq!(key, "training.stepz");
    assert_eq!(got, "`stepz`; did you mean `steps`?");
    assert!(expected.contains("steps"), "{expected}");

    let (key, expected, got) = refusal("[data]\ntrain = [\"a\"]\n[optimizer]\nlr = 1.0\n", &[]);
    assert!(key.starts_with("optimizer"), "{key}");
    assert!(
        expected.contains("betas") && got.contains("lr"),
        "{expected} {got}"
    );

    let (key, _, got) = refusal("[trainign]\nsteps = 3\n", &[]);
    assert_eq!(key, "trainign");
    assert_eq!(got, "unknown field `trainign`; did you mean `training`?");

    let error = Config::parse("[data]\ntrain = [\"a\"]\n[training\n", &[]).unwrap_err();
    let text = error.to_string();
    assert!(
        text.starts_with("the configuration, line 3: expected TOML, got"),
        "{text}"
    );

    for (text, overrides, key) in [
        ("", &[][..], "data.train"),
        ("data = 3", &[], "data"),
        (
            SMALL,
            &[("data.validation_share", "1.0")],
            "data.validation_share",
        ),
        (
            SMALL,
            &[("optimizer.betas", "[0.9, 1.0]")],
            "optimizer.betas",
        ),
        (SMALL, &[("optimizer.eps", "0.0")], "optimizer.eps"),
        (SMALL, &[("optimizer.eps", "1e-60")], "optimizer.eps"),
        (
            SMALL,
            &[("optimizer.weight_decay", "-0.1")],
            "optimizer.weight_decay",
        ),
        (
            SMALL,
            &[("optimizer.clip_norm", "0.0")],
            "optimizer.clip_norm",
        ),
        (
            SMALL,
            &[("schedule.warmup_steps", "5000")],
            "schedule.warmup_steps",
        ),
        (SMALL, &[("checkpoint.keep", "1")], "checkpoint.keep"),
        (SMALL, &[("training.batch", "0")], "training.batch"),
        (SMALL, &[("training.batch", "-1")], "training.batch"),
        (
            SMALL,
            &[("model.shape.num_key_value_heads", "3")],
            "model.shape.num_key_value_heads",
        ),
        (
            SMALL,
            &[("model.segment.past_len", "8")],
            "model.segment.segment_len",
        ),
        (
            SMALL,
            &[("model.segment.segment_len", "9")],
            "model.segment.segment_len",
        ),
        (
            SMALL,
            &[
                ("model.segment.segment_len", "16"),
                ("model.segment.long_range_heads", "[4]"),
            ],
            "model.segment.long_range_heads",
        ),
        (SMALL, &[("model", "3")], "model"),
        (
            SMALL,
            &[("training.steps.more", "3")],
            "training.steps.more",
        ),
    ] {
        assert_eq!(refusal(text, overrides).0, key, "{text} {overrides:?}");
    }
}

#[test]
fn a_run_goes_on_with_its_model_and_adapters_alone() {
    let with = |keys: &[(&str, &str)]| Config::parse(SMALL, &pairs(keys)).unwrap();
    let refused = |now: &Config, before: &Config| match now.check_resumed(before) {
        Ok(()) => None,
        Err(TrainError::Config { key, .. }) => Some(key),
        Err(other) => panic!("{other}"),
    };
    let whole = with(&[("model.folder", "a")]);
    let steps = with(&[("model.folder", "a"), ("training.steps", "7")]);
    assert_eq!(refused(&steps, &whole), None);
    assert_eq!(
        refused(&with(&[("model.folder", "b")]), &whole).as_deref(),
        Some("model")
    );
    let adapters = with(&[("model.folder", "a"), ("lora.r", "4")]);
    assert_eq!(refused(&adapters, &whole).as_deref(), Some("lora"));
    // The weights under adapters may have been moved.
    let moved = [("model.folder", "b"), ("lora.r", "4")];
    assert_eq!(refused(&with(&moved), &adapters), None);
    let shorter = [&moved[..], &[("model.segment.segment_len", "64")]].concat();
    assert_eq!(
        refused(&with(&shorter), &adapters).as_deref(),
        Some("model")
    );
}

#[test]
fn long_range_heads_read_the_past_in_their_layers_and_nothing_in_the_others() {
    let overrides = [
        ("model.segment.segment_len", "64"),
        ("model.segment.past_len", "16"),
        ("model.segment.long_range_heads", "[1, 3]"),
        ("model.segment.long_range_layers", "[2]"),
    ];
    let config = Config::parse(SMALL, &pairs(&overrides)).unwrap();
    let model = config.model.new_config(256).unwrap();
    for layer in 0..4 {
        for head in 0..4 {
            let long_range = head % 2 == 1;
            assert_eq!(model.reads_prior(layer, head), !long_range);
            assert_eq!(model.reads_past(layer, head), long_range && layer == 2);
        }
    }
}

#[test]
fn past_heads_read_the_past_beside_the_prior_tail() {
    let read = |heads: &str| {
        let heads = format!("{:?}", heads.split(',').collect::<Vec<_>>());
        let overrides = [
            ("model.segment.segment_len", "64"),
            ("model.segment.past_len", "16"),
            ("model.segment.past_heads", &heads),
        ];
        let config = Config::parse(SMALL, &pairs(&overrides))?;
        let model = config.model.new_config(256)?;
        let mut past = String::new();
        for (layer, head) in (0..4).flat_map(|layer| (0..4).map(move |head| (layer, head))) {
            assert!(model.reads_prior(layer, head));
            past.push(if model.reads_past(layer, head) {
                '1'
            } else {
                '0'
            });
        }
        Ok::<_, TrainError>(past)
    };
    assert_eq!(read("0.1,2.*,3.0").unwrap(), "0100000011111000");
    assert_eq!(read("all").unwrap(), "1".repeat(16));
    for wrong in ["4.0", "0.4", "1", "1.0,1.*", "all,0.0", "x.0"] {
        let error = read(wrong).unwrap_err().to_string();
        assert!(
            error.contains("model.segment.past_heads"),
            "{wrong}: {error}"
        );
    }
    let both = [
        ("model.segment.past_heads", "[\"all\"]"),
        ("model.segment.long_range_heads", "[1]"),
    ];
    assert!(Config::parse(SMALL, &pairs(&both)).is_err());
}

#[test]
fn segments_given_here_replace_those_of_a_folder_key_by_key_and_zero_removes_them() {
    let of_folder = Config::parse(EXAMPLE, &[])
        .unwrap()
        .model
        .new_config(256)
        .unwrap();
    let lay = |overrides: &[(&str, &str)]| {
        let mut model = of_folder.clone();
        let config = Config::parse(SMALL, &pairs(overrides)).unwrap_or_else(|e| panic!("{e}"));
        config.model.apply(&mut model).unwrap();
        model.segment
    };
    let kept = of_folder.segment.clone().unwrap();
    assert_eq!(lay(&[]), Some(kept.clone()));
    assert_eq!(lay(&[("model.segment.segment_len", "0")]), None);
    let longer = lay(&[("model.segment.segment_len", "512")]).unwrap();
    assert_eq!(
        (longer.segment_len, longer.prior_len),
        (512, kept.prior_len)
    );
    assert_eq!(longer.head_reads, kept.head_reads);
    let broken = lay(&[
        ("model.segment.segment_len", "512"),
        ("model.segment.break_ids", "[10, 3]"),
        ("model.segment.break_after_prompt", "true"),
    ]);
    let broken = broken.unwrap();
    assert_eq!(broken.break_ids, [10, 3]);
    assert!(broken.break_after_prompt);
}

#[test]
fn scaled_positions_take_the_place_of_the_folders() {
    let scaling = r#"{ rope_type = "linear", factor = 4.0, rope_theta = 2e4 }"#;
    let config = Config::parse(SMALL, &pairs(&[("model.rope_scaling", scaling)])).unwrap();
    let again = Config::parse(&config.to_toml().unwrap(), &[]).unwrap();
    assert_eq!(again, config);
    let mut model = Config::parse(EXAMPLE, &[])
        .unwrap()
        .model
        .new_config(256)
        .unwrap();
    config.model.apply(&mut model).unwrap();
    let linear = RopeScaling::Linear { factor: 4.0 };
    assert_eq!((model.rope_theta, &model.rope_scaling), (2e4, &linear));
    Config::parse(SMALL, &[])
        .unwrap()
        .model
        .apply(&mut model)
        .unwrap();
    assert_eq!(model.rope_scaling, linear);
    let (key, ..) = refusal(
        SMALL,
        &[(
            "model.rope_scaling",
            r#"{ rope_type = "linear", factor = 0.5 }"#,
        )],
    );
    assert_eq!(key, "model.rope_scaling.factor");
}

/// The mixture of the example, which is commented out there.
fn mixture_of_the_example() -> String {
    let lines = EXAMPLE.lines().map(|line| line.trim_start_matches("# "));
    let from = lines.skip_while(|line| *line != "[[data.mixture]]");
    let part = from.take_while(|line| *line != "[training]");
    part.collect::<Vec<_>>().join("\n")
}

#[test]
fn a_mixture_is_tables_in_a_file_or_a_list_in_a_flag() {
    let file = format!("{SMALL}{}", mixture_of_the_example());
    let config = Config::parse(&file, &[]).unwrap();
    let [plain, asked, relay] = &config.data.mixture[..] else {
        panic!("{:?}", config.data.mixture);
    };
    assert_eq!((plain.name.as_str(), plain.weight), ("text", 1.0));
    assert!(plain.tasks.is_none() && plain.paths.len() == 1 && asked.paths.is_empty());
    assert_eq!(asked.tasks, Some(TaskSection::default()));
    assert_eq!(relay.relay.as_ref().unwrap().distances, [1, 2, 3]);
    let written = config.to_toml().unwrap();
    assert_eq!(Config::parse(&written, &[]).unwrap(), config);

    let list =
        r#"[{name = "a", paths = ["x"], weight = 2}, {name = "b", tasks = {questions = 3}}]"#;
    let config = Config::parse(SMALL, &pairs(&[("data.mixture", list)])).unwrap();
    let [_, b] = &config.data.mixture[..] else {
        panic!("{:?}", config.data.mixture);
    };
    let tasks = b.tasks.as_ref().unwrap();
    assert_eq!(
        (b.weight, tasks.questions, tasks.answer_weight),
        (1.0, 3, 16.0)
    );
    for (list, key, part) in [
        (
            r#"[{name = "a", weight = 0}]"#,
            "data.mixture.a.weight",
            "> 0",
        ),
        (
            r#"[{name = "a"}, {name = "a"}]"#,
            "data.mixture.name",
            "no other",
        ),
        (r#"[{name = ""}]"#, "data.mixture.name", "no other"),
        (
            r#"[{name = "a", tasks = {records = 0, entries = 0, chains = 0, lists = 0}}]"#,
            "data.mixture.a.tasks",
            "above",
        ),
        (
            r#"[{name = "a", tasks = {lists = -1}}]"#,
            "data.mixture.a.tasks",
            "at least 0",
        ),
        (
            r#"[{name = "a", tasks = {questions = 0}}]"#,
            "data.mixture.a.tasks.questions",
            "at least 1",
        ),
        (
            r#"[{name = "a", tasks = {min_distance = 0}}]"#,
            "data.mixture.a.tasks.min_distance",
            "at least 1",
        ),
        (
            r#"[{name = "a", tasks = {answer_weight = -1}}]"#,
            "data.mixture.a.tasks.answer_weight",
            ">= 0",
        ),
        (
            r#"[{name = "a", tasks = {list = 1}}]"#,
            "data.mixture[0].tasks.list",
            "lists",
        ),
        (
            r#"[{name = "a", relay = {segment_len = 32, distances = []}}]"#,
            "data.mixture.a.relay.distances",
            "at least 1",
        ),
        (
            r#"[{name = "a", relay = {segment_len = 32, distances = [1, 0]}}]"#,
            "data.mixture.a.relay.distances",
            "at least 1",
        ),
        (
            r#"[{name = "a", relay = {segment_len = 2048, distances = [1, 2]}}]"#,
            "data.mixture.a.relay",
            "training.sequence_len",
        ),
        (
            r#"[{name = "a", relay = {segment_len = 32, distances = [1]}, paths = ["x"]}]"#,
            "data.mixture.a.relay",
            "no `paths`",
        ),
        (
            r#"[{name = "a", relay = {segment_len = 32}}]"#,
            "data.mixture[0].relay",
            "",
        ),
        (r#"[{weight = 1}]"#, "data.mixture[0]", ""),
    ] {
        let (got, expected, _) = refusal(SMALL, &[("data.mixture", list)]);
        assert_eq!(got, key, "{list}");
        assert!(expected.contains(part), "{list}: {expected}");
    }
}
