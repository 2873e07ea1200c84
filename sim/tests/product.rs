//! The fragment layouts of ldmatrix and mma.sync, on one exact product.

use std::path::PathBuf;

use segattn_sim::{Checks, Gpu, Module, Source};

#[repr(C)]
#[derive(Clone, Copy)]
struct Product {
    a: *const u16,
    b: *const u16,
    out: *mut f32,
}

#[test]
fn ldmatrix_and_mma_multiply_by_the_fragment_layouts() {
    let bf16 = |i: usize| half::bf16::from_f32(((i * 37) % 19) as f32 - 9.0);
    let a: Vec<half::bf16> = (0..256).map(bf16).collect();
    let b: Vec<half::bf16> = (0..128).map(|i| bf16(i + 3)).collect();
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("kernels/product.cu");
    let module = Module::compile(&Source::new(path)).expect("compiles");
    let mut gpu = Gpu::new(5, Checks::All);
    let (ga, gb) = (
        gpu.input("a", &a).expect("memory"),
        gpu.input("b", &b).expect("memory"),
    );
    let out = gpu.alloc("out", 128 * 4).expect("memory");
    let params = Product {
        a: ga.ptr(),
        b: gb.ptr(),
        out: out.ptr(),
    };
    let kernel = module.kernel("product").expect("kernel");
    let stats = gpu
        .launch(&kernel, [1, 1, 1], [32, 1, 1], 1024, &params)
        .unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(stats.products, 1);
    for (i, got) in gpu.download::<f32>(out).into_iter().enumerate() {
        let exact: f32 = (0..16)
            .map(|k| a[i / 8 * 16 + k].to_f32() * b[k * 8 + i % 8].to_f32())
            .sum();
        assert_eq!(got, exact, "element {i}");
    }
    assert!(gpu.unwritten(out).is_empty());
}
