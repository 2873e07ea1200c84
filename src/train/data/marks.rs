//! Breaks beside stored tokens: a token behind which a segment ends has the highest bit of its 32 set. So a break lies
//! where its token lies, is hashed with it, and goes wherever tokens are cut and read.

use std::path::{Path, PathBuf};

use super::error::{data_error, io_error};
use crate::model::segmentation::Tokens;
use crate::train::error::Result;

/// Set in a token that a break follows; ids are far below.
const BREAK: u32 = 1 << 31;
/// What the name of a `.bin` file has behind it in the name of the file with its breaks.
pub(super) const BREAKS: &str = "breaks";

/// The id of a stored token.
pub(super) fn id(token: u32) -> u32 {
    token & !BREAK
}

/// Marks the tokens before the breaks, positions up to the number of tokens.
pub(super) fn mark(tokens: &mut [u32], breaks: impl IntoIterator<Item = usize>) {
    // Where tokens begin, a segment begins anyway.
    for position in breaks.into_iter().filter(|position| *position > 0) {
        tokens[position - 1] |= BREAK;
    }
}

/// Takes the marks off.
pub(super) fn unmark(mut tokens: Vec<u32>) -> Tokens {
    let marked = tokens
        .iter()
        .enumerate()
        .filter(|(_, token)| **token & BREAK != 0);
    let breaks = marked.map(|(i, _)| i + 1).collect();
    tokens.iter_mut().for_each(|token| *token = id(*token));
    Tokens {
        ids: tokens,
        breaks,
    }
}

/// The file with the breaks of a `.bin` file.
pub(super) fn companion(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(BREAKS);
    name.into()
}

/// The breaks of a `.bin` file of `tokens` tokens: none without a companion, which holds strictly ascending positions
/// of 8 bytes each, little endian.
pub(super) fn read_companion(path: &Path, tokens: u64) -> Result<Vec<u64>> {
    let path = companion(path);
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
    if let Some(pair) = positions.windows(2).find(|pair| pair[0] >= pair[1]) {
        let got = format!("{} before {}", pair[0], pair[1]);
        return Err(data_error(&path, None, "strictly ascending positions", got));
    }
    match positions.last() {
        Some(last) if *last > tokens => {
            let expected = format!("positions up to the {tokens} tokens of the .bin file");
            Err(data_error(&path, None, &expected, last))
        }
        _ => Ok(positions),
    }
}
