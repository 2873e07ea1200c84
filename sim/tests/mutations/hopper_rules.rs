//! The bugs planted into Hopper's prefill: barriers with wrong counts, stages and parities, waits and releases dropped
//! or too early, products out of order, descriptors that lead elsewhere, tiles masked, skipped or closed one too early
//! or late.

use segattn_sim::mutate::{Rule, drop_statement, replace};

use super::attention_rules::Target;
use super::shared_rules::{RING, WARP_SPECIALIZATION};

const fn target(file: &'static str, instance: &'static str, rules: &'static [Rule]) -> Target {
    Target {
        file,
        instance,
        hopper_prefill: true,
        rules,
    }
}

/// At D 128 tiles have two panels, and a block fewer warpgroups and stages.
pub static TARGETS: [Target; 6] = [
    target("attention_forward_hopper.cu", "bf16_d64", &FORWARD),
    target("attention_forward_hopper.cu", "bf16_d128", &TWO_PANELS),
    target("warpgroups.cuh", "bf16_d128", &ROWS),
    target("warp_specialization.cuh", "bf16_d64", &WARP_SPECIALIZATION),
    target("ring.cuh", "bf16_d64", &RING),
    target("tile.cuh", "bf16_d128", &OPERANDS),
];

const FORWARD: [Rule; 90] = [
    // What the producer warps copy.
    replace(
        "before.first_iteration + before.kv_tiles()",
        "before.first_iteration",
    ),
    replace("first + row, end, lane", "first, end, lane"),
    replace("first + row, end, lane", "first + row, end + 1, lane"),
    replace("+ row * Tile::kRowBytes", ""),
    replace("shared.sources.k[tile", "shared.sources.v[tile"),
    replace("shared.sources.v[tile", "shared.sources.k[tile"),
    drop_statement("cp_async_commit()"),
    replace("(buffer.first_iteration + i) * kParts", "i * kParts"),
    replace(
        "first = work.query_tile * C::kRows + group * 64;",
        "first = group * 64;",
    ),
    replace("first + 64 <= work.query_rows", "first <= work.query_rows"),
    replace("p.mapped >> kQueryMap & 1 &&", ""),
    replace(
        "tile.first + C::kKeys <= tile.end",
        "tile.first <= tile.end",
    ),
    replace("(p.mapped >> map & 3) == 3 &&", ""),
    replace("(p.mapped >> map & 3) == 3", "p.mapped >> map & 1"),
    replace("p.maps[map + part]", "p.maps[map]"),
    replace("shared.batch_coordinates[map + part]", "0"),
    replace("at[5] = {0, first, 0, head,", "at[5] = {0, first, 0, 0,"),
    replace("iteration, sizeof(tile)", "iteration, sizeof(tile) / 2"),
    replace(
        "group < C::kConsumerWarpgroups; group += kWarps",
        "group < kWarps; group += kWarps",
    ),
    // Which key tiles a warpgroup takes, and which of them it masks.
    replace(
        "first = work.query_tile * C::kRows + warp / 4 * 64",
        "first = work.query_tile * C::kRows",
    ),
    replace(
        "min(first + 64, work.query_rows) - 1",
        "min(first + 64, work.query_rows) - 2",
    ),
    replace("first <= last ?", "first < last ?"),
    replace("(keys.past_len - keys.sinks) % C::kKeys ?", "false ?"),
    replace("keys.prior_len % C::kKeys ?", "false ?"),
    replace("prior + min(", "prior + 1 + min("),
    replace("min(position + 1,", "min(position + 2,"),
    replace("C::kRows + warp * 16;", "C::kRows + warp * 16 + 15;"),
    replace("kv_tile >= first_masked", "kv_tile > first_masked"),
    replace("kv_tile == sink_tiles - 1 ||", ""),
    replace(
        "kv_tile == partial_past_tile ||",
        "kv_tile + 1 == partial_past_tile ||",
    ),
    replace("kv_tile == partial_prior_tile ||", ""),
    replace(
        "(first_iteration + (kv_tile - first_kv_tile))",
        "(kv_tile - first_kv_tile)",
    ),
    replace("uniform(max(end, work.first_kv_tile))", "uniform(end)"),
    replace("kv_tile < range.work_end", "kv_tile + 1 < range.work_end"),
    replace(
        "if (range.masked(kv_tile)) mask_rows",
        "if (false) mask_rows",
    ),
    replace("kv_tile < range.past_end ?", "kv_tile <= range.past_end ?"),
    replace("kv_tile >= range.sink_tiles && kv_tile", "kv_tile"),
    // Products and their order.
    drop_statement("wgmma_fence()"),
    drop_statement("wgmma_commit()"),
    drop_statement("wgmma_wait<"),
    replace("wgmma_wait<1>()", "wgmma_wait<2>()"),
    replace(
        "iteration(kv_tile, kKeyPart), stage",
        "iteration(kv_tile, kValuePart), stage",
    ),
    replace(
        "iteration(kv_tile, kValuePart), stage",
        "iteration(kv_tile, kKeyPart), stage",
    ),
    replace("(&shared.q[range.warpgroup])", "(&shared.q[0])"),
    replace(
        "(s, shared, range, kv_tile + 1)",
        "(s, shared, range, kv_tile)",
    ),
    replace("(s, shared, range, end)", "(s, shared, range, kv_tile)"),
    replace(
        "probs, shared, range, kv_tile)",
        "probs, shared, range, kv_tile + 1)",
    ),
    replace("softmax(kv_tile + 1)", "softmax(kv_tile)"),
    drop_statement("pack_operands<"),
    // The sign of the queries.
    replace("p.problem.scale < 0.f", "p.problem.scale < -9.f"),
    drop_statement("fence_proxy_async_shared()"),
    // Rescaling, chunks and their end.
    drop_statement("rescale(out, factor)"),
    replace("kv_tile + C::kChunkTiles)", "kv_tile + C::kChunkTiles - 1)"),
    replace("first = kv_tile == range.first_kv_tile", "first = true"),
    drop_statement("acc.clear()"),
    replace("shared.total_rows + first_row", "shared.total_rows"),
    replace("work.splits > 1)", "work.splits > 2)"),
    drop_statement("finish_rows<C>"),
    replace(
        "query, work.query_rows, work.rows",
        "query, work.rows, work.rows",
    ),
    // Rings: counts, waits, iterations, releases.
    replace("work_ring.init(1,", "work_ring.init(2,"),
    replace("kv_ring.init(1,", "kv_ring.init(2,"),
    replace(
        "kv_ring.init(1, C::kConsumerWarps)",
        "kv_ring.init(1, C::kConsumerWarps - 4)",
    ),
    replace(
        "work_ring.init(1, C::kConsumerWarps)",
        "work_ring.init(1, C::kConsumerWarps - 1)",
    ),
    replace("ring.init(1, 4)", "ring.init(1, 3)"),
    drop_statement("shared.work_ring.wait_empty("),
    replace("work_ring.wait_empty(n)", "work_ring.wait_empty(n / 2)"),
    drop_statement("ring.wait_empty(iteration"),
    replace(
        "ring.wait_empty(iteration + part)",
        "ring.wait_empty(iteration + part + C::kStages)",
    ),
    replace("ring.wait_empty(n); if (p.mapped", "if (p.mapped"),
    drop_statement("sync_producers<"),
    drop_statement("shared.kv_ring.wait_full("),
    replace(
        "kv_ring.wait_full(iteration)",
        "kv_ring.wait_full(iteration + C::kStages)",
    ),
    drop_statement("shared.q_ring[range.warpgroup].wait_full("),
    // From the third work tile on: what shared memory holds before the first two may make a warpgroup loop for ever.
    replace(
        "shared.work_ring.wait_full(n)",
        "if (n < 2) shared.work_ring.wait_full(n)",
    ),
    replace(
        "work_ring.wait_full(n)",
        "work_ring.wait_full(n < 2 ? n : n + 2)",
    ),
    drop_statement("shared.kv_ring.release("),
    drop_statement("release(kv_tile, kValuePart)"),
    drop_statement("release(kv_tile + 1, kKeyPart)"),
    replace(
        "kv_ring.release(range.iteration(kv_tile, part)",
        "kv_ring.release(range.iteration(kv_tile + 1, part)",
    ),
    replace(
        "wgmma_wait<0>(); release(kv_tile, kValuePart);",
        "release(kv_tile, kValuePart); wgmma_wait<0>();",
    ),
    drop_statement("shared.q_ring[range.warpgroup].release("),
    drop_statement("shared.work_ring.release("),
    replace("work_ring.release(n,", "work_ring.release(0,"),
    drop_statement("shared.work_ring.arrive_without_copies(n)"),
    replace("shared.work[~n % kWorkBuffers], n == 0", "buffer, n == 0"),
    replace(
        "buffer = shared.work[n % kWorkBuffers]",
        "buffer = shared.work[0]",
    ),
    replace("arrive_warp<1>(iteration", "arrive_warp<2>(iteration"),
    replace("arrive_warp<0>(iteration", "arrive_warp<1>(iteration"),
    replace("arrive_warp<0>(n", "arrive_warp<1>(n"),
    drop_statement("sync_consumer_warpgroup<"),
];

const TWO_PANELS: [Rule; 4] = [
    replace(
        "shared.q[range.warpgroup], warp % 4",
        "shared.q[0], warp % 4",
    ),
    drop_statement("negate_queries<C>"),
    drop_statement("ring.wait_empty(iteration"),
    drop_statement("shared.work_ring.wait_empty("),
];

const ROWS: [Rule; 2] = [
    replace("k / 64 * Tile::kPanelBytes", "k / 64 * 64"),
    replace("advance(first_a, k_major_offset<TileA>(k))", "first_a"),
];

const OPERANDS: [Rule; 5] = [
    replace(
        "row * Tile::kRowBytes + k % 64 * 2, 0, 8",
        "k % 64 * 2, 0, 8",
    ),
    replace("2, 0, 8 * Tile::kRowBytes", "2, 0, 16 * Tile::kRowBytes"),
    replace(
        "Tile::kPanelBytes, 8 * Tile::kRowBytes",
        "Tile::kRowBytes, 8 * Tile::kRowBytes",
    ),
    replace(
        "Tile::kPanelBytes, 8 * Tile::kRowBytes",
        "Tile::kPanelBytes, 16 * Tile::kRowBytes",
    ),
    replace("row % 8 == 0 ? origin", "true ? origin + 16"),
];
