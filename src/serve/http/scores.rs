//! Log-probabilities as OpenAI's interface writes them. They are widened to f64, because the digits of an f64 survive
//! readers of either width.

use serde_json::{Map, Value, json};

use super::Server;
use crate::serve::job::Ranked;

/// A place of a chat's `logprobs.content`.
pub fn content(server: &Server, (id, score): Ranked, top: &[Ranked]) -> Value {
    let one = |(id, score): Ranked| {
        let (text, bytes) = server.spelled(id);
        json!({"token": text, "logprob": f64::from(score), "bytes": bytes})
    };
    let mut place = one((id, score));
    place["top_logprobs"] = top.iter().map(|ranked| one(*ranked)).collect();
    place
}

/// A place of `prompt_logprobs`: by token id, the token that is there and the likeliest ones.
pub fn by_id(server: &Server, there: Ranked, top: &[Ranked]) -> Value {
    let mut place = Map::new();
    let top = top
        .iter()
        .enumerate()
        .map(|(rank, ranked)| (Some(rank + 1), *ranked));
    for (rank, (id, score)) in top.chain([(None, there)]) {
        let entry = json!({
            "logprob": f64::from(score),
            "rank": rank,
            "decoded_token": server.spelled(id).0,
        });
        place.entry(id.to_string()).or_insert(entry);
    }
    Value::Object(place)
}

/// The places of a completion's `logprobs`.
pub struct Places<'s> {
    server: &'s Server,
    /// Characters before the next place.
    pub offset: usize,
    count: usize,
    tokens: Vec<String>,
    scores: Vec<Option<f64>>,
    top: Vec<Value>,
    offsets: Vec<usize>,
}

impl<'s> Places<'s> {
    /// None yet, of a text that begins `offset` characters from the beginning; with `count` of the likeliest tokens.
    pub fn new(server: &'s Server, offset: usize, count: usize) -> Self {
        Self {
            server,
            offset,
            count,
            tokens: Vec::new(),
            scores: Vec::new(),
            top: Vec::new(),
            offsets: Vec::new(),
        }
    }

    /// The next place.
    pub fn push(&mut self, id: u32, score: Option<f32>, likeliest: &[Ranked]) {
        let (text, bytes) = self.server.spelled(id);
        let mut top = Map::new();
        for (id, score) in likeliest
            .iter()
            .take(self.count)
            .copied()
            .chain(score.map(|score| (id, score)))
        {
            top.entry(self.server.spelled(id).0)
                .or_insert(f64::from(score).into());
        }
        self.tokens.push(text);
        self.scores.push(score.map(f64::from));
        self.top.push(if score.is_some() {
            top.into()
        } else {
            Value::Null
        });
        self.offsets.push(self.offset);
        self.offset += String::from_utf8_lossy(&bytes).chars().count();
    }

    /// As it is written.
    pub fn into_json(self) -> Value {
        json!({
            "tokens": self.tokens,
            "token_logprobs": self.scores,
            "top_logprobs": self.top,
            "text_offset": self.offsets,
        })
    }
}
