//! Whole models: prefill, decoding and training, on a GPU where there is one, else on the CPU.
//!
//! ```text
//! cargo bench --bench model                  the CPU: Criterion's times, then the table
//! cargo bench --bench model -- table         the table only: a filter that no name matches
//! cargo bench --bench model --features cuda  the GPU, against PyTorch
//! ```
//!
//! Peers run in a Python child, by `$SEGATTN_PYTHON`, `$PYTHON` or `python3`; what is missing is said. On the CPU
//! `$SEGATTN_BENCH_ONLY` picks one row of `TBPTT(1)`, `full BPTT`, `12 MB`, `500 MB`, and `$SEGATTN_BENCH_OUT` names a
//! JSON file for the raw results. The GPU's options stand in `gpu/mod.rs`.

mod cpu;
#[cfg(feature = "cuda")]
#[path = "../measure/date.rs"]
mod date;
#[cfg(feature = "cuda")]
mod gpu;
#[path = "../measure/mod.rs"]
mod measure;
#[path = "../measure/python.rs"]
mod python;

fn main() {
    #[cfg(feature = "cuda")]
    match gpu::run() {
        Ok(()) => return,
        Err(gpu::Failed::NoGpu(error)) => println!("no GPU is measured, the CPU is: {error}"),
        Err(gpu::Failed::Other(error)) => {
            eprintln!("{error}");
            std::process::exit(1);
        }
    }
    cpu::run();
}
