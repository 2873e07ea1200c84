//! The bugs planted into the kernels that choose: the k highest of many numbers, and the next token.

use segattn_sim::mutate::{Rule, drop_statement, replace};

pub const SELECT: [Rule; 30] = [
    replace("b.key > a.key ||", "b.key >= a.key ||"),
    replace("b.id < a.id", "b.id > a.id"),
    replace("shuffle_xor(x.id, mask)", "x.id"),
    // Keys that order as floats do.
    replace("if (x != x) return 0xffffffffu;", ""),
    replace("bits & 0x80000000u ? ~bits :", "false ? ~bits :"),
    // The threshold by histograms.
    drop_statement("__syncthreads()"),
    replace("if (shift == 24 || key >> (shift + 8) == prefix) ", ""),
    replace("key >> (shift + 8) == prefix", "key >> shift == prefix"),
    replace("shift >= 0; shift -= 8", "shift > 0; shift -= 8"),
    replace("key >> shift & 255", "key >> shift & 127"),
    replace("i < 32; i++) sum", "i < 31; i++) sum"),
    replace(
        "shared.above[group] < wanted",
        "shared.above[group] <= wanted",
    ),
    replace("shared.bins[bin] < wanted", "shared.bins[bin] <= wanted"),
    replace("group--) wanted -= shared.above[group]", "group--) {}"),
    replace("bin--) wanted -= shared.bins[bin]", "bin--) {}"),
    replace("group * 32 + 31", "group * 32 + 30"),
    replace("wanted = shared.wanted;\n  }", "\n  }"),
    // The output indices of the selected.
    replace(
        "(keys[i] > threshold.key) << 16",
        "(keys[i] >= threshold.key) << 16",
    ),
    replace("if ((int)(threadIdx.x & 31) >= delta) ", ""),
    replace("delta < 32; delta *= 2", "delta < 16; delta *= 2"),
    replace(
        "(threadIdx.x & 31) == 31) shared.warps",
        "(threadIdx.x & 31) == 30) shared.warps",
    ),
    replace("through - own, total", "through, total"),
    replace(
        "warp < (int)threadIdx.x >> 5",
        "warp <= (int)threadIdx.x >> 5",
    ),
    replace("above + (before >> 16)", "(before >> 16)"),
    replace("ties + (before & 0xffff)", "(before & 0xffff)"),
    replace("my_ties < threshold.ties", "my_ties <= threshold.ties"),
    replace("min(my_ties, threshold.ties)", "my_ties"),
    drop_statement("my_above += is_above"),
    drop_statement("my_ties += is_tie"),
    drop_statement("above += total >> 16"),
];

pub const SAMPLING: [Rule; 57] = [
    drop_statement("__syncthreads()"),
    // The row: penalty, bounds, order.
    replace("seen >> i & 1", "seen & 1"),
    replace("[first / 32] >> (first % 32)", "[first / 32]"),
    replace(
        "x[i] > 0.f ? x[i] / penalty : mul_rn(x[i], penalty)",
        "x[i] / penalty",
    ),
    replace("first + i < count ? rank_key(x[i]) : 0", "rank_key(x[i])"),
    replace(
        "first + i < count ? s_keys[first + i] : 0",
        "s_keys[first + i]",
    ),
    replace(
        "first += blockDim.x * kVector",
        "first += 2 * blockDim.x * kVector",
    ),
    replace("value_of(key) - best, inverse", "value_of(key), inverse"),
    replace(
        "mul_rn(value_of(key) - best, inverse_temperature)",
        "value_of(key) - best",
    ),
    // Over the block.
    replace("for (int mask = 16", "for (int mask = 8"),
    replace("warp = 1; warp <", "warp = 2; warp <"),
    replace(
        "if (lane >= delta) x += before",
        "if (lane > delta) x += before",
    ),
    replace("if (lane == 31) shared.sums", "if (lane == 30) shared.sums"),
    replace("if (warp == (int)threadIdx.x >> 5) before = total;", ""),
    replace("{before + x, total}", "{x, total}"),
    replace("__ffs(lanes) - 1", "__ffs(lanes)"),
    replace("(last || found < 0)", "true"),
    // What is left.
    replace("key > threshold ? weights", "key >= threshold ? weights"),
    replace(
        "shift >= 0; shift -= C::kSearchBits",
        "shift > 0; shift -= C::kSearchBits",
    ),
    replace("if (key < threshold) return;", ""),
    replace("digits >= way ? weight", "digits > way ? weight"),
    replace(">= goal) digit = way", ">= goal) digit = 1"),
    replace("ties(goal - above, left.key)", "ties(goal, left.key)"),
    replace("missing / weights.of(key)", "missing * weights.of(key)"),
    replace("if (first < row.count) row.load", "row.load"),
    replace(
        "shared.list_ids[index] = first + i",
        "shared.list_ids[index] = first",
    ),
    // The draw.
    replace("(d ^ a, 16)", "(d ^ a, 15)"),
    replace("(b ^ c, 7)", "(b ^ c, 8)"),
    replace("round < 6", "round < 5"),
    replace("x[8 + (i + 2) % 4]", "x[8 + (i + 1) % 4]"),
    replace("s.position / 8", "s.position / 4"),
    replace("s.position % 8", "s.position % 4"),
    replace("word >> i % 2 * 32", "word"),
    replace(" + cipher_word(s, at + 1)", ""),
    replace("min(row.count, begin + own)", "begin + own"),
    replace("through - ties;", "through;"),
    replace("tie++ < left.ties", "true"),
    replace("weight >= min_p ? weight : 0.f", "weight"),
    replace("prefix.through > goal, false", "prefix.total > goal, false"),
    replace("prefix.through - mass", "prefix.through"),
    replace("\n  tie = ties_before;", "\n  tie = 0.;"),
    replace("s.top_k > 0 && ", ""),
    replace("1.f / s.temperature", "s.temperature"),
    replace("if (by_number) left = highest;", ""),
    replace("k <= SampleConfig::kListLen", "true"),
    replace(
        "left.ties ? left.ties * (double)weights.of(left.key) : 0.",
        "0.",
    ),
    replace(
        "by_number || mass_above(list, weights, 0, shared) >= goal ||",
        "true ||",
    ),
    replace("(int)shared.list_ids[at]", "at"),
    // The kernel.
    replace(
        "p.indices ? p.indices[blockIdx.x] : blockIdx.x",
        "blockIdx.x",
    ),
    replace("p.seen + shared.index * p.seen_pitch", "p.seen"),
    replace("top.key == kLeastKey || ", ""),
    replace("top.key >= kInfinityKey", "false"),
    replace("? 2 : 1", "? 1 : 2"),
    replace(
        "temperature == 0.f ? greedy : draw",
        "temperature == 0.f ? -1 : draw",
    ),
    replace(
        "log_probability(row.g_logits[token])",
        "log_probability(row.g_logits[0])",
    ),
    replace("|= 1u << (token", "= 1u << (token"),
    replace(
        "position = shared.sampler.position + 1",
        "position = shared.sampler.position",
    ),
];
