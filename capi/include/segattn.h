// Segment attention on addresses: host memory in f32, or device memory in bf16 and f16 on a CUDA stream.
// What is computed: docs/contract.md, section 1. How to use this: capi/README.md and capi/examples/attention.c.
// Made by cbindgen from capi/src; do not edit.
// clang-format off

#ifndef SEGATTN_H
#define SEGATTN_H

#include <stddef.h>
#include <stdint.h>

// Version of the structs and functions of this header. Compare it with `segattn_abi`.
#define SEGATTN_ABI 1

// `SegattnLengths.flags`: there are `[batch, kv_heads]` numbers; of `past_len` and `sink_len` only.
#define SEGATTN_PER_HEAD 1

// `SegattnLengths.flags`: the numbers are in device memory. They are trusted: the host does not read them.
#define SEGATTN_ON_DEVICE 2

// What a call ended with. `segattn_last_error` has the text: the argument, what was expected and what came.
enum SegattnStatus
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // It is done, or on a stream: enqueued.
  SEGATTN_STATUS_OK = 0,
  // A pointer that must not be NULL is.
  SEGATTN_STATUS_NULL = 1,
  // A shape, stride, length, gate or other value does not fit. Nothing was written.
  SEGATTN_STATUS_ARGUMENT = 2,
  // An address or a stride is not aligned. Nothing was written.
  SEGATTN_STATUS_ALIGNMENT = 3,
  // Nothing computes this: an element type, a head size. Nothing was written.
  SEGATTN_STATUS_UNSUPPORTED = 4,
  // The workspace is too small or not aligned to 256 bytes. Nothing was written.
  SEGATTN_STATUS_WORKSPACE = 5,
  // There is no driver, no GPU or none of this number, or the library was built without CUDA.
  SEGATTN_STATUS_NO_GPU = 6,
  // The driver is too old for the kernels, or there is no image for the GPU.
  SEGATTN_STATUS_DRIVER = 7,
  // Too little free memory on the device.
  SEGATTN_STATUS_OUT_OF_MEMORY = 8,
  // The driver failed. The text says whether later calls can succeed.
  SEGATTN_STATUS_FAILED = 9,
  // A bug of this library, stopped at the border. What the call writes is undefined.
  SEGATTN_STATUS_PANIC = 10,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum SegattnStatus SegattnStatus;
#else
typedef int32_t SegattnStatus;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// What the elements of tensors are: the values of `SegattnProblem.dtype`.
enum SegattnDtype
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // 32-bit floats: the CPU.
  SEGATTN_DTYPE_F32 = 0,
  // bfloat16: GPUs.
  SEGATTN_DTYPE_BF16 = 1,
  // IEEE half precision: GPUs.
  SEGATTN_DTYPE_F16 = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum SegattnDtype SegattnDtype;
#else
typedef int32_t SegattnDtype;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// An opened GPU. It can be used by several threads.
typedef struct SegattnDevice SegattnDevice;

// A validated call on a GPU. It holds addresses and host values, no memory of the device. It can be used by several
// threads.
typedef struct SegattnPlan SegattnPlan;

// A tensor `[batch, rows, heads, head_dim]` whose last dimension is contiguous. Every row, valid or padding, lies in
// the caller's memory. On the GPU rows are aligned to 16 bytes: the address is a multiple of 16, the strides are
// multiples of 8 elements.
typedef struct {
  // The first element, in host memory for the CPU and in device memory for a GPU.
  void *data;
  // Batch, rows, heads, head_dim.
  size_t shape[4];
  // Elements from one batch element, row and head to the next.
  size_t strides[3];
  // `[batch]` numbers in host memory: the element at which each batch element begins, counted from `data`; NULL:
  // they are `strides[0]` apart.
  const size_t *offsets;
} SegattnTensor;

// Numbers of rows: `[batch]` numbers.
typedef struct {
  // The numbers; NULL: the default.
  const int32_t *values;
  // 0, or `SEGATTN_PER_HEAD` and `SEGATTN_ON_DEVICE`, added.
  uint32_t flags;
} SegattnLengths;

// The arguments of a call (docs/contract.md, section 1). `prior_k`, `prior_v` and `past_k`, `past_v` may be zeros:
// there is no such source. A call reads the struct and everything in host memory before it returns.
typedef struct {
  // A `SegattnDtype`.
  int32_t dtype;
  // Queries `[batch, rows, q_heads, head_dim]`.
  SegattnTensor q;
  // Keys of the segment `[batch, segment, kv_heads, head_dim]`; `q_heads` is a multiple of `kv_heads`.
  SegattnTensor k;
  // Values of the segment, like `k`.
  SegattnTensor v;
  // Keys of the tail of the segment before `[batch, prior, kv_heads, head_dim]`.
  SegattnTensor prior_k;
  // Values, like `prior_k`.
  SegattnTensor prior_v;
  // Keys retrieved from earlier segments `[batch, past, kv_heads, head_dim]`.
  SegattnTensor past_k;
  // Values, like `past_k`.
  SegattnTensor past_v;
  // `[q_heads]` in host memory: not 0 where the head reads the prior; NULL: every head does.
  const uint8_t *prior_heads;
  // `[q_heads]`, finite, at least 0: the weight of the past in each head; NULL: 1 in every head.
  const float *past_gate;
  // NULL where `past_gate` is in host memory. For gates in device memory `[q_heads]` in host memory: not 0 where the
  // gate is above 0.
  const uint8_t *reads_past;
  // Valid rows of `k` and `v`; by default all.
  SegattnLengths segment_len;
  // Valid rows of the prior; by default all.
  SegattnLengths prior_len;
  // Valid rows of the past; by default all.
  SegattnLengths past_len;
  // The first rows of the past that are sinks, which every head reads; by default 0.
  SegattnLengths sink_len;
  // The position of the first query row in the segment; by default 0.
  SegattnLengths query_start;
  // The factor on the scores, in host memory; NULL: `1 / sqrt(head_dim)`.
  const float *scale;
} SegattnProblem;

// What a forward call writes: every row, padding rows with 0 and -inf.
typedef struct {
  // Like `q`.
  SegattnTensor out;
  // `[batch, q_heads, rows]`, contiguous.
  float *lse;
} SegattnForward;

// What a backward call reads beside the problem, and what it writes: every row (`=`, not `+=`), padding rows with 0.
typedef struct {
  // What the forward call wrote.
  SegattnTensor out;
  // `[batch, q_heads, rows]`: what the forward call wrote.
  const float *lse;
  // The gradient of the loss with respect to `out`.
  SegattnTensor d_out;
  // The gradient of the loss with respect to `lse`, like it; NULL: 0.
  const float *d_lse;
  // Written; like `q`.
  SegattnTensor d_q;
  // Written; like `k`.
  SegattnTensor d_k;
  // Written; like `v`.
  SegattnTensor d_v;
  // Written; like `prior_k`. Zeros here and in `d_prior_v` leave both out.
  SegattnTensor d_prior_k;
  // Written; like `prior_v`.
  SegattnTensor d_prior_v;
  // Written; `[batch, q_heads]`: the part of each batch element in the gradient of the gates.
  float *d_past_gate;
} SegattnBackward;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The `SEGATTN_ABI` that the library was built with.
uint32_t segattn_abi(void);

// The version of the library, such as "0.1.0".
const char *segattn_version(void);

// The text of this thread's last failure: the argument, what was expected and what came; empty where nothing has
// failed. It stays valid until this thread's next failure, or its end.
const char *segattn_last_error(void);

// Computes `out` and `lse` on the CPU, in f32 (`SEGATTN_DTYPE_F32`), with all cores. `head_dim` is a multiple of 8 up
// to 256. What is written shares no memory with anything else.
//
// # Safety
// Pointers are NULL or point to what the structs say, in host memory that nobody else uses meanwhile.
SegattnStatus segattn_cpu_forward(const SegattnProblem *problem,
                                  const SegattnForward *forward);

// Computes gradients on the CPU, as `segattn_cpu_forward`. `query_start` is 0.
//
// # Safety
// As `segattn_cpu_forward`.
SegattnStatus segattn_cpu_backward(const SegattnProblem *problem, const SegattnBackward *backward);

// Opens GPU `ordinal` and makes its primary context, which CUDA's runtime uses too, the current one of the thread.
// `*device` is written on success only.
//
// # Safety
// `device` is NULL or points to a handle.
SegattnStatus segattn_device_open(int32_t ordinal,
                                  SegattnDevice **device);

// Closes a GPU; NULL does nothing. Plans stay valid.
//
// # Safety
// `device` is NULL or came from `segattn_device_open`, and is not used again.
void segattn_device_close(SegattnDevice *device);

// Plans a forward call on a GPU in bf16 or f16. The first plan of an element type and head size loads its kernels.
// `*plan` is written on success only.
//
// # Safety
// Pointers are NULL or point to what the structs say.
SegattnStatus segattn_plan_forward(const SegattnDevice *device,
                                   const SegattnProblem *problem,
                                   const SegattnForward *forward,
                                   SegattnPlan **plan);

// Plans a backward call on a GPU, as `segattn_plan_forward`. `query_start` is 0.
//
// # Safety
// As `segattn_plan_forward`.
SegattnStatus segattn_plan_backward(const SegattnDevice *device,
                                    const SegattnProblem *problem,
                                    const SegattnBackward *backward,
                                    SegattnPlan **plan);

// Bytes of device memory that running the plan needs, at a multiple of 256.
//
// # Safety
// Pointers are NULL or point to a plan and to a number.
SegattnStatus segattn_plan_workspace_bytes(const SegattnPlan *plan, size_t *bytes);

// Enqueues a plan on `stream`, a `CUstream` or `cudaStream_t` of the device: a copy of the lengths and gates that were
// in host memory, then the kernels. The host does not wait.
//
// # Safety
// Every address of the plan and of the workspace is device memory of the stated size that stays allocated until the
// stream has run the call. Nothing else uses what the plan writes, and the workspace, until then. `stream` is one of
// the device's primary context.
SegattnStatus segattn_plan_run(const SegattnPlan *plan,
                               void *stream,
                               void *workspace,
                               size_t workspace_bytes);

// As `segattn_plan_run`, without the copy: the workspace still holds the values of this plan's last run. For the
// capture of a graph.
//
// # Safety
// As `segattn_plan_run`.
SegattnStatus segattn_plan_launch(const SegattnPlan *plan,
                                  void *stream,
                                  void *workspace,
                                  size_t workspace_bytes);

// Frees a plan; NULL does nothing. Calls that are enqueued run on.
//
// # Safety
// `plan` is NULL or came from this library, and is not used again.
void segattn_plan_free(SegattnPlan *plan);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* SEGATTN_H */
