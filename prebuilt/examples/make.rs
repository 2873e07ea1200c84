//! Makes those images in `prebuilt/images` anew whose sources have changed. Needs nvcc, and some minutes for all:
//! `cargo run -p segattn-kernels --example make`.
//!
//! With `--check` nothing is changed: all kernels are compiled, and where an image is of the present sources, every
//! byte of it is compared.

use std::fs;
use std::path::Path;
use std::time::Instant;

use segattn_kernels::{Compiler, Image, Made, Result, images, names, sources};

fn main() -> Result<()> {
    if std::env::var_os("SEGATTN_CUDA_ARCHS").is_some() {
        return Err(
            "SEGATTN_CUDA_ARCHS: expected none, as images are for all architectures".into(),
        );
    }
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels");
    let kernels = kernels.canonicalize()?;
    match std::env::args().skip(1).collect::<Vec<_>>().as_slice() {
        [] => make(&kernels),
        [option] if option == "--check" => check(&kernels),
        other => Err(format!("expected nothing or --check, got {other:?}").into()),
    }
}

/// Compiles into a folder of its own.
fn compile(
    compiler: &Compiler,
    kernels: &Path,
    names: &[String],
) -> Result<(tempfile::TempDir, String)> {
    let begin = Instant::now();
    let folder = tempfile::tempdir()?;
    let architectures = compiler.compile(kernels, names, folder.path())?;
    let seconds = begin.elapsed().as_secs();
    println!(
        "nvcc {}, {seconds} s: {}",
        compiler.version,
        names.join(", ")
    );
    Ok((folder, architectures))
}

fn make(kernels: &Path) -> Result<()> {
    let all = names(kernels)?;
    let mut made = Made::read(&images())?;
    let mut stale = Vec::new();
    for name in &all {
        if made.fitting(kernels, name)?.is_none() {
            stale.push(name.clone());
        }
    }
    let gone: Vec<String> = made
        .images
        .keys()
        .filter(|name| !all.contains(name))
        .cloned()
        .collect();
    for name in gone {
        fs::remove_file(images().join(format!("{name}.fatbin")))?;
        made.images.remove(&name);
    }
    if !stale.is_empty() {
        let compiler = Compiler::find()?;
        let (folder, architectures) = compile(&compiler, kernels, &stale)?;
        made.architectures = architectures;
        for name in stale {
            let file = format!("{name}.fatbin");
            fs::copy(folder.path().join(&file), images().join(&file))?;
            let (nvcc, sources) = (compiler.version.clone(), sources(kernels, &name)?);
            made.images.insert(name, Image { nvcc, sources });
        }
    }
    made.write(&images())?;
    let mut bytes = 0;
    for name in &all {
        bytes += fs::metadata(images().join(format!("{name}.fatbin")))?.len();
    }
    println!(
        "{} images, {bytes} bytes, {}",
        all.len(),
        made.architectures
    );
    Ok(())
}

fn check(kernels: &Path) -> Result<()> {
    let (all, made, compiler) = (names(kernels)?, Made::read(&images())?, Compiler::find()?);
    let (folder, architectures) = compile(&compiler, kernels, &all)?;
    let mut other = Vec::new();
    for name in &all {
        let file = format!("{name}.fatbin");
        match made.fitting(kernels, name)? {
            None => println!("{file}: not compared, as its sources have changed since"),
            Some(image) if image.nvcc != compiler.version => println!(
                "{file}: not compared, as nvcc {} made it, not {}",
                image.nvcc, compiler.version
            ),
            Some(_) if fs::read(folder.path().join(&file))? == fs::read(images().join(&file))? => {}
            Some(_) => other.push(file),
        }
    }
    match other.is_empty() && architectures == made.architectures {
        true => Ok(()),
        false => Err(format!(
            "expected the bytes of prebuilt/images for {}, got others: {other:?} for {architectures}",
            made.architectures
        )
        .into()),
    }
}
