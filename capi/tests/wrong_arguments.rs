//! Wrong arguments through the C interface: a status and a text that names the argument, and nothing written.

use std::ffi::CStr;
use std::ptr;

use segattn_c::*;

const ROWS: usize = 3;
const HEAD_DIM: usize = 8;
const ELEMENTS: usize = ROWS * HEAD_DIM;

fn last() -> String {
    // SAFETY: the library's text, which stays until the next failure.
    let text = unsafe { CStr::from_ptr(segattn_last_error()) };
    text.to_str().expect("UTF-8").to_owned()
}

fn nothing() -> Tensor {
    Tensor {
        data: ptr::null_mut(),
        shape: [0; 4],
        strides: [0; 3],
        offsets: ptr::null(),
    }
}

fn tensor(data: &[f32]) -> Tensor {
    Tensor {
        data: data.as_ptr().cast_mut().cast(),
        shape: [1, ROWS, 1, HEAD_DIM],
        strides: [ELEMENTS, HEAD_DIM, HEAD_DIM],
        offsets: ptr::null(),
    }
}

fn default() -> Lengths {
    Lengths {
        values: ptr::null(),
        flags: 0,
    }
}

/// One head of one batch element: three queries and keys, and memory for every result.
struct Call {
    q: Vec<f32>,
    kv: Vec<f32>,
    results: [Vec<f32>; 6],
}

impl Call {
    fn new() -> Self {
        let numbers = |seed: usize| {
            (0..ELEMENTS)
                .map(|i| ((i * 7 + seed) % 11) as f32 / 11.0)
                .collect()
        };
        Call {
            q: numbers(1),
            kv: numbers(2),
            results: std::array::from_fn(|_| vec![-7.0; ELEMENTS]),
        }
    }

    fn problem(&self) -> Problem {
        let (q, kv) = (tensor(&self.q), tensor(&self.kv));
        Problem {
            dtype: Dtype::F32 as i32,
            q,
            k: kv,
            v: kv,
            prior_k: nothing(),
            prior_v: nothing(),
            past_k: nothing(),
            past_v: nothing(),
            prior_heads: ptr::null(),
            past_gate: ptr::null(),
            reads_past: ptr::null(),
            segment_len: default(),
            prior_len: default(),
            past_len: default(),
            sink_len: default(),
            query_start: default(),
            scale: ptr::null(),
        }
    }

    fn forward(&mut self) -> Forward {
        let [out, lse, ..] = &mut self.results;
        Forward {
            out: tensor(out),
            lse: lse.as_mut_ptr(),
        }
    }

    fn backward(&mut self) -> Backward {
        let q = tensor(&self.q);
        let [out, lse, d_q, d_k, d_v, d_past_gate] = &mut self.results;
        Backward {
            out: tensor(out),
            lse: lse.as_ptr(),
            d_out: q,
            d_lse: ptr::null(),
            d_q: tensor(d_q),
            d_k: tensor(d_k),
            d_v: tensor(d_v),
            d_prior_k: nothing(),
            d_prior_v: nothing(),
            d_past_gate: d_past_gate.as_mut_ptr(),
        }
    }
}

/// Makes a forward call with something changed; expects a status and a text, and that nothing was written.
#[track_caller]
fn refused(change: impl FnOnce(&mut Problem, &mut Forward), status: Status, text: &str) {
    let mut call = Call::new();
    let (mut problem, mut forward) = (call.problem(), call.forward());
    change(&mut problem, &mut forward);
    // SAFETY: the structs describe the call's memory, or something that is refused before it is read.
    let got = unsafe { segattn_cpu_forward(&problem, &forward) };
    assert_eq!((got, last().as_str()), (status, text));
    assert!(call.results.iter().flatten().all(|&x| x == -7.0));
}

#[test]
fn calls_with_right_arguments_pass() {
    let mut call = Call::new();
    let (problem, forward) = (call.problem(), call.forward());
    // SAFETY: the structs describe the call's memory.
    assert_eq!(
        unsafe { segattn_cpu_forward(&problem, &forward) },
        Status::Ok
    );
    // Row 0 sees one key: the value itself.
    assert_eq!(call.results[0][..HEAD_DIM], call.kv[..HEAD_DIM]);
    let (problem, backward) = (call.problem(), call.backward());
    // SAFETY: as above.
    assert_eq!(
        unsafe { segattn_cpu_backward(&problem, &backward) },
        Status::Ok
    );
    assert!(call.results[2][..HEAD_DIM].iter().all(|x| x.abs() < 1e-6));
    assert!(call.results[4].iter().all(|&x| x != -7.0));
}

#[test]
fn null_is_refused_by_name() {
    let null = "expected an address, got NULL";
    refused(
        |_, forward| forward.lse = ptr::null_mut(),
        Status::Null,
        &format!("lse: {null}"),
    );
    refused(
        |_, forward| forward.out.data = ptr::null_mut(),
        Status::Null,
        &format!("out: {null}"),
    );
    refused(
        |problem, _| problem.q.data = ptr::null_mut(),
        Status::Null,
        &format!("q: {null}"),
    );
    refused(
        |problem, _| problem.prior_v = problem.v,
        Status::Null,
        "prior_k: expected a tensor, as the other one of the source is there, got NULL",
    );
    refused(
        |problem, _| problem.past_k = problem.k,
        Status::Null,
        "past_v: expected a tensor, as the other one of the source is there, got NULL",
    );
    // SAFETY: NULL.
    unsafe {
        assert_eq!(segattn_cpu_forward(ptr::null(), ptr::null()), Status::Null);
        assert_eq!(
            last(),
            "problem: expected the address of a struct, got NULL"
        );
        assert_eq!(segattn_device_open(0, ptr::null_mut()), Status::Null);
        let mut bytes = 0;
        assert_eq!(
            segattn_plan_workspace_bytes(ptr::null(), &mut bytes),
            Status::Null
        );
        let run = segattn_plan_run(ptr::null(), ptr::null_mut(), ptr::null_mut(), 0);
        assert_eq!(
            (run, last().as_str()),
            (
                Status::Null,
                "plan: expected the address of a struct, got NULL"
            )
        );
        segattn_plan_free(ptr::null_mut());
        segattn_device_close(ptr::null_mut());
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    refused(
        |problem, _| (problem.v.shape[2], problem.v.strides[2]) = (2, 0),
        Status::Argument,
        "v: expected 1 heads, got 2",
    );
    refused(
        |problem, forward| {
            for tensor in [
                &mut problem.q,
                &mut problem.k,
                &mut problem.v,
                &mut forward.out,
            ] {
                tensor.shape[3] = 4;
            }
        },
        Status::Unsupported,
        "head_dim: supported are multiples of 8 up to 256, got 4",
    );
    refused(
        |problem, _| problem.k.shape[1] = usize::MAX,
        Status::Argument,
        &format!(
            "k: expected at most {} bytes from the first to the last element, got more than 64 bits can count",
            isize::MAX
        ),
    );
    refused(
        |problem, _| problem.q.shape[2] = usize::MAX / 64,
        Status::Argument,
        &format!(
            "prior_heads: expected at most 1048576 heads, got {}",
            usize::MAX / 64
        ),
    );
    let len = [4];
    refused(
        |problem, _| problem.segment_len.values = len.as_ptr(),
        Status::Argument,
        "segment_len[0]: expected 0 to 3 rows, got 4",
    );
    refused(
        |problem, _| {
            problem.segment_len = Lengths {
                values: len.as_ptr(),
                flags: PER_HEAD,
            }
        },
        Status::Argument,
        "segment_len: expected flags SEGATTN_ON_DEVICE or 0, got 1",
    );
    refused(
        |problem, _| {
            problem.segment_len = Lengths {
                values: len.as_ptr(),
                flags: ON_DEVICE,
            }
        },
        Status::Unsupported,
        "segment_len: supported are host values on the CPU, got a device address",
    );
    refused(
        |problem, _| problem.past_len.flags = 8,
        Status::Argument,
        "past_len: expected flags SEGATTN_PER_HEAD, SEGATTN_ON_DEVICE or their sum, got 8",
    );
    let scale = f32::NAN;
    refused(
        |problem, _| problem.scale = &scale,
        Status::Argument,
        "scale[0]: expected a finite number, got NaN",
    );
}

#[test]
fn dtypes_and_addresses_that_do_not_fit_are_refused() {
    refused(
        |problem, _| problem.dtype = Dtype::Bf16 as i32,
        Status::Unsupported,
        "dtype: supported are SEGATTN_DTYPE_F32 on the CPU, got 1",
    );
    let odd = 0x1001 as *mut f32;
    refused(
        |_, forward| forward.lse = odd,
        Status::Alignment,
        "lse: expected an address that is a multiple of 4 bytes, got 0x1001",
    );
    refused(
        |problem, _| problem.k.data = odd.cast(),
        Status::Alignment,
        "k: expected an address that is a multiple of 4 bytes, got 0x1001",
    );
    refused(
        |problem, _| problem.k.offsets = odd.cast(),
        Status::Alignment,
        "k: expected an address that is a multiple of 8 bytes, got 0x1001",
    );
}

#[test]
fn results_apart_from_all_else_are_demanded() {
    let mut call = Call::new();
    let (problem, mut backward) = (call.problem(), call.backward());
    backward.d_v = backward.d_k;
    // SAFETY: the structs describe the call's memory.
    assert_eq!(
        unsafe { segattn_cpu_backward(&problem, &backward) },
        Status::Argument
    );
    assert!(
        last().starts_with("d_v: expected memory apart from that of d_k, got addresses 0x"),
        "{}",
        last()
    );
    let (problem, mut forward) = (call.problem(), call.forward());
    forward.out = problem.q;
    // SAFETY: as above.
    assert_eq!(
        unsafe { segattn_cpu_forward(&problem, &forward) },
        Status::Argument
    );
    assert!(
        last().starts_with("out: expected memory apart from that of q, got"),
        "{}",
        last()
    );
}

#[test]
fn each_thread_has_its_own_last_error() {
    // SAFETY: NULL.
    unsafe { segattn_cpu_forward(ptr::null(), ptr::null()) };
    assert!(!last().is_empty());
    std::thread::spawn(|| assert_eq!(last(), ""))
        .join()
        .expect("the thread");
}
