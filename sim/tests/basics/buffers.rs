//! Buffers of the simulated GPU: freed memory is nobody's, and a GPU may move between threads.

use segattn_sim::Kernel;

use super::*;

/// out[i] = input[i + 1], the last in[0], of 32 numbers.
fn rotate() -> Kernel {
    correct().kernel("rotate_block").expect("kernel")
}

fn launch(gpu: &mut Gpu, input: Buffer, out: Buffer) -> Result<Stats, SimError> {
    let params = Arrays {
        input: input.ptr(),
        out: out.ptr(),
        counter: std::ptr::null_mut(),
        offset: 0,
    };
    gpu.launch(&rotate(), [1; 3], [32, 1, 1], 2048, &params)
}

#[test]
fn a_kernel_that_touches_a_freed_buffer_is_reported_with_its_name() {
    let mut gpu = Gpu::new(1, Checks::All);
    let input = gpu.input("input", &[7i32; 32]).expect("memory");
    let out = gpu.alloc("out", 128).expect("memory");
    gpu.free(input);
    let error = launch(&mut gpu, input, out).expect_err("freed");
    assert_eq!(error.reports()[0].kind, Kind::OutOfBounds, "{error}");
    assert!(
        error.to_string().contains("of input, which was freed"),
        "{error}"
    );
}

#[test]
fn a_buffer_in_the_place_of_a_freed_one_is_poisoned_again() {
    let mut gpu = Gpu::new(1, Checks::All);
    let old = gpu.input("old", &[7i32; 32]).expect("memory");
    gpu.free(old);
    let new = gpu.alloc("new", 128).expect("memory");
    let out = gpu.alloc("out", 128).expect("memory");
    assert_ne!(old, new);
    let error = launch(&mut gpu, new, out).expect_err("never written");
    assert_eq!(error.reports()[0].kind, Kind::Uninitialized, "{error}");
}

#[test]
#[should_panic(expected = "was freed")]
fn a_freed_handle_is_refused() {
    let mut gpu = Gpu::new(1, Checks::All);
    let buffer = gpu.input("input", &[7i32; 32]).expect("memory");
    gpu.free(buffer);
    gpu.alloc("another", 128).expect("memory");
    gpu.download::<i32>(buffer);
}

#[test]
fn launches_follow_the_gpu_to_another_thread() {
    let mut gpu = Gpu::new(1, Checks::All);
    let values: Vec<i32> = (0..32).collect();
    let input = gpu.input("input", &values).expect("memory");
    let out = gpu.alloc("out", 128).expect("memory");
    let moved = std::thread::spawn(move || {
        launch(&mut gpu, input, out).unwrap_or_else(|error| panic!("{error}"));
        gpu
    });
    let mut gpu = moved.join().expect("no panic");
    let expected: Vec<i32> = (0..32).map(|i| (i + 1) % 32).collect();
    assert_eq!(gpu.download::<i32>(out), expected);
}
