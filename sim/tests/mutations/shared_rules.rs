//! The bugs planted into what several attention kernels include.

use segattn_sim::mutate::{Rule, drop_statement, replace};

pub const WARP_SPECIALIZATION: [Rule; 8] = [
    drop_statement("__syncthreads()"),
    drop_statement("setmaxnreg_decrease<"),
    replace(
        "setmaxnreg_increase<C::kConsumerRegisters>",
        "setmaxnreg_increase<C::kConsumerRegisters + 8>",
    ),
    replace(
        "first ? blockIdx.x : gridDim.x",
        "first ? blockIdx.x : gridDim.x - 1",
    ),
    replace("gridDim.x + atomic_add", "gridDim.x + 1 + atomic_add"),
    replace("index >= work_tiles", "index > work_tiles"),
    replace("work.split >= work.splits", "work.split > work.splits"),
    replace(
        "barrier_sync<C::kProducerThreads>(kProducerBarrier)",
        "barrier_sync<C::kProducerThreads - 32>(kProducerBarrier)",
    ),
];

pub const RING: [Rule; 11] = [
    drop_statement("cp_async_wait<"),
    drop_statement("fence_proxy_async_shared()"),
    drop_statement("mbarrier_arrive(&full"),
    drop_statement("mbarrier_arrive(&empty"),
    drop_statement("__syncwarp()"),
    replace("parity(iteration) ^ 1", "parity(iteration)"),
    replace("iteration / kStages & 1", "iteration & 1"),
    replace("full_arrivals);", "full_arrivals - 1);"),
    replace("empty_arrivals);", "empty_arrivals - 1);"),
    replace("empty_arrivals);", "empty_arrivals + 1);"),
    drop_statement("mbarrier_arrive_expect_bytes("),
];

pub const WARPGROUPS: [Rule; 12] = [
    drop_statement("__syncwarp()"),
    replace("wgmma<false, false>", "wgmma<true, false>"),
    replace("k % 64 * 2", "k % 64"),
    replace(
        "(first, k * 16 * TileB::kRowBytes)",
        "(first, k * 8 * TileB::kRowBytes)",
    ),
    replace("+ bytes / 16", "+ bytes / 8"),
    replace("n % 2 * 2 + half", "half * 2 + n % 2"),
    replace("odd ? w[0] : w[1]", "odd ? w[1] : w[0]"),
    replace("upper ? a0 : b0", "upper ? b0 : a0"),
    replace("at < len", "at <= len"),
    replace("if (at < rows)", "if (at <= rows)"),
    replace("(n + lane % 4) * 8", "n * 8"),
    replace("<TileA>(a, a_row, 0)", "<TileA>(a, 0, 0)"),
];

pub const WORK_TILES: [Rule; 19] = [
    drop_statement("__syncwarp()"),
    replace("query < work.query_rows ?", "query <= work.query_rows ?"),
    replace("index % packed_heads)", "index / packed_heads)"),
    replace(
        "p.row_offsets ? query_rows : (int)p.q.rows",
        "(int)p.q.rows",
    ),
    replace(
        "p.row_offsets[batch_index + 1] - first",
        "p.row_offsets[batch_index + 1]",
    ),
    replace("p.row_offsets ? 0 : 1", "0"),
    replace("split * p.row_offsets[p.batch]", "split * first"),
    replace("(int64_t)head * rows", "(int64_t)head"),
    replace("q.query >= work.rows", "q.query >= tensor.rows"),
    replace(
        "work.first_kv_tile + kSplitTiles)",
        "work.first_kv_tile + kSplitTiles - 1)",
    ),
    replace("work.split * kSplitTiles;", "work.split * kSplitTiles + 1;"),
    replace("/ packed_heads + 1;", "/ packed_heads;"),
    replace(
        "(int64_t)split * p.batch + batch_index",
        "(int64_t)split * p.batch",
    ),
    replace(
        "k[kSinks] = Rows<const T>::of(p.past_k",
        "k[kSinks] = Rows<const T>::of(p.prior_k",
    ),
    replace(
        "v[kSinks] = Rows<const T>::of(p.past_v",
        "v[kSinks] = Rows<const T>::of(p.past_k",
    ),
    replace("(p.prior_k, batch_index", "(p.past_k, batch_index"),
    replace("(p.prior_v, batch_index", "(p.v, batch_index"),
    replace("q.query >= work.rows", "q.query > work.rows"),
    replace("q.position >= 0 ? value : make_uint4(0, 0, 0, 0)", "value"),
];

pub const VISIBILITY: [Rule; 16] = [
    replace(
        "min(position + 1, segment_len)",
        "min(position, segment_len)",
    ),
    replace("min(position + 1, segment_len)", "segment_len"),
    replace("gate > 0.f ? past_len", "true ? past_len"),
    replace("p.prior_heads[head] ?", "true ?"),
    replace(
        "kv_head * p.past_len_head_stride",
        "0 * p.past_len_head_stride",
    ),
    replace(
        "gate > 0.f ? past_len : list.sinks",
        "gate > 0.f ? past_len : 0",
    ),
    replace(
        "kv_head * p.sink_len_head_stride",
        "0 * p.sink_len_head_stride",
    ),
    replace(
        "batch_index * p.sink_len_batch_stride",
        "0 * p.sink_len_batch_stride",
    ),
    replace("index * kKeys, sinks}", "index * kKeys, past_len}"),
    replace("{kPast, sinks + index * kKeys", "{kPast, index * kKeys"),
    replace("index < past_tiles", "index <= past_tiles"),
    drop_statement("index -= past_tiles"),
    replace("position / kKeys + 1", "position / kKeys"),
    replace("? log2_approx(gate)", "? gate"),
    replace("segment_len - query_start", "segment_len"),
    // The order of the sources, in one of the places that must agree.
    replace(
        "return {kPast, sinks + index * kKeys, past_len}",
        "return {kPrior, sinks + index * kKeys, past_len}",
    ),
];

pub const SOFTMAX: [Rule; 11] = [
    replace("shuffle_xor(x, 2)", "shuffle_xor(x, 1)"),
    replace("row_max - reference", "max - reference"),
    replace("bias - reference", "-reference"),
    replace("even + odd", "even"),
    drop_statement("row.max = update.max"),
    replace(
        "exp2_approx(partial_max - reference)",
        "exp2_approx(total_max - reference)",
    ),
    replace("max == SEGATTN_NEG_INF ? 0.f : max", "max"),
    replace("scale < 0.f ? -scale : scale", "scale"),
    replace("max_f32(magnitude, 1e-37f)", "magnitude"),
    replace(
        "fma_rn(partial, f.partial, mul_rn(total, f.total))",
        "fma_rn(partial, f.total, mul_rn(total, f.partial))",
    ),
    drop_statement("odd += s"),
];

pub const PIPELINE: [Rule; 3] = [
    drop_statement("__syncthreads()"),
    drop_statement("cp_async_wait<"),
    replace("iteration & 1", "0"),
];

pub const TILE: [Rule; 20] = [
    replace("n + (lane & 7), k / 8", "n, k / 8"),
    replace("k / 8 + (lane >> 3)", "k / 8"),
    replace("k + lane, n / 8", "k, n / 8"),
    replace(
        "(base ^ (within << 4)) + panel * kPanelBytes",
        "(base ^ (within << 4)) + panel * kRowBytes",
    ),
    replace("(bit ^ swizzle(lane_row))", "bit"),
    replace(
        "Tile::lane_base(tile, lane & 15, lane >> 4)",
        "Tile::lane_base(tile, lane & 7, lane >> 4)",
    ),
    replace("(lane & 7) + (lane >> 4) * 8", "lane & 7"),
    replace("lane >> 3 & 1", "lane >> 4"),
    replace("ldmatrix_x4_trans(b", "ldmatrix_x4(b"),
    replace("+ head * tensor.head_stride", ""),
    replace("tensor.batch_offsets ?", "false ?"),
    replace("src + chunk * 8", "src"),
    replace("row < left ? 16 : 0", "row <= left ? 16 : 0"),
    replace("src += kRowsPerPass * rows.stride", "src += kRowsPerPass"),
    replace("left = end - first - row0", "left = end - first"),
    replace("row % 8 == 0 ? origin", "true ? origin"),
    replace("row0 + row < left", "row < left"),
    replace("src += kRowsPerPass * stride", "src += kRowsPerPass"),
    replace("src + panel * Tile::kPanelCols", "src"),
    replace("src += row0 * stride + column * 8", "src += row0 * stride"),
];

pub const PRODUCTS: [Rule; 8] = [
    drop_statement("clear(x)"),
    replace("b[next & 1]", "b[i & 1]"),
    replace("b_row + next % kPairs * 16", "b_row"),
    replace("next / kPairs * 16);", "0);"),
    replace("a[m][k], b", "a[m][0], b"),
    replace("a_row + m * 16", "a_row"),
    replace("(k + 1) * 16", "k * 16"),
    replace("n % 2 * 2 + half", "half * 2 + n % 2"),
];
