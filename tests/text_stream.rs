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
fn the_space_before_the_first_word_after_a_prompt_stays_and_can_stop() {
    let after = |stops: Vec<String>| TextStream::new(stops).unwrap().after(&[7, 8]);
    let mut stream = after(Vec::new());
    assert_eq!(stream.push(1, words).unwrap().text, " w1");
    assert_eq!(stream.finish(words).unwrap(), "");
    let mut stream = after(vec![" w1".into()]);
    assert_eq!(stream.push(1, words).unwrap().stopped, Some(0));
    // Nothing of the prompt is text of the stream.
    assert_eq!(after(Vec::new()).finish(words).unwrap(), "");
}

/// As [`words`], where 0 is a special token without text.
fn words_and_specials(tokens: &[u32]) -> Decoded {
    let shown: Vec<u32> = tokens.iter().copied().filter(|t| *t != 0).collect();
    words(&shown)
}

#[test]
fn the_space_after_hidden_tokens_stays() {
    for tokens in [
        vec![1, 0, 2],
        vec![0, 0, 1, 0, 0, 0, 2, 3, 0],
        [vec![1], vec![0; 90], vec![2, 3]].concat(),
    ] {
        let (parts, _) = stream(&tokens, &[], words_and_specials);
        let whole = words_and_specials(&tokens).unwrap();
        assert_eq!(parts.concat(), whole);
    }
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
