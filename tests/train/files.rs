//! Which files are training data, under which names, how many at a time, and what is kept of them.

use std::fs;
use std::path::{Path, PathBuf};

use crate::reading::{documents, ids, read_with, reading as reading_of};
use segattn::train::TrainError;
use segattn::train::config::DataSection;
use segattn::train::data::{Corpus, Reading, fingerprint, list_files};

fn section(extensions: &[&str]) -> DataSection {
    DataSection {
        extensions: extensions.iter().map(|e| (*e).to_owned()).collect(),
        ..DataSection::default()
    }
}

#[cfg(unix)]
#[test]
fn links_to_files_are_read_as_the_files_and_links_to_folders_are_not_followed() {
    use std::os::unix::fs::symlink;
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir_all(at("data/sub")).unwrap();
    fs::create_dir(at("store")).unwrap();
    fs::write(at("data/a.txt"), "one").unwrap();
    fs::write(at("store/b"), "two").unwrap();
    symlink(at("store/b"), at("data/b.txt")).unwrap();
    symlink(at("data"), at("data/sub/up")).unwrap();
    symlink(at("nowhere"), at("data/other.log")).unwrap();
    let corpus = read_with(&[at("data")], &DataSection::default()).unwrap();
    assert_eq!(documents(&corpus), [ids("one"), ids("two")]);
    symlink(at("nowhere"), at("data/c.txt")).unwrap();
    let error = read_with(&[at("data")], &DataSection::default()).unwrap_err();
    assert!(error.to_string().contains("c.txt"), "{error}");
}

#[test]
fn jsonl_goes_by_several_names_and_case_does_not_matter() {
    let folder = tempfile::tempdir().unwrap();
    let names = ["a.jsonl", "b.JSONL", "c.ndjson", "d.jsonlines", "e.Ndjson"];
    for name in names {
        let path = folder.path().join(name);
        fs::write(&path, "\u{feff}{\"text\": \"x\"}\n").unwrap();
        let named = read_with(&[path], &DataSection::default()).unwrap();
        assert_eq!(documents(&named), [ids("x")], "{name}");
    }
    fs::write(folder.path().join("f.TXT"), "\u{feff}y").unwrap();
    fs::write(folder.path().join("g.JSON"), "\u{feff}[1, 2]").unwrap();
    let all = read_with(
        &[folder.path().into()],
        &section(&["jsonl", ".txt", "Json"]),
    )
    .unwrap();
    assert_eq!(documents(&all).len(), names.len() + 2);
    assert_eq!(documents(&all)[names.len()..], [ids("y"), vec![1, 2]]);
}

#[test]
fn what_a_run_has_written_and_hidden_files_are_no_data_and_a_folder_without_data_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for sub in [
        "run/checkpoints/step-0000000001",
        "other",
        ".hidden",
        "cache",
    ] {
        fs::create_dir_all(at(sub)).unwrap();
    }
    fs::write(at("run/run.lock"), "").unwrap();
    fs::write(at("cache/CACHEDIR.TAG"), "").unwrap();
    fs::write(at("cache/x.txt"), "cached").unwrap();
    for name in [
        "run/metrics.jsonl",
        "run/checkpoints/step-0000000001/README.txt",
        ".hidden/x.txt",
        ".x.txt",
    ] {
        fs::write(at(name), "{\"step\": 1}").unwrap();
    }
    fs::write(at("run/mine.txt"), "mine").unwrap();
    fs::write(at("other/metrics.jsonl"), "{\"text\": \"theirs\"}").unwrap();
    let corpus = read_with(&[folder.path().into()], &DataSection::default()).unwrap();
    assert_eq!(documents(&corpus), [ids("theirs"), ids("mine")]);
    // The run's folder itself, as with `data.train = "."` and `training.output = "."`.
    let own = list_files(&[at("run")], None).unwrap();
    assert_eq!(own, [at("run/mine.txt")]);

    fs::create_dir(at("table")).unwrap();
    fs::write(at("table/a.csv"), "1,2").unwrap();
    let error = read_with(&[at("table")], &DataSection::default()).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("data.extensions") && text.contains("other extension"),
        "{text}"
    );
    // Beside a folder that has some it is no error.
    read_with(&[at("table"), at("other")], &DataSection::default()).unwrap();
}

#[test]
fn more_bin_files_than_may_be_open_are_read_and_one_that_changes_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = |i: usize| folder.path().join(format!("f{i:04}.bin"));
    let content = |i: usize| -> Vec<u8> {
        let ids = [i as u16 % 300, 7, 8];
        ids.iter().flat_map(|id| id.to_le_bytes()).collect()
    };
    // More than the limit that a process usually has.
    for i in 0..1100 {
        fs::write(path(i), content(i)).unwrap();
    }
    let corpus = read_with(&[folder.path().into()], &section(&["bin"])).unwrap();
    let all = documents(&corpus);
    assert!(
        all.len() == 1100
            && all
                .iter()
                .enumerate()
                .all(|(i, d)| d[0] as usize == i % 300)
    );
    #[cfg(target_os = "linux")]
    {
        let open = fs::read_dir("/proc/self/fd").unwrap().count();
        assert!(open < 100, "{open} open files");
    }
    fs::write(path(3), [1, 0]).unwrap();
    let document = &corpus.documents()[3];
    let error = corpus.tokens(document, 0..document.len).unwrap_err();
    assert!(matches!(error, TrainError::Data { .. }), "{error}");
    assert!(error.to_string().contains("f0003.bin"), "{error}");
}

/// Two megabytes of text.
fn large(folder: &Path) -> PathBuf {
    let path = folder.join("large.txt");
    fs::write(&path, "a line of text, and another.\n".repeat(70_000)).unwrap();
    path
}

#[test]
fn large_texts_are_encoded_once_and_again_when_anything_their_tokens_depend_on_changes() {
    let folder = tempfile::tempdir().unwrap();
    let (text, cache) = (large(folder.path()), folder.path().join("cache"));
    let section = DataSection::default();
    let read = |change: &dyn Fn(&mut Reading<'_>)| {
        let encoded = std::cell::Cell::new(0);
        let note = |done, _| encoded.set(done);
        let mut reading = reading_of(&section, folder.path());
        reading.cache = Some(&cache);
        reading.progress = &note;
        change(&mut reading);
        let corpus = Corpus::read(&[std::slice::from_ref(&text)], &reading).unwrap();
        (documents(&corpus), encoded.get() > 0)
    };
    let entries = || {
        let files = fs::read_dir(&cache).unwrap().map(|e| e.unwrap().path());
        files
            .filter(|p| p.extension().is_some_and(|e| e == "tokens"))
            .collect::<Vec<_>>()
    };
    let first = read(&|_| {});
    assert_eq!(
        first,
        (vec![ids(&fs::read_to_string(&text).unwrap())], true)
    );
    assert_eq!(read(&|_| {}), (first.0.clone(), false));
    // A damaged entry is made again.
    let entry = entries().remove(0);
    let mut bytes = fs::read(&entry).unwrap();
    bytes[1000] ^= 1;
    fs::write(&entry, &bytes).unwrap();
    assert_eq!(read(&|_| {}), (first.0.clone(), true));
    fs::write(&entry, &bytes[..500]).unwrap();
    assert_eq!(read(&|_| {}), (first.0.clone(), true));
    assert_eq!(read(&|_| {}), (first.0.clone(), false));

    assert!(read(&|r| r.tokenizer = "another").1);
    assert!(read(&|r| r.before = &[]).1);
    assert!(read(&|r| r.after = &[256]).1);
    fs::write(
        &text,
        fs::read_to_string(&text)
            .unwrap()
            .replacen("line", "word", 1),
    )
    .unwrap();
    let changed = read(&|_| {});
    assert!(changed.1 && changed.0 != first.0);
    // Left by a process that was killed: it goes when the next entry is written.
    let left = cache.join("writing-left");
    fs::write(&left, "half").unwrap();
    assert!(read(&|r| r.tokenizer = "a third").1);
    assert!(!left.exists());
    assert!(entries().len() >= 5);
}

#[test]
fn a_cache_that_cannot_be_used_does_not_keep_texts_from_being_read() {
    let folder = tempfile::tempdir().unwrap();
    let text = large(folder.path());
    let cache = folder.path().join("a file");
    fs::write(&cache, "").unwrap();
    let section = DataSection::default();
    let mut reading = reading_of(&section, folder.path());
    reading.cache = Some(&cache);
    let corpus = Corpus::read(&[std::slice::from_ref(&text)], &reading).unwrap();
    let without = read_with(&[text], &section).unwrap();
    assert_eq!(
        fingerprint(corpus.documents()),
        fingerprint(without.documents())
    );
}

#[test]
fn groups_keep_their_documents_apart_whatever_their_formats() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("a.txt"), "one").unwrap();
    fs::write(at("b.bin"), [5, 0, 6, 0]).unwrap();
    fs::write(at("c.json"), "[[1, 2], [3]]").unwrap();
    let section = DataSection::default();
    let (first, second) = ([at("b.bin"), at("a.txt")], [at("c.json"), at("b.bin")]);
    let corpus = Corpus::read(&[&first, &second], &reading_of(&section, folder.path())).unwrap();
    let tokens = |group: usize| -> Vec<Vec<u32>> {
        let group = corpus.group(group).iter();
        let ids = |d| corpus.tokens(d, 0..d.len).unwrap().ids;
        group.map(ids).collect()
    };
    assert_eq!(tokens(0), [vec![5, 6], ids("one")]);
    assert_eq!(tokens(1), [vec![1, 2], vec![3], vec![5, 6]]);
    assert_eq!(corpus.group(2), []);
}
