//! Breaks and rereads beside stored tokens: a token behind which a segment ends has the highest bit of its 32 set, and
//! the next three count how often its segment is read again after it. So a mark lies where its token lies, is hashed
//! with it, and goes wherever tokens are cut and read.

use std::path::{Path, PathBuf};

use super::error::{data_error, io_error};
use crate::model::segmentation::{MOST_REREADS, Tokens, disorder};
use crate::train::error::Result;

/// A mark beside the id of a stored token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mark {
    /// A break follows.
    Break,
    /// The segment is read again.
    Reread,
}

/// Set in a token that a break follows.
const BREAK: u32 = 1 << 31;
/// Added to a token for each time that its segment is read again after it.
const REREAD: u32 = 1 << 28;
/// Ids are below this.
const IDS: u32 = REREAD;
/// Each mark, and what the name of a `.bin` file has behind it in the name of the file with its positions.
pub(super) const COMPANIONS: [(Mark, &str); 2] =
    [(Mark::Break, "breaks"), (Mark::Reread, "rereads")];

const _: () = assert!(MOST_REREADS as u32 == BREAK / REREAD - 1);

/// The id of a stored token.
pub(super) fn id(token: u32) -> u32 {
    token % IDS
}

/// Sets a mark in the tokens before the positions, which are at most the number of tokens; no break is listed twice,
/// and no reread more than [`MOST_REREADS`] times.
pub(super) fn mark(tokens: &mut [u32], mark: Mark, positions: impl IntoIterator<Item = usize>) {
    // Where tokens begin, a segment begins anyway.
    for position in positions.into_iter().filter(|position| *position > 0) {
        tokens[position - 1] += match mark {
            Mark::Break => BREAK,
            Mark::Reread => REREAD,
        };
    }
}

/// Takes the marks off.
pub(super) fn unmark(mut tokens: Vec<u32>) -> Tokens {
    let (mut breaks, mut rereads) = (Vec::new(), Vec::new());
    for (i, token) in tokens.iter_mut().enumerate() {
        if *token & BREAK != 0 {
            breaks.push(i + 1);
        }
        let times = (*token & !BREAK) / REREAD;
        rereads.extend((0..times).map(|_| i + 1));
        *token = id(*token);
    }
    Tokens {
        ids: tokens,
        breaks,
        rereads,
    }
}

/// The file with the positions of a `.bin` file, by what its name has behind.
fn companion(path: &Path, extension: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(extension);
    name.into()
}

/// The marks of a `.bin` file of `tokens` tokens, each with its positions: none without a companion, which holds
/// ascending positions of 8 bytes each, little endian.
pub(super) fn read_companions(path: &Path, tokens: u64) -> Result<[(Mark, Vec<u64>); 2]> {
    let positions = |(mark, name)| read_positions(companion(path, name), mark, tokens);
    let [breaks, rereads] = COMPANIONS;
    Ok([
        (breaks.0, positions(breaks)?),
        (rereads.0, positions(rereads)?),
    ])
}

fn read_positions(path: PathBuf, mark: Mark, tokens: u64) -> Result<Vec<u64>> {
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io_error("read", &path, error)),
    };
    let (positions, rest) = bytes.as_chunks();
    if !rest.is_empty() {
        let got = format!("{} bytes", bytes.len());
        return Err(data_error(&path, None, "positions of 8 bytes", got));
    }
    let positions: Vec<u64> = positions.iter().map(|b| u64::from_le_bytes(*b)).collect();
    let most = match mark {
        Mark::Break => 1,
        Mark::Reread => MOST_REREADS,
    };
    if let Some((expected, got)) = disorder(&positions, most) {
        return Err(data_error(&path, None, &expected, got));
    }
    match positions.last() {
        Some(last) if *last > tokens => {
            let expected = format!("positions up to the {tokens} tokens of the .bin file");
            Err(data_error(&path, None, &expected, last))
        }
        _ => Ok(positions),
    }
}
