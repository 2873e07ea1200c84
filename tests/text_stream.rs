//! Text released token by token is the text of all tokens together, whatever they are cut into.

use segattn::generate::text::TextStream;
use std::convert::Infallible;

type Decoded = Result<String, Infallible>;

fn bytes(tokens: &[u32]) -> Decoded {
    let bytes: Vec<u8> = tokens.iter().map(|t| *t as u8).collect();
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Words with a space before each, but not at the start of a text.
fn words(tokens: &[u32]) -> Decoded {
    let text: String = tokens.iter().map(|t| format!(" w{t}")).collect();
    Ok(text.trim_start().to_owned())
}

fn stream(tokens: &[u32], stops: &[&str], decode: fn(&[u32]) -> Decoded) -> (Vec<String>, bool) {
    let stops = stops.iter().map(|s| (*s).to_owned()).collect();
    let mut stream = TextStream::new(stops).unwrap();
    let mut parts = Vec::new();
    for token in tokens {
        let output = stream.push(*token, decode).unwrap();
        parts.push(output.text);
        if output.stopped.is_some() {
            return (parts, true);
        }
    }
    parts.push(stream.finish(decode).unwrap());
    (parts, false)
}

fn of_text(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

#[test]
fn characters_of_several_tokens_come_whole() {
    let text = "aß€😀 é.\u{301}ende€";
    let (parts, _) = stream(&of_text(text), &[], bytes);
    assert_eq!(parts.concat(), text);
    assert!(parts.iter().all(|p| !p.contains('\u{fffd}')));
    // Nothing whole is held back.
    assert_eq!(parts[..6], ["a", "", "ß", "", "", "€"]);
}

#[test]
fn broken_characters_pass_in_bounded_time_and_at_the_end() {
    let (parts, _) = stream(&[0xff; 100], &[], bytes);
    assert_eq!(parts.concat(), "\u{fffd}".repeat(100));
    assert!(parts.chunks(32).take(3).all(|p| !p.concat().is_empty()));
    let (parts, _) = stream(&[0x61, 0xe2, 0x82], &[], bytes);
    assert_eq!(parts.concat(), "a\u{fffd}");
}

#[test]
fn spaces_between_words_stay() {
    let (parts, _) = stream(&[1, 2, 33, 4], &[], words);
    assert_eq!(parts, ["w1", " w2", " w33", " w4", ""]);
}

#[test]
fn the_stream_ends_before_a_stop_string_across_tokens() {
    let (parts, stopped) = stream(&of_text("one two€ stop three"), &["o€", "€ st"], bytes);
    assert!(stopped);
    assert_eq!(parts.concat(), "one tw");
    let (parts, stopped) = stream(&[1, 2, 3], &["2 w4"], words);
    assert!(!stopped);
    assert_eq!(parts.concat(), "w1 w2 w3");
}
