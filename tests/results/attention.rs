//! Results of the operation alone on a GPU.

use serde_json::Value;

use crate::table::{markdown, number};

/// Peers by their keys in the raw results. PyTorch calls cuDNN twice: for the causal square and for the keys in front.
pub const PEERS: [(&str, &str); 5] = [
    ("flash", "FlashAttention-2"),
    ("cudnn", "cuDNN"),
    ("cudnn1", "cuDNN, one call"),
    ("fa3", "FlashAttention-3"),
    ("flex", "FlexAttention"),
];

pub fn page(raw: &Value) -> String {
    let peak = raw["peers"]["peak"].as_f64();
    let copy = raw["copy_bytes_a_second"]
        .as_f64()
        .expect("copy_bytes_a_second");
    let (decode, prefill): (Vec<_>, Vec<_>) = raw["rows"]
        .as_array()
        .expect("rows")
        .iter()
        .partition(|row| case(row).starts_with("decode"));
    let mut text = format!("{}\n", machine(raw));
    text += &format!(
        "A copy: {} TB/s, bytes read plus written.",
        number(copy / 1e12)
    );
    if let Some(peak) = peak {
        text += &format!(
            " A bf16 product of 8192 x 8192 x 8192: {} TFLOP/s.",
            number(peak / 1e12)
        );
    }
    text += "\n";
    if !prefill.is_empty() {
        text += "\n## Forward and backward\n\nD head size, S segment, M prior rows, R past rows on a quarter of the \
                 heads. TFLOP/s of visible query-key pairs.\nThe peers' columns are their time over ours at equal \
                 pairs: above 1 segattn is faster.\n\n";
        let mut heads = vec!["case", "pass", "ms", "TFLOP/s", "of the product's"];
        let mut peers = PEERS.to_vec();
        peers.retain(|(key, _)| prefill.iter().any(|row| row["peers"][key].is_f64()));
        heads.extend(peers.iter().map(|(_, name)| name));
        let rows = prefill.iter().map(|row| prefill_row(row, peak, &peers));
        text += &markdown(&heads, rows.collect());
    }
    if !decode.is_empty() {
        text +=
            "\n## Decoding\n\nOne query row a sequence. Bytes are those of keys and values.\n\n";
        let heads = ["case", "us", "TB/s", "of a copy"];
        text += &markdown(
            &heads,
            decode.iter().map(|row| decode_row(row, copy)).collect(),
        );
    }
    text
}

/// The machine and the peers' versions, one line.
pub fn machine(raw: &Value) -> String {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let versions = [
        ("torch", "PyTorch"),
        ("cudnn", "cuDNN"),
        ("transformers", "Transformers"),
    ];
    let of = |(key, name): (&str, &str)| {
        let version = &raw["peers"][key];
        let version = text(version).or(version.as_u64().map(|n| n.to_string()))?;
        Some(format!("{name} {version}"))
    };
    let mut parts: Vec<String> = ["gpu", "date", "commit"]
        .iter()
        .filter_map(|key| text(&raw[*key]))
        .collect();
    parts.extend(text(&raw["kernels"]).map(|kernels| format!("kernels for {kernels}")));
    parts.extend(versions.into_iter().filter_map(of));
    parts.join("; ") + ".\n"
}

pub fn case(row: &Value) -> &str {
    row["case"].as_str().expect("a case")
}

pub fn seconds(row: &Value) -> f64 {
    row["seconds"].as_f64().expect("seconds")
}

/// FLOP/s.
pub fn speed(row: &Value) -> f64 {
    row["operations"].as_f64().expect("operations") / seconds(row)
}

fn percent(share: f64) -> String {
    format!("{:.0}%", 100.0 * share)
}

fn prefill_row(row: &Value, peak: Option<f64>, peers: &[(&str, &str)]) -> Vec<String> {
    let mut cells = vec![
        case(row).to_owned(),
        row["pass"].as_str().expect("a pass").to_owned(),
        number(1e3 * seconds(row)),
        number(speed(row) / 1e12),
        peak.map_or(String::new(), |peak| percent(speed(row) / peak)),
    ];
    cells.extend(peers.iter().map(|(key, _)| {
        let peer = row["peers"][key].as_f64();
        peer.map_or(String::new(), |peer| format!("{:.2}", peer / seconds(row)))
    }));
    cells
}

fn decode_row(row: &Value, copy: f64) -> Vec<String> {
    let bytes_a_second = row["kv_bytes"].as_f64().expect("kv_bytes") / seconds(row);
    vec![
        case(row).trim_start_matches("decode ").to_owned(),
        number(1e6 * seconds(row)),
        number(bytes_a_second / 1e12),
        percent(bytes_a_second / copy),
    ]
}
