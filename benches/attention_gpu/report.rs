//! The table and the raw results.

use std::error::Error;
use std::io::Write;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use segattn::cuda::{DeviceInfo, KERNEL_ARCHITECTURES};
use serde_json::{Value, json};

use super::case::Case;
use super::date::date;
use super::peers::NAMES;

/// A measured pass and its peers.
pub struct Row {
    case: Case,
    pass: &'static str,
    seconds: f64,
    peers: Result<Value, String>,
}

impl Row {
    pub fn new(
        case: &Case,
        pass: &'static str,
        seconds: f64,
        peers: Result<Value, String>,
    ) -> Self {
        Row {
            case: case.clone(),
            pass,
            seconds,
            peers,
        }
    }

    fn peer(&self, name: &str) -> Option<f64> {
        self.peers.as_ref().ok()?.get(name)?.as_f64()
    }

    fn operations(&self) -> f64 {
        self.case.operations(self.pass != "forward")
    }

    /// Operations a second.
    fn speed(&self) -> f64 {
        self.operations() / self.seconds
    }

    /// Bytes of keys and values a second, for decoding.
    fn bytes_a_second(&self) -> f64 {
        self.case.kv_bytes() / self.seconds
    }

    fn json(&self) -> Value {
        json!({
            "case": self.case.name(),
            "pass": self.pass,
            "seconds": self.seconds,
            "operations": self.operations(),
            "kv_bytes": self.case.is_decode().then(|| self.case.kv_bytes()),
            "peers": match &self.peers {
                Ok(peers) => peers.clone(),
                Err(missing) => json!({ "missing": missing }),
            },
        })
    }
}

/// All rows, printed as they come.
pub struct Report {
    device: DeviceInfo,
    hello: Value,
    peak: Option<f64>,
    bandwidth: f64,
    rows: Vec<Row>,
}

impl Report {
    pub fn new(device: DeviceInfo, hello: Value, peak: Option<f64>, bandwidth: f64) -> Self {
        let report = Report {
            device,
            hello,
            peak,
            bandwidth,
            rows: Vec::new(),
        };
        println!("{}", report.head());
        report
    }

    fn head(&self) -> String {
        let peak = self.peak.map_or("unknown".into(), |peak| {
            format!("{:.0} TFLOP/s", peak / 1e12)
        });
        format!(
            "{}, {} multiprocessors; kernels for {KERNEL_ARCHITECTURES}; peak of an 8192^3 bf16 product {peak}, copy \
             {:.2} TB/s; PyTorch {}\n\
             16 heads, 16,384 tokens; S segment, M prior, R past on a quarter of the heads; peers at equal visible \
             pairs, as times ours\n{:52} {:>9} {:>8} {:>8} {}",
            self.device.name,
            self.device.multiprocessors,
            self.bandwidth / 1e12,
            self.hello["torch"],
            "",
            "ms",
            "TFLOP/s",
            "of peak",
            NAMES.map(|name| format!("{name:>7}")).join(" "),
        )
    }

    fn line(&self, row: &Row) -> String {
        let (speed, share) = match row.case.is_decode() {
            true => (
                format!("{:.2}TB/s", row.bytes_a_second() / 1e12),
                Some(row.bytes_a_second() / self.bandwidth),
            ),
            false => (
                format!("{:.0}", row.speed() / 1e12),
                self.peak.map(|peak| row.speed() / peak),
            ),
        };
        let share = share.map_or("?".into(), |share| format!("{:.0}%", 100.0 * share));
        let peers = NAMES.map(|name| match row.peer(name) {
            Some(seconds) => format!("{:>6.2}x", seconds / row.seconds),
            None => format!("{:>7}", "-"),
        });
        format!(
            "{:52} {:9.3} {speed:>8} {share:>8} {}{}",
            format!("{} {}", row.pass, row.case.name()),
            1e3 * row.seconds,
            peers.join(" "),
            self.closed_cost(row).unwrap_or_default(),
        )
    }

    /// Where gates are 0: the time as a multiple of that without the rows behind them, if it is known.
    fn closed_cost(&self, row: &Row) -> Option<String> {
        let without = row.case.without_closed();
        let same = |other: &&Row| other.case == without && other.pass == row.pass;
        let other = self.rows.iter().find(same)?;
        (row.case != without).then(|| format!("  {:.3}x without them", row.seconds / other.seconds))
    }

    pub fn push(&mut self, row: Row) {
        println!("{}", self.line(&row));
        // A run that is cut short still shows what it has.
        let _ = std::io::stdout().flush();
        self.rows.push(row);
    }

    /// Prints the table once more, in one piece, and writes the raw results.
    pub fn finish(&self) -> Result<(), Box<dyn Error>> {
        println!("\n{}", self.head());
        self.rows
            .iter()
            .for_each(|row| println!("{}", self.line(row)));
        let folder = std::env::var_os("SEGATTN_BENCH_RUNS").map(PathBuf::from);
        let folder = folder.unwrap_or(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/runs").into());
        std::fs::create_dir_all(&folder)?;
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let gpu = self.device.name.to_lowercase().replace(' ', "-");
        let path = folder.join(format!("{}-attention-{gpu}.json", date(seconds / 86_400)));
        let raw = json!({
            "date": date(seconds / 86_400),
            "gpu": self.device.name,
            "kernels": KERNEL_ARCHITECTURES,
            "peers": self.hello,
            "copy_bytes_a_second": self.bandwidth,
            "rows": self.rows.iter().map(Row::json).collect::<Vec<_>>(),
        });
        std::fs::write(&path, serde_json::to_string_pretty(&raw)? + "\n")?;
        println!("raw results: {}", path.display());
        Ok(())
    }
}
