//! Compiles kernels with g++ into shared objects, kept by content, and loads them.

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::ffi::{CString, c_void};
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::machine::calls;
use crate::machine::stack::{CONTEXT_BYTES, STACK_BYTES};
use crate::memory::image::image_base;

/// The functions and hooks linked into every kernel.
const BRIDGE: &str = include_str!("bridge.c");

/// Why a kernel could not be compiled or loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompileError {
    /// The compiler could not be run.
    #[error("running {program}: {source}")]
    Run {
        /// The program.
        program: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file could not be read or written.
    #[error("{path}: {source}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The compiler refused the kernel.
    #[error("{program} refused {path}:\n{message}", path = path.display())]
    Refused {
        /// The program.
        program: &'static str,
        /// The kernel's source.
        path: PathBuf,
        /// Its messages.
        message: String,
    },
    /// The compiled kernel could not be loaded.
    #[error("loading {path}: {message}", path = path.display())]
    Load {
        /// The shared object.
        path: PathBuf,
        /// What the loader said.
        message: String,
    },
    /// The module has no kernel of that name.
    #[error("no kernel {name} in {path}", path = path.display())]
    NoKernel {
        /// The name asked for.
        name: String,
        /// The shared object.
        path: PathBuf,
    },
}

/// A kernel source and how to compile it.
#[derive(Clone, Debug)]
pub struct Source {
    path: PathBuf,
    text: Option<String>,
    flags: Vec<String>,
    checked: bool,
    optimization: u8,
}

impl Source {
    /// The `.cu` file at `path`, compiled with a hook at every load and store.
    pub fn new(path: impl Into<PathBuf>) -> Source {
        Source {
            path: path.into(),
            text: None,
            flags: Vec::new(),
            checked: true,
            optimization: 2,
        }
    }

    /// Without hooks: fast, and blind to memory.
    pub fn plain(mut self) -> Source {
        self.checked = false;
        self
    }

    /// With this text in place of the file's; `#include` and reports still refer to the file.
    pub fn with_text(mut self, text: impl Into<String>) -> Source {
        self.text = Some(text.into());
        self
    }

    /// Defines a preprocessor symbol.
    pub fn define(mut self, name: &str, value: &str) -> Source {
        self.flags.push(format!("-D{name}={value}"));
        self
    }

    /// Adds a directory to search for headers, before those added earlier and before the kernel's own.
    pub fn include(mut self, directory: &Path) -> Source {
        self.flags.insert(0, format!("-I{}", directory.display()));
        self
    }

    /// Compiles without loading; at once if the same text was compiled before. Where the shared object is.
    ///
    /// # Errors
    /// As for [`Module::compile`].
    pub fn object(&self) -> Result<PathBuf, CompileError> {
        /// What this process has built, by [`Source::stamp`]: the preprocessor takes as long as a small launch.
        static BUILT: Mutex<BTreeMap<u64, PathBuf>> = Mutex::new(BTreeMap::new());
        let built = || BUILT.lock().unwrap_or_else(PoisonError::into_inner);
        let stamp = self.stamp();
        if let Some(path) = built().get(&stamp).filter(|path| path.exists()) {
            return Ok(path.clone());
        }
        let path = build(self)?;
        built().insert(stamp, path.clone());
        Ok(path)
    }

    /// Identifies the source with the files as they are now that it may include.
    fn stamp(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        let Source {
            path,
            text,
            flags,
            checked,
            optimization,
        } = self;
        (path, text, flags, checked, optimization).hash(&mut hasher);
        let named = flags.iter().filter_map(|flag| flag.strip_prefix("-I"));
        let folders = named.map(Path::new).chain(path.parent());
        for file in folders
            .filter_map(|folder| std::fs::read_dir(folder).ok())
            .flatten()
            .flatten()
        {
            let state = file
                .metadata()
                .ok()
                .map(|data| (data.len(), data.modified().ok()));
            (file.path(), state).hash(&mut hasher);
        }
        hasher.finish()
    }

    /// The optimisation level, 0 to 3; 2 unless told.
    pub fn optimization(mut self, level: u8) -> Source {
        self.optimization = level;
        self
    }
}

/// A compiled kernel file, loaded.
#[derive(Debug)]
pub struct Module {
    path: PathBuf,
    handle: *mut c_void,
    base: usize,
}

// SAFETY: the loaded object is never unloaded, and its only mutable data, the table of calls, is set before the
// module is shared and always to the same values.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

/// An entry point of a module.
#[derive(Clone, Debug)]
pub struct Kernel {
    pub(crate) name: String,
    pub(crate) function: *const c_void,
    pub(crate) module: Arc<Module>,
}

// SAFETY: the function is code of a module that is never unloaded.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

impl Module {
    /// Compiles and loads a source; at once if the same text was compiled before.
    ///
    /// # Errors
    /// If g++ is missing or refuses the source, or a file cannot be written.
    pub fn compile(source: &Source) -> Result<Arc<Module>, CompileError> {
        load(source.object()?).map(Arc::new)
    }

    /// The kernel `name`, an `extern "C"` function.
    ///
    /// # Errors
    /// If there is none.
    pub fn kernel(self: &Arc<Self>, name: &str) -> Result<Kernel, CompileError> {
        match symbol(self.handle, name) {
            Some(function) => Ok(Kernel {
                name: name.to_string(),
                function,
                module: self.clone(),
            }),
            None => Err(CompileError::NoKernel {
                name: name.to_string(),
                path: self.path.clone(),
            }),
        }
    }

    /// A constant of the module, an `extern "C"` variable of type `T`: what a kernel needs for its launch.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn constant<T: bytemuck::AnyBitPattern>(&self, name: &str) -> Result<T, CompileError> {
        match symbol(self.handle, name) {
            // SAFETY: the variable has at least the size of T, the caller's word, and any bits are a T.
            Some(address) => Ok(unsafe { address.cast::<T>().read_unaligned() }),
            None => Err(CompileError::NoKernel {
                name: name.to_string(),
                path: self.path.clone(),
            }),
        }
    }

    /// The shared object.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn base(&self) -> usize {
        self.base
    }
}

/// Where compiled kernels are kept: beside the program that is running.
fn cache() -> Result<PathBuf, CompileError> {
    let program = std::env::current_exe().unwrap_or_default();
    let mut directory = program.parent().map(Path::to_path_buf).unwrap_or_default();
    if directory.ends_with("deps") || directory.ends_with("examples") {
        directory.pop();
    }
    let path = directory.join("simulated-kernels");
    std::fs::create_dir_all(&path).map_err(|source| CompileError::File {
        path: path.clone(),
        source,
    })?;
    Ok(path)
}

fn write(path: &Path, text: &str) -> Result<(), CompileError> {
    std::fs::write(path, text).map_err(|source| CompileError::File {
        path: path.into(),
        source,
    })
}

/// Compiles to a shared object named by the hash of everything that goes into it.
fn build(source: &Source) -> Result<PathBuf, CompileError> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let directory = cache()?;
    let unique = format!(
        "{}-{}",
        std::process::id(),
        COUNTER.fetch_add(1, Ordering::Relaxed)
    );
    let work = directory.join(format!("work-{unique}"));
    std::fs::create_dir_all(&work).map_err(|e| CompileError::File {
        path: work.clone(),
        source: e,
    })?;
    let built = build_in(source, &directory, &work);
    let _ = std::fs::remove_dir_all(&work);
    built
}

fn build_in(source: &Source, directory: &Path, work: &Path) -> Result<PathBuf, CompileError> {
    let read = std::fs::read_to_string(&source.path);
    let text = match &source.text {
        Some(text) => text.clone(),
        None => read.map_err(|e| CompileError::File {
            path: source.path.clone(),
            source: e,
        })?,
    };
    let unit = work.join(source.path.file_name().unwrap_or_default());
    write(&unit, &text)?;
    let own = source
        .path
        .parent()
        .map(Path::to_path_buf)
        .unwrap_or_default();
    let mut flags = source.flags.clone();
    flags.push(concat!("-I", env!("CARGO_MANIFEST_DIR"), "/include").to_string());
    flags.push(format!("-O{}", source.optimization));
    flags.extend(FLAGS.iter().map(ToString::to_string));
    flags.extend(instruction_sets().iter().map(ToString::to_string));
    if source.checked {
        flags.push("-fsanitize=thread".into());
    }
    // Includes of the file's own folder come last; where that folder lies makes no other object.
    let own_folder = format!("-I{}", own.display());
    let expanded = run(
        "g++",
        source,
        Command::new("g++")
            .args(&flags)
            .arg(&own_folder)
            .arg("-E")
            .arg(&unit),
    )?;
    let expanded = String::from_utf8_lossy(&expanded.stdout)
        .replace(&*work.to_string_lossy(), "")
        .replace(&*own.to_string_lossy(), "");
    let mut hasher = DefaultHasher::new();
    (expanded, &flags, BRIDGE, STACK_BYTES, CONTEXT_BYTES).hash(&mut hasher);
    let stem = source
        .path
        .file_stem()
        .unwrap_or_default()
        .to_string_lossy();
    let target = directory.join(format!("{stem}-{:016x}.so", hasher.finish()));
    if target.exists() {
        return Ok(target);
    }
    let (object, bridge, shared) = (
        work.join("kernel.o"),
        work.join("bridge.c"),
        work.join("kernel.so"),
    );
    run(
        "g++",
        source,
        Command::new("g++")
            .args(&flags)
            .arg(&own_folder)
            .arg("-c")
            .arg(&unit)
            .arg("-o")
            .arg(&object),
    )?;
    write(&bridge, BRIDGE)?;
    let mut link = Command::new("gcc");
    link.arg(format!("-DSIM_STACK_BYTES={STACK_BYTES}"));
    link.arg(format!("-DSIM_CONTEXT_BYTES={CONTEXT_BYTES}"));
    link.args(["-O2", "-fPIC", "-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs"]);
    run(
        "gcc",
        source,
        link.arg(&bridge)
            .arg(&object)
            .arg("-lm")
            .arg("-o")
            .arg(&shared),
    )?;
    std::fs::rename(&shared, &target).map_err(|e| CompileError::File {
        path: target.clone(),
        source: e,
    })?;
    Ok(target)
}

/// Kernels keep the order of their arithmetic, pun types as CUDA allows, and have no run-time library.
/// Accesses stay as wide as the kernel wrote them, and two calls at two lines stay two. Every basic block is counted.
const FLAGS: [&str; 16] = [
    "-xc++",
    "-std=c++17",
    "-DSEGATTN_SIM",
    "-g1",
    "-fPIC",
    "-w",
    "-fno-exceptions",
    "-fno-rtti",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fno-tree-vectorize",
    "-fno-store-merging",
    "-fno-crossjumping",
    "-fno-tree-tail-merge",
    "-fno-threadsafe-statics",
    "-fsanitize-coverage=trace-pc",
];

/// What this machine's processor can do, for fused multiply-add in one instruction.
fn instruction_sets() -> &'static [&'static str] {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("fma") && is_x86_feature_detected!("avx2") {
        return &["-mfma", "-mavx2"];
    }
    &[]
}

fn run(
    program: &'static str,
    source: &Source,
    command: &mut Command,
) -> Result<Output, CompileError> {
    let output = command
        .output()
        .map_err(|source| CompileError::Run { program, source })?;
    if output.status.success() {
        return Ok(output);
    }
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(CompileError::Refused {
        program,
        path: source.path.clone(),
        message,
    })
}

/// Loads a shared object and connects its calls to the simulator.
fn load(path: PathBuf) -> Result<Module, CompileError> {
    let failed = |message: String| CompileError::Load {
        path: path.clone(),
        message,
    };
    let name =
        CString::new(path.to_string_lossy().as_bytes()).map_err(|e| failed(e.to_string()))?;
    // SAFETY: the object was compiled above from kernels and bridge.c; it runs nothing when loaded.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if handle.is_null() {
        return Err(failed("dlopen refused it".into()));
    }
    let mut base = 0;
    for call in calls::table() {
        let name = call.name.to_string_lossy();
        let pointer = symbol(handle, &name).ok_or_else(|| failed(format!("it lacks {name}")))?;
        base = image_base(pointer as usize).unwrap_or(0);
        // SAFETY: bridge.c declares the symbol as a pointer to a function of the type in calls.rs; concurrent
        // loads of one object write the same value.
        unsafe { std::sync::atomic::AtomicPtr::from_ptr(pointer.cast_mut().cast()) }
            .store(call.function.cast_mut(), Ordering::Relaxed);
    }
    Ok(Module { path, handle, base })
}

fn symbol(handle: *mut c_void, name: &str) -> Option<*const c_void> {
    let name = CString::new(name).ok()?;
    // SAFETY: a live handle and a string that ends in a zero.
    let address = unsafe { libc::dlsym(handle, name.as_ptr()) };
    (!address.is_null()).then_some(address.cast_const())
}
