//! With feature `cuda`: the image of each `kernels/*.cu` as `OUT_DIR/<name>.fatbin`, prebuilt or compiled by nvcc (the
//! crate `segattn-kernels`, folder `prebuilt/`). Without it: nothing.

fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    kernels()?;
    Ok(())
}

#[cfg(feature = "cuda")]
fn kernels() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    use segattn_kernels::{images, names, provide};
    use std::path::{Path, PathBuf};
    use std::{env, fs};

    for name in [
        "NVCC",
        "CUDA_HOME",
        "PATH",
        "SEGATTN_CUDA_ARCHS",
        "SEGATTN_KERNELS",
        "DOCS_RS",
    ] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let kernels = Path::new("kernels");
    println!("cargo:rerun-if-changed=kernels");
    println!("cargo:rerun-if-changed={}", images().display());
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    // For error messages and `doctor`: what the kernels were compiled for, by which CUDA (13.0 is 13000), and where.
    let export = |archs: &str, version: u32, origin: &str| {
        println!("cargo:rustc-env=SEGATTN_KERNEL_ARCHS={archs}");
        println!("cargo:rustc-env=SEGATTN_NVCC_VERSION={version}");
        println!("cargo:rustc-env=SEGATTN_KERNEL_ORIGIN={origin}");
    };
    if env::var_os("DOCS_RS").is_some() {
        export("none", 0, "missing");
        // Documentation needs the files to be there, not what is in them.
        for name in names(kernels)? {
            fs::write(out.join(format!("{name}.fatbin")), [])?;
        }
        return Ok(());
    }
    let provided = provide(kernels, &out)?;
    let origin = match provided.compiled.as_slice() {
        [] => "prebuilt".to_owned(),
        compiled => format!("compiled by the build: {}", compiled.join(", ")),
    };
    export(&provided.architectures, provided.toolkit, &origin);
    Ok(())
}
