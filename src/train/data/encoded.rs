//! Files of text, JSONL and JSON become stored tokens: read one after another, encoded by all threads.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::error::{data_error, io_error};
use super::ids::{Listed, read_ids};
use super::listing::{Format, is_compressed};
use super::pieces::{Conversed, Joiner, OVERLAP, PIECE, Place, Tokens, boundary, cut, encode};
use super::reading::Reading;
use super::store::{Stored, Writer};
use super::table;
use crate::model::config::PromptBreak;
use crate::train::error::{Result, TrainError};

/// Longest line of a JSONL file, in bytes.
const MAX_LINE: u64 = 1 << 28;
/// The field of a JSONL line with a conversation.
const MESSAGES: &str = "messages";
/// What is read beside it, and beside ids.
const BESIDE: [&str; 6] = [
    "tools",
    "documents",
    "chat_template_kwargs",
    "breaks",
    "rereads",
    "weights",
];
/// What some programs put before a text in UTF-8.
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// A file to encode.
pub(super) struct Source {
    pub(super) path: PathBuf,
    pub(super) format: Format,
    /// SHA-256 of its content, where it was asked for: what is read now must have it.
    pub(super) hash: Option<[u8; 32]>,
}

/// SHA-256 of a file's content.
///
/// # Errors
/// [`TrainError::Io`](crate::train::TrainError::Io).
pub fn hash_file(path: &Path) -> Result<[u8; 32]> {
    let failed = |e| io_error("read", path, e);
    let mut file = File::open(path).map_err(failed)?;
    let (mut hash, mut part) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut part).map_err(failed)? {
            0 => return Ok(hash.finalize().into()),
            len => hash.update(&part[..len]),
        }
    }
}

/// Encodes `sources` in their order. `total`: bytes of all, for the progress.
pub(super) fn encode_all(
    sources: &[Source],
    total: u64,
    writer: Writer,
    reading: &Reading<'_>,
) -> Result<Stored> {
    let mut queue = Queue {
        reading,
        writer,
        items: Vec::new(),
        bytes: 0,
        limit: PIECE * 8 * rayon::current_num_threads().clamp(1, 32),
        joiner: Joiner::default(),
    };
    let mut done = 0;
    for source in sources {
        queue.add(Item::File(&source.path))?;
        let file = File::open(&source.path).map_err(|e| io_error("read", &source.path, e))?;
        if source.format == Format::Table {
            done += file.metadata().map_or(0, |found| found.len());
            queue.read_table(source, file)?;
            (reading.progress)(done.min(total), total);
            continue;
        }
        let mut input = BufReader::new(Watched {
            file,
            hash: source.hash.map(|_| Sha256::new()),
            seen: |bytes| {
                done += bytes;
                (reading.progress)(done.min(total), total);
            },
        });
        if is_compressed(&source.path) {
            queue.read(source, &mut table::decompressed(&source.path, &mut input)?)?;
        } else {
            queue.read(source, &mut input)?;
        }
        let found = input.into_inner().hash.map(|hash| hash.finalize().into());
        if found != source.hash {
            return Err(changed(&source.path));
        }
    }
    queue.flush()?;
    queue.writer.finish()
}

fn changed(path: &Path) -> TrainError {
    let expected = "a file that does not change while it is read";
    data_error(path, None, expected, "a change")
}

/// A file whose bytes are counted and hashed as they are read.
struct Watched<F> {
    file: File,
    hash: Option<Sha256>,
    seen: F,
}

impl<F: FnMut(u64)> Read for Watched<F> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let len = self.file.read(buffer)?;
        if let Some(hash) = &mut self.hash {
            hash.update(&buffer[..len]);
        }
        (self.seen)(len as u64);
        Ok(len)
    }
}

/// The weights of so many tokens.
fn read_weights(list: Value, tokens: usize) -> std::result::Result<Vec<f32>, (String, String)> {
    let expected =
        || format!("`weights`, {tokens} finite numbers of at least 0, one for each token");
    let weights: Vec<f32> =
        serde_json::from_value(list).map_err(|e| (expected(), e.to_string()))?;
    if weights.len() != tokens {
        return Err((expected(), weights.len().to_string()));
    }
    match weights.iter().find(|w| !w.is_finite() || **w < 0.0) {
        Some(wrong) => Err((expected(), wrong.to_string())),
        None => Ok(weights),
    }
}

/// What the stored tokens are made of, in order.
enum Item<'a> {
    /// The documents that follow are this file's.
    File(&'a Path),
    /// Tokens as they are.
    Tokens(Vec<u32>),
    /// Tokens with breaks.
    Broken(Listed),
    /// Weights of the tokens of the open document, which are complete.
    Weights(Vec<f32>),
    /// A piece of the open document's text, and its line, where the file has lines.
    Piece {
        text: String,
        place: Place,
        line: Option<usize>,
    },
    /// Whole documents, mostly one: a conversation in JSON, and its line.
    Conversation { json: String, line: usize },
    /// The open document is complete.
    End,
}

/// What items become that are encoded side by side.
enum Made {
    Piece(Tokens),
    Conversation(Vec<Conversed>),
}

/// The conversation with its breaks, and the weight of each of its tokens: 1 where the assistant writes it, else 0.
fn weighed(conversed: Conversed, own: PromptBreak) -> (Listed, Vec<f32>) {
    let Conversed { ids, answers } = conversed;
    let mut weights = vec![0.0; ids.len()];
    for answer in &answers {
        weights[answer.clone()].fill(1.0);
    }
    let (mut breaks, mut rereads) = (Vec::new(), Vec::new());
    let mut read = 0;
    for answer in answers.iter().filter(|a| !a.is_empty()) {
        // Answers may follow one another, and share a token.
        own.mark(read..answer.start.max(read), &mut breaks, &mut rereads);
        // The last token of an answer is read with the turn that follows.
        read = answer.end - 1;
    }
    let listed = Listed {
        tokens: ids,
        breaks,
        rereads,
    };
    (listed, weights)
}

/// Items that wait to be encoded together.
struct Queue<'a> {
    reading: &'a Reading<'a>,
    writer: Writer,
    items: Vec<Item<'a>>,
    bytes: usize,
    /// Bytes that are encoded together.
    limit: usize,
    joiner: Joiner,
}

impl<'a> Queue<'a> {
    fn read(&mut self, source: &'a Source, input: &mut impl BufRead) -> Result<()> {
        let path = &source.path;
        if input
            .fill_buf()
            .map_err(|e| io_error("read", path, e))?
            .starts_with(BYTE_ORDER_MARK)
        {
            input.consume(BYTE_ORDER_MARK.len());
        }
        match source.format {
            Format::Lines => self.read_lines(path, input),
            Format::Ids => {
                self.flush()?;
                read_ids(path, input, &mut self.writer)
            }
            Format::Text | Format::Binary | Format::Table => self.read_text(path, input),
        }
    }

    /// One document a row, as if each were a line of JSONL.
    fn read_table(&mut self, source: &'a Source, file: File) -> Result<()> {
        let path = &source.path;
        let reading = self.reading;
        let field = &reading.section.jsonl_field;
        table::rows(
            path,
            file,
            &[field, "tokens", MESSAGES],
            &BESIDE,
            |row, line| self.read_line(path, row, line),
        )?;
        match source.hash {
            Some(hash) if hash_file(path)? != hash => Err(changed(path)),
            _ => Ok(()),
        }
    }

    /// One document: the whole file.
    fn read_text(&mut self, path: &'a Path, input: &mut impl Read) -> Result<()> {
        self.add(Item::Tokens(self.reading.before.to_vec()))?;
        let (mut bytes, mut start, mut shared) = (Vec::new(), 0u64, 0);
        loop {
            let want = shared + PIECE;
            let room = (want - bytes.len()) as u64;
            let read = input.by_ref().take(room).read_to_end(&mut bytes);
            read.map_err(|e| io_error("read", path, e))?;
            let last = bytes.len() < want;
            let text = match std::str::from_utf8(&bytes) {
                Ok(text) => text,
                // A character may go on in the next piece.
                Err(e) if e.error_len().is_none() && !last => {
                    std::str::from_utf8(&bytes[..e.valid_up_to()]).expect("valid up to there")
                }
                Err(e) => {
                    let at = start + e.valid_up_to() as u64;
                    return Err(data_error(
                        path,
                        None,
                        "UTF-8 text",
                        format!("another byte at {at}"),
                    ));
                }
            };
            let piece = Item::Piece {
                text: text.to_owned(),
                place: Place {
                    start,
                    shared,
                    last,
                },
                line: None,
            };
            let next = boundary(text, text.len().saturating_sub(OVERLAP));
            (start, shared) = (start + next as u64, text.len() - next);
            self.add(piece)?;
            if last {
                break;
            }
            bytes.drain(..next);
        }
        self.add(Item::Tokens(self.reading.after.to_vec()))?;
        self.add(Item::End)
    }

    /// One document a line.
    fn read_lines(&mut self, path: &'a Path, input: &mut impl BufRead) -> Result<()> {
        let (mut line, mut number) = (Vec::new(), 0);
        loop {
            line.clear();
            number += 1;
            let read = input.by_ref().take(MAX_LINE).read_until(b'\n', &mut line);
            if read.map_err(|e| io_error("read", path, e))? == 0 {
                return Ok(());
            }
            if line.len() as u64 == MAX_LINE && line.last() != Some(&b'\n') {
                let expected = format!("lines below {MAX_LINE} bytes");
                return Err(data_error(path, Some(number), &expected, "a longer one"));
            }
            if !line.trim_ascii().is_empty() {
                self.read_line(path, number, &line)?;
            }
        }
    }

    fn read_line(&mut self, path: &Path, number: usize, line: &[u8]) -> Result<()> {
        let field = &self.reading.section.jsonl_field;
        let wrong = |got: String| {
            let expected = format!(
                "an object with `{field}`, a string, or a list of ids with or without `breaks` and `weights`; or with \
                 `messages`"
            );
            data_error(path, Some(number), &expected, got)
        };
        let mut object: serde_json::Map<String, Value> =
            serde_json::from_slice(line).map_err(|e| wrong(e.to_string()))?;
        let has = |key: &str| object.contains_key(key);
        if has(MESSAGES) && (field == MESSAGES || !has(field) && !has("tokens")) {
            let json = String::from_utf8_lossy(line).into_owned();
            return self.add(Item::Conversation { json, line: number });
        }
        let content = object.remove(field).or_else(|| object.remove("tokens"));
        match content {
            Some(Value::String(_)) if object.contains_key("weights") => {
                let expected = "a list of ids beside `weights`, which are one for each token";
                return Err(data_error(path, Some(number), expected, "a text"));
            }
            Some(Value::String(text)) => {
                self.add(Item::Tokens(self.reading.before.to_vec()))?;
                for (piece, place) in cut(&text, PIECE, OVERLAP) {
                    let (text, line) = (piece.to_owned(), Some(number));
                    self.add(Item::Piece { text, place, line })?;
                }
                self.add(Item::Tokens(self.reading.after.to_vec()))?;
            }
            Some(list @ Value::Array(_)) => {
                let mut positions = |key: &str| {
                    let given = object
                        .remove(key)
                        .unwrap_or_else(|| Vec::<Value>::new().into());
                    serde_json::from_value(given).map_err(|e| wrong(format!("`{key}`: {e}")))
                };
                let listed = Listed {
                    breaks: positions("breaks")?,
                    rereads: positions("rereads")?,
                    tokens: serde_json::from_value(list).map_err(|e| wrong(e.to_string()))?,
                };
                listed.check().map_err(wrong)?;
                let tokens = listed.tokens.len();
                self.add(Item::Broken(listed))?;
                if let Some(weights) = object.remove("weights") {
                    let weights = read_weights(weights, tokens);
                    let weights =
                        weights.map_err(|(e, got)| data_error(path, Some(number), &e, got))?;
                    self.add(Item::Weights(weights))?;
                }
            }
            Some(Value::Null) => return Err(wrong(format!("null in `{field}`"))),
            Some(_) => return Err(wrong(format!("something else in `{field}`"))),
            None => return Err(wrong(format!("an object without `{field}`"))),
        }
        self.add(Item::End)
    }

    fn add(&mut self, item: Item<'a>) -> Result<()> {
        self.bytes += match &item {
            Item::Piece { text, .. } => text.len(),
            Item::Conversation { json, .. } => json.len(),
            Item::Tokens(tokens) => size_of_val(&tokens[..]),
            Item::Broken(listed) => size_of_val(&listed.tokens[..]),
            Item::Weights(weights) => size_of_val(&weights[..]),
            Item::File(_) | Item::End => 0,
        };
        // The items themselves take memory too.
        self.bytes += size_of::<Item<'_>>();
        self.items.push(item);
        match self.bytes < self.limit {
            true => Ok(()),
            false => self.flush(),
        }
    }

    /// Encodes what waits and writes it.
    fn flush(&mut self) -> Result<()> {
        let items = std::mem::take(&mut self.items);
        self.bytes = 0;
        let by = self.reading.encode;
        let made: Vec<Option<std::result::Result<Made, String>>> = items
            .par_iter()
            .map(|item| match item {
                Item::Piece { text, place, .. } => Some(encode(by, text, *place).map(Made::Piece)),
                Item::Conversation { json, .. } => Some(by.converse(json).map(Made::Conversation)),
                _ => None,
            })
            .collect();
        for (item, made) in items.into_iter().zip(made) {
            self.write(item, made)?;
        }
        Ok(())
    }

    fn write(
        &mut self,
        item: Item<'a>,
        made: Option<std::result::Result<Made, String>>,
    ) -> Result<()> {
        let made = made.transpose();
        match item {
            Item::File(path) => self.writer.begin_file(path),
            Item::Tokens(tokens) => self.writer.push(&tokens)?,
            Item::Broken(listed) => self.writer.push_marked(listed)?,
            Item::Weights(weights) => self.writer.push_weights(&weights)?,
            Item::End => self.writer.end_document(),
            Item::Piece { text, place, line } => {
                let by = self.reading.encode;
                let tokens = made.and_then(|made| match made {
                    Some(Made::Piece(tokens)) => self.joiner.push(by, &text, tokens, place),
                    _ => Ok(Vec::new()),
                });
                let failed =
                    |e| data_error(self.writer.source(), line, "text the tokenizer accepts", e);
                let tokens = tokens.map_err(failed)?;
                self.writer.push(&tokens)?;
            }
            Item::Conversation { line, .. } => {
                let expected = "`messages` that the model's chat template takes, with the assistant's among them";
                let failed = |e| data_error(self.writer.source(), Some(line), expected, e);
                let Some(Made::Conversation(texts)) = made.map_err(failed)? else {
                    return Ok(());
                };
                for conversed in texts {
                    let (listed, weights) = weighed(conversed, self.reading.prompt_break);
                    self.writer.push_marked(listed)?;
                    self.writer.push_weights(&weights)?;
                    self.writer.end_document();
                }
            }
        }
        Ok(())
    }
}
