// Linked into every compiled kernel: the functions of simulator.h and the hooks of g++ -fsanitize=thread,
// each passed on through a pointer that the simulator sets after loading (sim/src/host/module.rs, by name).
// There is no libtsan: the hooks are the simulator's own.
#include <stddef.h>
#include <stdint.h>

#define CALL(result, name, parameters, arguments) \
  result(*name##_pointer) parameters;             \
  result name parameters { return name##_pointer arguments; }

CALL(const void*, sim_thread, (void), ())
CALL(void, sim_syncthreads, (const void* site), (site))
CALL(void, sim_barrier_sync, (uint32_t id, uint32_t count, const void* site), (id, count, site))
CALL(void, sim_barrier_arrive, (uint32_t id, uint32_t count, const void* site), (id, count, site))
CALL(void, sim_syncwarp, (uint32_t mask, const void* site), (mask, site))
CALL(uint32_t, sim_shuffle, (uint32_t mask, uint32_t v, uint32_t lane, const void* site), (mask, v, lane, site))
CALL(uint32_t, sim_ballot, (uint32_t mask, int predicate, const void* site), (mask, predicate, site))
CALL(void, sim_ldmatrix, (uint32_t* r, int count, int trans, const void* row, const void* site),
     (r, count, trans, row, site))
CALL(void, sim_stmatrix, (const uint32_t* r, int count, int trans, void* row, const void* site),
     (r, count, trans, row, site))
CALL(void, sim_mma_m16n8k16, (float* d, const uint32_t* a, const uint32_t* b, int is_bf16, const void* site),
     (d, a, b, is_bf16, site))
CALL(void, sim_cp_async, (void* dst, const void* src, uint32_t size, uint32_t valid, const void* site),
     (dst, src, size, valid, site))
CALL(void, sim_cp_async_commit, (void), ())
CALL(void, sim_cp_async_wait, (uint32_t newest_left, const void* site), (newest_left, site))
CALL(uint32_t, sim_atomic,
     (int op, void* address, uint32_t operand, uint32_t compare, int order, int scope, const void* site),
     (op, address, operand, compare, order, scope, site))
CALL(void, sim_fence, (int scope), (scope))
CALL(void, sim_trap, (const void* site), (site))

CALL(void, sim_mbarrier_init, (void* b, uint32_t count, const void* site), (b, count, site))
CALL(void, sim_mbarrier_invalidate, (void* b, const void* site), (b, site))
CALL(void, sim_fence_mbarrier_init, (void), ())
CALL(void, sim_mbarrier_arrive, (void* b, uint32_t count, const void* site), (b, count, site))
CALL(void, sim_mbarrier_arrive_expect_tx, (void* b, uint32_t bytes, const void* site), (b, bytes, site))
CALL(void, sim_mbarrier_expect_tx, (void* b, uint32_t bytes, const void* site), (b, bytes, site))
CALL(void, sim_mbarrier_wait, (void* b, uint32_t parity, const void* site), (b, parity, site))
CALL(int, sim_mbarrier_test_wait, (void* b, uint32_t parity, const void* site), (b, parity, site))
CALL(void, sim_fence_proxy_async, (int space), (space))
CALL(void, sim_tma_load, (void* dst, const void* map, const int32_t* at, void* b, const void* site),
     (dst, map, at, b, site))
CALL(void, sim_tma_store, (const void* map, const int32_t* at, const void* src, const void* site), (map, at, src, site))
CALL(void, sim_tma_reduce_add, (const void* map, const int32_t* at, const void* src, const void* site),
     (map, at, src, site))
CALL(void, sim_bulk_load, (void* dst, const void* src, uint32_t bytes, void* b, const void* site),
     (dst, src, bytes, b, site))
CALL(void, sim_bulk_store, (void* dst, const void* src, uint32_t bytes, const void* site), (dst, src, bytes, site))
CALL(void, sim_bulk_reduce_add, (void* dst, const void* src, uint32_t bytes, const void* site), (dst, src, bytes, site))
CALL(void, sim_bulk_commit, (void), ())
CALL(void, sim_bulk_wait, (uint32_t newest_left, int read, const void* site), (newest_left, read, site))

CALL(void, sim_set_registers, (uint32_t each, int take, const void* site), (each, take, site))
CALL(void, sim_wgmma_fence, (const void* site), (site))
CALL(void, sim_wgmma,
     (float* d, int n, const uint32_t* a, uint64_t a_desc, uint64_t b_desc, int flags, const void* site),
     (d, n, a, a_desc, b_desc, flags, site))
CALL(void, sim_wgmma_commit, (const void* site), (site))
CALL(void, sim_wgmma_wait, (uint32_t newest_left, const void* site), (newest_left, site))

// A yield has no argument: its place is where it returns to.
void (*sim_yield_pointer)(const void* site);
void sim_yield(void) { sim_yield_pointer((const char*)__builtin_return_address(0) - 1); }

// Called for every load and store outside the thread's own stack.
void (*sim_access_pointer)(void* address, size_t bytes, int is_write, int aligned, const void* site);

// Stacks are aligned to their size, so one comparison tells the thread's own registers and locals apart.
static inline void access(void* p, size_t bytes, int is_write, int aligned, const char* return_address) {
  uintptr_t here = (uintptr_t)__builtin_frame_address(0);
  if (((uintptr_t)p ^ here) < SIM_STACK_BYTES) return;
  // The return address lies behind the call; one byte less lies on its line.
  sim_access_pointer(p, bytes, is_write, aligned, return_address - 1);
}

#define HOOK(name, bytes, is_write, aligned) \
  void __tsan_##name(void* p) { access(p, bytes, is_write, aligned, (const char*)__builtin_return_address(0)); }
#define HOOKS(bytes)                        \
  HOOK(read##bytes, bytes, 0, 1)            \
  HOOK(write##bytes, bytes, 1, 1)           \
  HOOK(unaligned_read##bytes, bytes, 0, 0)  \
  HOOK(unaligned_write##bytes, bytes, 1, 0) \
  HOOK(volatile_read##bytes, bytes, 0, 1)   \
  HOOK(volatile_write##bytes, bytes, 1, 1)

HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) { access(p, bytes, 0, 0, (const char*)__builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t bytes) { access(p, bytes, 1, 0, (const char*)__builtin_return_address(0)); }
void __tsan_init(void) {}
void __tsan_func_entry(void* p) { (void)p; }
void __tsan_func_exit(void) {}

// Every basic block of a kernel begins with this call (g++ -fsanitize-coverage=trace-pc): it counts the thread's steps
// down, so that a loop that never ends is ended. The count is a field of ThreadContext (sim/src/machine/context.rs).
// What runs while the module is loaded, before the pointer is set, is no simulated thread.
void (*sim_out_of_steps_pointer)(const void* site);
void __sanitizer_cov_trace_pc(void) {
  if (!sim_out_of_steps_pointer) return;
  uintptr_t here = (uintptr_t)__builtin_frame_address(0);
  int64_t* steps_left = (int64_t*)((here | (SIM_STACK_BYTES - 1)) + 1 - SIM_CONTEXT_BYTES + 64);
  if (--*steps_left < 0) sim_out_of_steps_pointer((const char*)__builtin_return_address(0) - 1);
}
