//! The images of this crate: every kernel file and architecture is there, within the size of a crate; and when an image
//! counts as one of other sources.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use segattn_kernels::{Made, images, names, sources};

/// What a crate may have, with room for its other files.
const MOST_BYTES: u64 = 9 << 20;

fn kernels() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels")
}

/// What a fat binary holds, such as "sm_90" and "PTX 80". A header of 16 bytes with a magic number is followed by
/// entries; each has a header with its kind, the sizes of both, and an architecture.
fn contents(image: &[u8]) -> BTreeSet<String> {
    let number = |at: usize, bytes: usize| {
        let bytes = image[at..at + bytes].iter().rev();
        bytes.fold(0, |number, &byte| number << 8 | usize::from(byte))
    };
    assert_eq!(number(0, 4), 0xBA55_ED50, "no fat binary");
    let (mut at, end) = (number(6, 2), number(6, 2) + number(8, 8));
    assert_eq!(end, image.len());
    let mut found = BTreeSet::new();
    while at < end {
        let (kind, header, data) = (number(at, 2), number(at + 4, 4), number(at + 8, 8));
        let architecture = number(at + 28, 4);
        assert!(data > 1000, "an entry of {data} bytes for {architecture}");
        found.insert(match kind {
            1 => format!("PTX {architecture}"),
            _ => format!("sm_{architecture}"),
        });
        at += header + data;
    }
    found
}

#[test]
fn every_kernel_is_there_for_every_architecture() {
    let made = Made::read(&images()).expect("made.txt");
    let all: BTreeSet<String> = made.architectures.split(", ").map(str::to_owned).collect();
    assert_eq!(all.len(), 7, "{all:?}");
    let mut bytes = 0;
    for name in made.images.keys() {
        let image = fs::read(images().join(format!("{name}.fatbin"))).expect("an image");
        bytes += image.len() as u64;
        let expected = match name.ends_with("_hopper") {
            true => BTreeSet::from(["sm_90".to_owned()]),
            false => all.clone(),
        };
        assert_eq!(contents(&image), expected, "{name}");
    }
    assert!(bytes < MOST_BYTES, "{bytes} bytes");
    let expected: BTreeSet<String> = names(&kernels()).expect("kernels").into_iter().collect();
    let files = fs::read_dir(images()).expect("images");
    let files = files.map(|entry| entry.expect("an entry").path());
    let is_image = |path: &PathBuf| path.extension().is_some_and(|ending| ending == "fatbin");
    let stem = |path: PathBuf| {
        path.file_stem()
            .expect("a name")
            .to_str()
            .expect("UTF-8")
            .to_owned()
    };
    let files: BTreeSet<String> = files.filter(is_image).map(stem).collect();
    assert!(made.images.keys().eq(&files), "{files:?}");
    // A kernel file that is new is compiled by the build until the images are made anew.
    assert!(files.is_subset(&expected), "{files:?}");
}

#[test]
fn an_image_depends_on_what_its_file_includes() {
    let folder = tempfile::tempdir().expect("a folder");
    let write =
        |name: &str, text: &str| fs::write(folder.path().join(name), text).expect("written");
    let hashes = || ["a", "b"].map(|name| sources(folder.path(), name).expect("a hash"));
    write("a.cu", "#include \"far.cuh\"\n#include <stdint.h>\n");
    write(
        "b.cu",
        "  #include \"near.cuh\"\n#include \"not_there.h\"\n",
    );
    write("far.cuh", "#include \"near.cuh\"\n");
    write("near.cuh", "#include \"far.cuh\"\n");
    let first = hashes();
    assert_ne!(first[0], first[1]);
    write("other.cuh", "1");
    write("near.cuh", "#include \"far.cuh\"\r\n");
    assert_eq!(hashes(), first);
    write("near.cuh", "");
    let second = hashes();
    assert!(second[0] != first[0] && second[1] != first[1]);
    write("far.cuh", "");
    assert!(hashes()[0] != second[0] && hashes()[1] == second[1]);
}

#[test]
fn what_images_are_is_read_as_it_was_written() {
    let folder = tempfile::tempdir().expect("a folder");
    let made = Made::read(&images()).expect("made.txt");
    made.write(folder.path()).expect("written");
    assert_eq!(Made::read(folder.path()).expect("read"), made);
    fs::write(folder.path().join("made.txt"), "sm_80\nnorm 13.0.88\n").expect("written");
    let error = Made::read(folder.path()).expect_err("no hash").to_string();
    assert!(
        error.ends_with("expected NAME NVCC HASH, got \"norm 13.0.88\""),
        "{error}"
    );
}
