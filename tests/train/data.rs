//! Training data: documents of every format, sequences that never cross them, orders, splits, bad files.

use std::path::Path;

use crate::reading::{documents, ids, read_with};
use proptest::prelude::*;
use segattn::train::TrainError;
use segattn::train::config::{BinType, DataSection, Split};
use segattn::train::data::{Corpus, Example, Permutation, Position, Sequences, fingerprint, split};

#[test]
fn every_format_gives_its_documents_in_order_of_names() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::create_dir(at("b")).unwrap();
    std::fs::write(at("b/two.txt"), "zwei ü").unwrap();
    std::fs::write(at("a.txt"), "one").unwrap();
    std::fs::write(at("skipped.log"), "no").unwrap();
    std::fs::write(
        at("c.jsonl"),
        "{\"text\": \"three\"}\n\n{\"text\": [1, 2, 3], \"x\": 0}\n",
    )
    .unwrap();
    let corpus = read_with(&[folder.path().into()], &DataSection::default()).unwrap();
    let expected = vec![ids("one"), ids("zwei ü"), ids("three"), vec![1, 2, 3]];
    assert_eq!(documents(&corpus), expected);

    std::fs::write(at("flat.json"), "[5, 6, 7]").unwrap();
    std::fs::write(at("nested.json"), "[[5, 6], [], [8]]").unwrap();
    let words: Vec<u8> = [9u16, 299, 2, 11, 12]
        .iter()
        .flat_map(|x| x.to_le_bytes())
        .collect();
    std::fs::write(at("x.bin"), words).unwrap();
    let section = DataSection {
        document_end: Some(2),
        ..DataSection::default()
    };
    let files = ["flat.json", "nested.json", "x.bin"].map(at);
    let corpus = read_with(&files, &section).unwrap();
    let got: Vec<_> = documents(&corpus)
        .into_iter()
        .filter(|d| !d.is_empty())
        .collect();
    assert_eq!(
        got,
        [
            vec![5, 6, 7],
            vec![5, 6],
            vec![8],
            vec![9, 299, 2],
            vec![11, 12]
        ]
    );

    let wide: Vec<u8> = [7u32, 8].iter().flat_map(|x| x.to_le_bytes()).collect();
    std::fs::write(at("x.bin"), wide).unwrap();
    let section = DataSection {
        bin_type: BinType::U32,
        ..DataSection::default()
    };
    let files = ["x.bin", "a.txt"].map(at);
    let corpus = read_with(&files, &section).unwrap();
    assert_eq!(documents(&corpus), [vec![7, 8], ids("one")]);
}

#[test]
fn a_text_longer_than_a_piece_is_one_document_with_every_character() {
    let folder = tempfile::tempdir().unwrap();
    for text in ["ä€x".repeat(400_000), "a line\n".repeat(300_000)] {
        let path = folder.path().join("long.txt");
        std::fs::write(&path, &text).unwrap();
        let corpus = read_with(&[path], &DataSection::default()).unwrap();
        assert_eq!(documents(&corpus), [ids(&text)]);
    }
}

#[test]
fn files_that_do_not_fit_are_named_with_what_was_expected() {
    let folder = tempfile::tempdir().unwrap();
    for (name, content, part) in [
        ("a.txt", &b"good \xff bad"[..], "UTF-8"),
        ("a.txt", b"cut \xe2\x82", "UTF-8"),
        ("a.bin", b"odd", "2 bytes"),
        ("a.bin", b"\xff\xff", "vocab_size = 300"),
        ("a.jsonl", b"{\"text\": \"x\"}\n{\"text\": 3}\n", "line 2"),
        ("a.jsonl", b"{\"txt\": \"x\"}\n", "`text`"),
        ("a.jsonl", b"{", "line 1"),
        ("a.json", b"[1, [2, [3]]]", "beside each other"),
        ("a.json", b"[[2], 1]", "beside each other"),
        ("a.json", b"[1, []]", "beside each other"),
        ("a.json", b"[[2, [3]]]", "deeper"),
        ("a.json", b"[1, null]", "token ids"),
        ("a.json", b"[1, 2.0]", "token ids"),
        ("a.jsonl", b"{\"text\": null}\n", "null"),
        ("a.jsonl", b"{\"text\": [[1], 2]}\n", "line 1"),
        ("a.json", b"{\"a\": 1}", "token ids"),
        ("a.json", b"[1, -2]", "token ids"),
        ("a.json", b"[1, 4294967296]", "32 bits"),
        ("a.json", b"[1", "token ids"),
        ("a.json", b"[300]", "vocab_size"),
        (
            "a.jsonl",
            b"{\"tokens\": [1, 2]}\n{\"tokens\": [1, 2], \"weights\": [1]}\n",
            "line 2: expected `weights`, 2 finite numbers of at least 0, one for each token, got 1",
        ),
        (
            "a.jsonl",
            b"{\"tokens\": [1], \"weights\": [-1]}",
            "at least 0",
        ),
        (
            "a.jsonl",
            b"{\"tokens\": [1], \"weights\": [1e39]}",
            "finite",
        ),
        (
            "a.jsonl",
            b"{\"tokens\": [1], \"weights\": \"1\"}",
            "line 1",
        ),
        (
            "a.jsonl",
            b"{\"text\": \"ab\", \"weights\": [1]}",
            "list of ids",
        ),
        (
            "a.jsonl",
            b"{\"tokens\": [300], \"weights\": [1]}",
            "vocab_size",
        ),
    ] {
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        let error = read_with(&[path], &DataSection::default()).unwrap_err();
        assert!(matches!(error, TrainError::Data { .. }), "{error}");
        assert!(error.to_string().contains(part), "{error}");
    }
    let missing = [folder.path().join("none.txt")];
    let error = read_with(&missing, &DataSection::default()).unwrap_err();
    assert!(matches!(error, TrainError::Io { .. }), "{error}");
}

fn corpus_of(lens: &[usize], folder: &Path) -> Corpus {
    let mut next = 0;
    let mut document = |len: usize| -> Vec<u32> {
        (0..len)
            .map(|_| {
                next = (next * 7 + 11) % 293;
                next
            })
            .collect()
    };
    let all: Vec<Vec<u32>> = lens.iter().map(|l| document(*l)).collect();
    let path = folder.join("documents.json");
    std::fs::write(&path, serde_json::to_string(&all).unwrap()).unwrap();
    read_with(&[path], &DataSection::default()).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn sequences_predict_every_token_but_a_documents_first_once_and_never_cross(
        lens in prop::collection::vec(0usize..40, 1..8),
        sequence_len in 0usize..12,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let corpus = corpus_of(&lens, folder.path());
        let sequences = Sequences::new(corpus.documents().to_vec(), sequence_len);
        let mut rebuilt = Vec::new();
        let mut i = 0;
        for document in documents(&corpus).into_iter().filter(|d| d.len() > 1) {
            let mut whole = vec![document[0]];
            while whole.len() < document.len() {
                let s = sequences.get(&corpus, i).unwrap().tokens;
                prop_assert!(s.len() >= 2 && (sequence_len == 0 || s.len() <= sequence_len + 1));
                prop_assert_eq!(s[0], whole[whole.len() - 1]);
                whole.extend(&s[1..]);
                i += 1;
            }
            prop_assert_eq!(&whole, &document);
            rebuilt.push(whole);
        }
        prop_assert_eq!(sequences.len(), i);
        prop_assert_eq!(sequences.tokens(), rebuilt.iter().map(|d| d.len() as u64 - 1).sum::<u64>());
        prop_assert!(sequences.get(&corpus, i).is_err());
    }

    #[test]
    fn an_order_is_a_permutation_and_differs_by_seed_and_epoch(len in 1u64..3000, seed: u64, epoch in 0u64..9) {
        let order = |seed, epoch| -> Vec<u64> {
            let p = Permutation::new(len, seed, epoch);
            (0..len).map(|i| p.at(i).unwrap()).collect()
        };
        let mut sorted = order(seed, epoch);
        if len > 100 {
            prop_assert_ne!(&sorted, &order(seed, epoch + 1));
            prop_assert_ne!(&sorted, &order(seed ^ 1, epoch));
        }
        sorted.sort_unstable();
        prop_assert!(sorted.into_iter().eq(0..len));
    }
}

#[test]
fn every_place_of_an_order_is_equally_likely() {
    let mut counts = [[0u32; 10]; 10];
    for seed in 0..10_000 {
        let order = Permutation::new(10, seed, 3);
        for (i, row) in counts.iter_mut().enumerate() {
            row[order.at(i as u64).unwrap() as usize] += 1;
        }
    }
    // 1000 expected, standard deviation 30.
    assert!(
        counts.iter().flatten().all(|c| (850..1150).contains(c)),
        "{counts:?}"
    );
}

#[test]
fn batches_go_on_from_a_saved_position_and_an_epoch_takes_each_sequence_once() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = corpus_of(&[9, 30, 2, 17, 1, 5], folder.path());
    let sequences = Sequences::new(corpus.documents().to_vec(), 4);
    let take = |position: &mut Position, n| -> Vec<Vec<u32>> {
        let batch = sequences.next_batch(&corpus, 5, position, n).unwrap();
        batch.into_iter().map(|example| example.tokens).collect()
    };
    let mut position = Position::default();
    let mut epoch = take(&mut position, sequences.len() as usize);
    assert_eq!((position.epoch, position.index), (1, 0));
    let mut all: Vec<_> = (0..sequences.len())
        .map(|i| sequences.get(&corpus, i).unwrap().tokens)
        .collect();
    assert_ne!(epoch, all);
    epoch.sort();
    all.sort();
    assert_eq!(epoch, all);

    let mut position = Position::default();
    take(&mut position, 5);
    let saved = serde_json::to_string(&position).unwrap();
    let next = [take(&mut position, 7), take(&mut position, 9)].concat();
    let mut restored = serde_json::from_str(&saved).unwrap();
    assert_eq!(next, take(&mut restored, 16));
    assert_eq!(position, restored);

    // A place that another cut has had is none of this one's: an error, and no search for it.
    let mut beyond = Position {
        epoch: 0,
        index: sequences.len(),
        ..Position::default()
    };
    assert!(sequences.next_batch(&corpus, 5, &mut beyond, 1).is_err());
    assert_eq!(Permutation::new(5, 1, 0).at(5), None);
    assert!(sequences.same_cut(4) && !sequences.same_cut(5));
}

/// Breaks and rereads beside ids in JSON, in JSONL and beside a `.bin` file go with their tokens into every sequence.
#[test]
fn breaks_and_rereads_beside_tokens_reach_the_sequences_of_their_documents() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let bin: Vec<u8> = (10u16..18).flat_map(u16::to_le_bytes).collect();
    let positions = |positions: &[u64]| -> Vec<u8> {
        let bytes = positions.iter().map(|p| p.to_le_bytes());
        bytes.flatten().collect()
    };
    let breaks = positions(&[0, 2, 5, 8]);
    std::fs::write(at("a.bin.rereads"), positions(&[3, 5, 5, 7])).unwrap();
    std::fs::write(at("a.bin"), bin).unwrap();
    std::fs::write(at("a.bin.breaks"), breaks).unwrap();
    std::fs::write(
        at("b.json"),
        r#"{"breaks": [0, 3, 4], "tokens": [1, 2, 3, 4], "rereads": [2, 3, 3, 3, 3, 3, 3, 3]}"#,
    )
    .unwrap();
    let nested = r#"[[1, 2], {"tokens": [3, 4, 5], "breaks": [2]}, {"tokens": [6]}]"#;
    std::fs::write(at("c.json"), nested).unwrap();
    std::fs::write(
        at("d.jsonl"),
        "{\"text\": [7, 8, 9], \"breaks\": [1, 2], \"rereads\": [3]}\n",
    )
    .unwrap();
    let section = DataSection {
        document_end: Some(13),
        extensions: ["bin", "json", "jsonl"].map(str::to_owned).to_vec(),
        ..DataSection::default()
    };
    let corpus = read_with(&[folder.path().into()], &section).unwrap();
    let whole = |d| {
        let tokens = corpus.tokens(d, 0..d.len).unwrap();
        (tokens.ids, tokens.breaks, tokens.rereads)
    };
    let all: Vec<_> = corpus.documents().iter().map(whole).collect();
    assert_eq!(
        all,
        [
            (vec![10, 11, 12, 13], vec![2], vec![3]),
            (vec![14, 15, 16, 17], vec![1, 4], vec![1, 1, 3]),
            (vec![1, 2, 3, 4], vec![3, 4], vec![2, 3, 3, 3, 3, 3, 3, 3]),
            (vec![1, 2], vec![], vec![]),
            (vec![3, 4, 5], vec![2], vec![]),
            (vec![6], vec![], vec![]),
            (vec![7, 8, 9], vec![1, 2], vec![3]),
        ]
    );
    let sequences = Sequences::new(corpus.documents()[2..3].to_vec(), 2);
    let cut: Vec<_> = (0..2).map(|i| sequences.get(&corpus, i).unwrap()).collect();
    assert_eq!(cut[0].tokens, [1, 2, 3]);
    assert_eq!(cut[0].breaks, [3]);
    assert_eq!(cut[0].rereads, [2, 3, 3, 3, 3, 3, 3, 3]);
    assert_eq!(cut[1].tokens, [3, 4]);
    assert_eq!(cut[1].breaks, [1, 2]);
    assert_eq!(cut[1].rereads, [1; 7]);
    // Other breaks or rereads are other data.
    let mut before = vec![fingerprint(corpus.documents())];
    for (name, changed) in [("a.bin.breaks", &[3][..]), ("a.bin.rereads", &[3, 5, 7])] {
        std::fs::write(at(name), positions(changed)).unwrap();
        let corpus = read_with(&[folder.path().into()], &section).unwrap();
        let now = fingerprint(corpus.documents());
        assert!(!before.contains(&now), "{name}");
        before.push(now);
    }
}

#[test]
fn breaks_that_do_not_fit_are_named_with_what_was_expected() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let positions = |all: &[u64]| {
        all.iter()
            .flat_map(|b| b.to_le_bytes())
            .collect::<Vec<u8>>()
    };
    std::fs::write(at("a.bin"), [1, 0, 2, 0, 3, 0]).unwrap();
    for (name, content, part) in [
        ("a.bin.breaks", positions(&[4]), "up to the 3 tokens"),
        ("a.bin.breaks", positions(&[2, 2]), "2 before 2"),
        ("a.bin.breaks", b"abc".to_vec(), "8 bytes"),
        ("a.bin.rereads", positions(&[2; 8]), "2 8 times"),
        ("a.bin.rereads", positions(&[2, 1]), "2 before 1"),
        (
            "b.json",
            br#"{"tokens": [1, 2], "rereads": [3]}"#.to_vec(),
            "rereads",
        ),
        (
            "b.json",
            br#"{"tokens": [1, 2], "breaks": [3]}"#.to_vec(),
            "up to the 2 tokens",
        ),
        (
            "b.json",
            br#"{"tokens": [1, 2], "breaks": [2, 1]}"#.to_vec(),
            "2 before 1",
        ),
        (
            "b.json",
            br#"{"tokens": [1, 2], "break": [1]}"#.to_vec(),
            "unknown field",
        ),
        ("b.json", br#"{"breaks": [1]}"#.to_vec(), "missing field"),
        (
            "b.json",
            br#"[1, {"tokens": [2]}]"#.to_vec(),
            "beside each other",
        ),
        ("b.json", br#"{"tokens": [300]}"#.to_vec(), "vocab_size"),
        (
            "c.jsonl",
            br#"{"text": [1, 2], "breaks": [3]}"#.to_vec(),
            "up to the 2 tokens",
        ),
        (
            "c.jsonl",
            br#"{"text": [1, 2], "breaks": 1}"#.to_vec(),
            "breaks",
        ),
    ] {
        std::fs::write(at(name), content).unwrap();
        let read = [".breaks", ".rereads"].map(|end| name.strip_suffix(end));
        let read = at(read.into_iter().flatten().next().unwrap_or(name));
        let error = read_with(&[read], &DataSection::default()).unwrap_err();
        assert!(matches!(error, TrainError::Data { .. }), "{error}");
        assert!(error.to_string().contains(part), "{error}");
        std::fs::remove_file(at(name)).unwrap();
    }
}

/// Documents with and without weights and breaks.
fn weighted(folder: &Path) -> Corpus {
    let lines = [
        r#"{"text": [9, 8, 7]}"#,
        r#"{"tokens": [1, 2, 3, 4, 5, 6], "weights": [9, 0, 1, 2.5, 0, 16], "breaks": [0, 2, 3, 5, 6]}"#,
        r#"{"tokens": [10, 11, 12], "breaks": [1]}"#,
        r#"{"text": "ab"}"#,
        r#"{"tokens": [20, 21], "weights": [0, 3]}"#,
    ];
    let path = folder.join("weighted.jsonl");
    std::fs::write(&path, lines.join("\n")).unwrap();
    read_with(&[path], &DataSection::default()).unwrap()
}

fn example(tokens: &[u32], weights: Option<&[f32]>, breaks: &[usize]) -> Example {
    Example {
        tokens: tokens.to_vec(),
        weights: weights.map(<[f32]>::to_vec),
        breaks: breaks.to_vec(),
        ..Example::default()
    }
}

#[test]
fn weights_and_breaks_stand_beside_the_tokens_of_whole_and_of_cut_documents() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = weighted(folder.path());
    let all = |sequence_len| -> Vec<Example> {
        let sequences = Sequences::new(corpus.documents().to_vec(), sequence_len);
        let get = |i| sequences.get(&corpus, i).unwrap();
        (0..sequences.len()).map(get).collect()
    };
    let rest = [
        example(&[10, 11, 12], None, &[1]),
        ids("ab").into(),
        example(&[20, 21], Some(&[0.0, 3.0]), &[]),
    ];
    let whole = example(
        &[1, 2, 3, 4, 5, 6],
        Some(&[9.0, 0.0, 1.0, 2.5, 0.0, 16.0]),
        &[2, 3, 5, 6],
    );
    let expected = [&[vec![9, 8, 7].into(), whole][..], &rest].concat();
    assert_eq!(all(0), expected);
    let cut = all(3);
    assert_eq!(
        cut[1..3],
        [
            example(&[1, 2, 3, 4], Some(&[9.0, 0.0, 1.0, 2.5]), &[2, 3]),
            example(&[4, 5, 6], Some(&[2.5, 0.0, 16.0]), &[2, 3]),
        ]
    );
    // The tail of a document is a part of it.
    let tails = split(corpus.documents(), Split::Tail, 0.5).1;
    let sequences = Sequences::new(tails, 0);
    let got = sequences.get(&corpus, 1).unwrap();
    assert_eq!(got, example(&[4, 5, 6], Some(&[2.5, 0.0, 16.0]), &[2, 3]));
}

#[test]
fn weights_and_breaks_are_part_of_the_fingerprint() {
    let folder = tempfile::tempdir().unwrap();
    let of = |line: &str| {
        let path = folder.path().join("a.jsonl");
        std::fs::write(&path, line).unwrap();
        let corpus = read_with(&[path], &DataSection::default()).unwrap();
        fingerprint(corpus.documents())
    };
    let lines = [
        r#"{"tokens": [1, 2]}"#,
        r#"{"tokens": [1, 2], "weights": [1, 1]}"#,
        r#"{"tokens": [1, 2], "weights": [1, 2]}"#,
        r#"{"tokens": [1, 2], "breaks": [1]}"#,
        r#"{"tokens": [1, 2], "breaks": [2]}"#,
    ];
    let prints: std::collections::HashSet<String> = lines.iter().map(|l| of(l)).collect();
    assert_eq!(prints.len(), lines.len());
}

#[test]
fn a_split_by_document_keeps_equal_documents_together_and_survives_new_ones() {
    let folder = tempfile::tempdir().unwrap();
    let lens: Vec<usize> = (0..200).map(|i| 5 + i % 7).collect();
    let corpus = corpus_of(&lens, folder.path());
    let (train, validation) = split(corpus.documents(), Split::Auto, 0.2);
    assert_eq!(train.len() + validation.len(), 200);
    assert!((15..80).contains(&validation.len()), "{}", validation.len());
    let read = |d: &segattn::train::data::Document| corpus.tokens(d, 0..d.len).unwrap();
    let held: Vec<_> = validation.iter().map(read).collect();
    assert!(train.iter().all(|d| !held.contains(&read(d))));
    let (_, fewer) = split(&corpus.documents()[..100], Split::Auto, 0.2);
    assert_eq!(fewer[..], validation[..fewer.len()]);
}

#[test]
fn a_single_document_is_split_by_its_tail() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = corpus_of(&[100], folder.path());
    let (train, validation) = split(corpus.documents(), Split::Auto, 0.1);
    assert_eq!((train[0].len, validation[0].len), (90, 10));
    let whole = documents(&corpus).remove(0);
    assert_eq!(corpus.tokens(&train[0], 0..90).unwrap().ids, whole[..90]);
    assert_eq!(
        corpus.tokens(&validation[0], 0..10).unwrap().ids,
        whole[90..]
    );
    let (all, none) = split(corpus.documents(), Split::Auto, 0.0);
    assert_eq!((all[0].len, none.len()), (100, 0));
}

#[test]
fn equal_data_have_one_fingerprint_and_a_changed_token_length_or_order_another() {
    let folder = tempfile::tempdir().unwrap();
    let of = |texts: &[&str]| {
        let path = folder.path().join("a.jsonl");
        let line = |text: &&str| serde_json::json!({"text": text}).to_string() + "\n";
        std::fs::write(&path, texts.iter().map(line).collect::<String>()).unwrap();
        let corpus = read_with(&[path], &DataSection::default()).unwrap();
        fingerprint(corpus.documents())
    };
    assert_eq!(of(&["abc", "d"]), of(&["abc", "d"]));
    for other in [
        &["abd", "d"][..],
        &["d", "abc"],
        &["abcd"],
        &["abc"],
        &["ab", "cd"],
    ] {
        assert_ne!(of(&["abc", "d"]), of(other), "{other:?}");
    }
    // A document cut by its tail is another one.
    let corpus = corpus_of(&[100], folder.path());
    let shares = [0.1, 0.2].map(|share| split(corpus.documents(), Split::Tail, share).0);
    assert_ne!(fingerprint(&shares[0]), fingerprint(&shares[1]));
}
