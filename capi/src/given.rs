//! The caller's structs made into the crate's: what every kind of memory needs.

use segattn::attention::{Batch, Gates, Layout, Len, Lengths as Rows, PastLen, Problem};

use crate::failure::Failure;
use crate::types::{self, Lengths, ON_DEVICE, PER_HEAD, Tensor};

/// A struct of the caller's.
///
/// # Safety
/// The pointer is NULL or points to such a struct, which stays as it is for `'a`.
pub(crate) unsafe fn given<'a, T>(
    argument: &'static str,
    pointer: *const T,
) -> Result<&'a T, Failure> {
    check_alignment(argument, pointer)?;
    // SAFETY: aligned; otherwise the caller's promise.
    unsafe { pointer.as_ref() }.ok_or(Failure::Null {
        argument,
        expected: "the address of a struct",
    })
}

/// Checks the address of something that is written later.
pub(crate) fn check_place<T>(argument: &'static str, pointer: *mut T) -> Result<(), Failure> {
    check_array(argument, pointer.cast_const(), Some(1)).map(|_| ())
}

/// An array of the caller's. Nothing is read here.
///
/// # Safety
/// The pointer is NULL or points to `len` elements, which stay as they are for `'a`.
pub(crate) unsafe fn array<'a, T>(
    argument: &'static str,
    pointer: *const T,
    len: Option<usize>,
) -> Result<&'a [T], Failure> {
    let len = check_array(argument, pointer, len)?;
    if len == 0 {
        return Ok(&[]);
    }
    // SAFETY: not NULL, aligned, of a size that memory can have; otherwise the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts(pointer, len) })
}

/// Checks the address and the number of elements of an array; `None` is a number that overflowed.
pub(crate) fn check_array<T>(
    argument: &'static str,
    pointer: *const T,
    len: Option<usize>,
) -> Result<usize, Failure> {
    check_alignment(argument, pointer)?;
    match len {
        Some(0) => Ok(0),
        Some(len) if len <= isize::MAX as usize / size_of::<T>() => match pointer.is_null() {
            false => Ok(len),
            true => Err(Failure::Null {
                argument,
                expected: "an address",
            }),
        },
        len => Err(Failure::Argument {
            argument,
            expected: format!(
                "at most {} bytes from the first to the last element",
                isize::MAX
            ),
            got: len.map_or("more than 64 bits can count".to_owned(), |len| {
                format!("{len} elements")
            }),
        }),
    }
}

pub(crate) fn check_alignment<T>(argument: &'static str, pointer: *const T) -> Result<(), Failure> {
    if pointer.is_aligned() {
        return Ok(());
    }
    Err(Failure::Alignment {
        argument,
        expected: align_of::<T>(),
        got: pointer.addr(),
    })
}

/// Elements of `lse` and of what is like it.
pub(crate) fn query_rows(problem: &types::Problem) -> Option<usize> {
    let [batch, rows, heads, _] = problem.q.shape;
    batch.checked_mul(heads)?.checked_mul(rows)
}

/// Elements of the gradient of the gates.
pub(crate) fn gates(problem: &types::Problem) -> Option<usize> {
    let [batch, _, heads, _] = problem.q.shape;
    batch.checked_mul(heads)
}

/// Where the rows of a tensor are.
///
/// # Safety
/// As [`array`], for `offsets`.
pub(crate) unsafe fn layout<'a>(
    argument: &'static str,
    tensor: &Tensor,
) -> Result<Layout<'a>, Failure> {
    let layout = Layout::strided(tensor.shape, tensor.strides);
    if tensor.offsets.is_null() {
        return Ok(layout);
    }
    // SAFETY: the caller's promise.
    let offsets = unsafe { array(argument, tensor.offsets, Some(tensor.shape[0])) }?;
    Ok(Layout {
        batch: Batch::Offsets(offsets),
        ..layout
    })
}

/// Which heads read what, as the crate's types need it.
pub(crate) struct Roles<'a> {
    prior_heads: Vec<bool>,
    ones: Vec<f32>,
    reads_past: Vec<bool>,
    past_gate: Option<&'a [f32]>,
}

impl<'a> Roles<'a> {
    /// # Safety
    /// As [`array`], for every array of heads in host memory.
    pub(crate) unsafe fn new(problem: &types::Problem) -> Result<Self, Failure> {
        let heads = problem.q.shape[2];
        // SAFETY: the caller's promise, in each of the calls.
        let flags = |argument, pointer: *const u8, default| match pointer.is_null() {
            true => array_of(argument, default, heads),
            false => unsafe { array(argument, pointer, Some(heads)) }
                .map(|flags| flags.iter().map(|&flag| flag != 0).collect()),
        };
        let on_host = !problem.past_gate.is_null() && problem.reads_past.is_null();
        Ok(Roles {
            prior_heads: flags("prior_heads", problem.prior_heads, true)?,
            ones: array_of("q_heads", 1.0, heads)?,
            reads_past: flags("reads_past", problem.reads_past, true)?,
            past_gate: match on_host {
                // SAFETY: the caller's promise.
                true => Some(unsafe { array("past_gate", problem.past_gate, Some(heads)) }?),
                false => None,
            },
        })
    }
}

/// One value for each head, of which there may not be absurdly many.
fn array_of<T: Clone>(argument: &'static str, value: T, heads: usize) -> Result<Vec<T>, Failure> {
    const MOST: usize = 1 << 20;
    match heads {
        0..=MOST => Ok(vec![value; heads]),
        heads => Err(Failure::Argument {
            argument,
            expected: format!("at most {MOST} heads"),
            got: heads.to_string(),
        }),
    }
}

/// The problem, on tensors that `make` makes of the caller's.
///
/// # Safety
/// As [`array`], for every array in host memory.
pub(crate) unsafe fn problem<'a, X>(
    given: &'a types::Problem,
    roles: &'a Roles<'a>,
    mut make: impl FnMut(&'static str, &'a Tensor) -> Result<X, Failure>,
) -> Result<Problem<'a, X>, Failure> {
    let mut problem = Problem::causal(
        make("q", &given.q)?,
        make("k", &given.k)?,
        make("v", &given.v)?,
    );
    if is_there(["prior_k", "prior_v"], [&given.prior_k, &given.prior_v])? {
        let (k, v) = (
            make("prior_k", &given.prior_k)?,
            make("prior_v", &given.prior_v)?,
        );
        problem = problem.prior(k, v, &roles.prior_heads);
    }
    if is_there(["past_k", "past_v"], [&given.past_k, &given.past_v])? {
        let (k, v) = (
            make("past_k", &given.past_k)?,
            make("past_v", &given.past_v)?,
        );
        let gates = match (roles.past_gate, given.past_gate.is_null()) {
            (Some(gates), _) => Gates::Host(gates),
            (None, true) => Gates::Host(&roles.ones),
            (None, false) => Gates::Device {
                past_gate: given.past_gate.addr() as u64,
                reads_past: &roles.reads_past,
            },
        };
        problem = problem.past(k, v, gates);
    }
    // SAFETY: the caller's promise.
    let scale = unsafe {
        array(
            "scale",
            given.scale,
            Some(usize::from(!given.scale.is_null())),
        )
    }?;
    // SAFETY: as above.
    let lengths = unsafe { lengths(given) }?;
    Ok(problem.lengths(lengths).scale(scale.first().copied()))
}

/// Whether a source is there; keys come with values.
pub(crate) fn is_there(names: [&'static str; 2], tensors: [&Tensor; 2]) -> Result<bool, Failure> {
    match tensors.map(Tensor::is_absent) {
        [false, false] => Ok(true),
        [true, true] => Ok(false),
        [k_is_absent, _] => Err(Failure::Null {
            argument: names[usize::from(!k_is_absent)],
            expected: "a tensor, as the other one of the source is there",
        }),
    }
}

/// # Safety
/// As [`array`], for every array in host memory.
unsafe fn lengths<'a>(given: &types::Problem) -> Result<Rows<'a>, Failure> {
    let (batch, kv_heads) = (given.q.shape[0], given.k.shape[2]);
    // SAFETY: the caller's promise.
    let of = |argument, lengths: &Lengths| unsafe { rows(argument, lengths, [batch, kv_heads]) };
    let per_batch = |argument, lengths: &Lengths| match of(argument, lengths)? {
        Some(PastLen::PerHead(_)) => Err(flags(argument, "SEGATTN_ON_DEVICE or 0", lengths)),
        Some(PastLen::PerBatch(len)) => Ok(Some(len)),
        None => Ok(None),
    };
    Ok(Rows {
        segment_len: per_batch("segment_len", &given.segment_len)?,
        prior_len: per_batch("prior_len", &given.prior_len)?,
        past_len: of("past_len", &given.past_len)?,
        sink_len: of("sink_len", &given.sink_len)?,
        query_start: per_batch("query_start", &given.query_start)?,
    })
}

fn flags(argument: &'static str, expected: &str, lengths: &Lengths) -> Failure {
    Failure::Argument {
        argument,
        expected: format!("flags {expected}"),
        got: lengths.flags.to_string(),
    }
}

/// # Safety
/// As [`array`], for an array in host memory.
unsafe fn rows<'a>(
    argument: &'static str,
    lengths: &Lengths,
    [batch, kv_heads]: [usize; 2],
) -> Result<Option<PastLen<'a>>, Failure> {
    if lengths.flags & !(PER_HEAD | ON_DEVICE) != 0 {
        return Err(flags(
            argument,
            "SEGATTN_PER_HEAD, SEGATTN_ON_DEVICE or their sum",
            lengths,
        ));
    }
    if lengths.values.is_null() {
        return Ok(None);
    }
    check_alignment(argument, lengths.values)?;
    let is_per_head = lengths.flags & PER_HEAD != 0;
    let len = match lengths.flags & ON_DEVICE {
        0 => {
            let count = if is_per_head {
                batch.checked_mul(kv_heads)
            } else {
                Some(batch)
            };
            // SAFETY: the caller's promise.
            Len::Host(unsafe { array(argument, lengths.values, count) }?)
        }
        _ => Len::Device(lengths.values.addr() as u64),
    };
    Ok(Some(match is_per_head {
        true => PastLen::PerHead(len),
        false => PastLen::PerBatch(len),
    }))
}
