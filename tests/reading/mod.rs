//! Files read as training data, a token a byte, shared by tests.

// Every test program uses a part of this.
#![allow(dead_code)]

use std::path::{Path, PathBuf};

use segattn::model::config::PromptBreak;
use segattn::train::TrainError;
use segattn::train::config::DataSection;
use segattn::train::data::{Bytes, Corpus, Document, Reading};

/// Ids below 300; 256 before and 257 after each text.
pub fn reading<'a>(section: &'a DataSection, scratch: &'a Path) -> Reading<'a> {
    Reading {
        section,
        vocab_size: 300,
        before: &[256],
        after: &[257],
        encode: &Bytes,
        prompt_break: PromptBreak::default(),
        tokenizer: "bytes",
        cache: None,
        scratch,
        progress: &|_, _| {},
    }
}

pub fn read_with(paths: &[PathBuf], section: &DataSection) -> Result<Corpus, TrainError> {
    let scratch = tempfile::tempdir().unwrap();
    Corpus::read(&[paths], &reading(section, scratch.path()))
}

pub fn documents(corpus: &Corpus) -> Vec<Vec<u32>> {
    let whole = |d: &Document| corpus.tokens(d, 0..d.len).unwrap().ids;
    corpus.documents().iter().map(whole).collect()
}

/// What a text becomes.
pub fn ids(text: &str) -> Vec<u32> {
    let mut ids = vec![256];
    ids.extend(text.bytes().map(u32::from));
    ids.push(257);
    ids
}
