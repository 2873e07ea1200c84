//! Sequences that are fed in pieces, shared by tests.

use segattn::device::Device;
use segattn::model::decoder::Decoder;
use segattn::model::session::{Feed, Session};

/// The log-probabilities of tokens, fed in pieces of 1, 2, ... tokens.
pub fn in_pieces<D: Device>(model: &Decoder<D>, tokens: &[u32]) -> Vec<f32> {
    let mut session = Session::new(model, 1, tokens.len(), 1).unwrap();
    let (mut scored, mut at) = (Vec::new(), 0);
    for step in 1.. {
        let end = (at + step).min(tokens.len() - 1);
        let feed = Feed {
            sequence: 0,
            tokens: &tokens[at..end],
            targets: &tokens[at + 1..=end],
            breaks: &[],
            rereads: &[],
        };
        scored.extend(session.feed(&[feed]).unwrap().remove(0));
        at = end;
        if at + 1 == tokens.len() {
            break;
        }
    }
    scored
}
