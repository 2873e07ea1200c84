// The kernels of sink logits: checked and timed. Part of layers.cu.
#pragma once

// Spans of these rows: log-sum-exp [heads, rows] for each.
static SegattnSinkParams sink_params(const vector<int>& spans, int heads, int dim) {
  SegattnSinkParams p = {};
  vector<int32_t> starts = {0};
  for (int rows : spans) starts.push_back(starts.back() + rows);
  p.span_start = upload(starts);
  p.rows = starts.back(), p.spans = (int)spans.size(), p.q_heads = heads, p.head_dim = dim;
  return p;
}
static int sink_blocks(const SegattnSinkParams& p) { return up(p.rows * p.q_heads * p.head_dim / 8, 256); }
static int sink_grad_blocks(const SegattnSinkParams& p) {
  int lanes = 1;
  while (lanes * 8 < p.head_dim) lanes *= 2;
  return up(p.rows * p.q_heads * lanes, 256);
}
static int sink_sums_blocks(const SegattnSinkParams& p) { return up(32 * p.spans * p.q_heads, 256); }

static void check_sinks(const vector<int>& spans, int heads, int dim) {
  SegattnSinkParams p = sink_params(spans, heads, dim);
  const int width = heads * dim;
  const size_t n = (size_t)p.rows * width, sums = (size_t)p.rows * heads, units = spans.size() * heads;
  const auto out = bf16_values(n, 1), d_y = bf16_values(n, 2);
  const auto logits = values(heads, 3), lse = values(sums, 4);
  auto *g_y = device<uint16_t>(n), *g_d_out = device<uint16_t>(n);
  p.logits = upload(logits), p.lse = upload(lse), p.d_lse = device<float>(sums), p.d_logits = device<float>(units);
  p.out = rows_of(upload(out), width), p.d_y = rows_of(upload(d_y), width);
  p.y = rows_of(g_y, width), p.d_out = rows_of(g_d_out, width);
  repeat("sink_logits",
         [&] {
           sink_logits_bf16<<<sink_blocks(p), 256>>>(p);
           sink_logits_grad_bf16<<<sink_grad_blocks(p), 256>>>(p);
           sink_logits_sums_f32<<<sink_sums_blocks(p), 256>>>(p);
         },
         {{g_y, n * 2}, {g_d_out, n * 2}, {p.d_lse, sums * 4}, {p.d_logits, units * 4}});
  Numbers y(n), d_out(n), d_lse(sums), d_logits(units);
  for (size_t span = 0, first = 0; span < spans.size(); first += spans[span++])
    for (int row = 0; row < spans[span]; row++)
      for (int head = 0; head < heads; head++) {
        const size_t at = first * heads + (size_t)head * spans[span] + row;
        const double share = 1 / (1 + std::exp((double)logits[head] - lse[at]));
        double along = 0;
        for (int i = 0; i < dim; i++) {
          const size_t element = (first + row) * width + head * dim + i;
          const double x = of_bf16(out[element]), d = of_bf16(d_y[element]);
          y[element] = share * x, d_out[element] = share * d, along += x * d;
        }
        d_lse[at] = share * (1 - share) * along;
        d_logits[span * heads + head] -= d_lse[at];
      }
  check_bf16("sink_logits", download(g_y, n), y);
  check_bf16("sink_logits_grad", download(g_d_out, n), d_out);
  check_f32("sink_logits_grad: log-sum-exp", download(p.d_lse, sums), d_lse, 1e-6);
  check_f32("sink_logits_sums", download(p.d_logits, units), d_logits, 1e-5);
  free_all();
}

static void time_sinks(const vector<int>& spans, int heads, int dim) {
  SegattnSinkParams p = sink_params(spans, heads, dim);
  const int width = heads * dim;
  const size_t n = (size_t)p.rows * width, sums = (size_t)p.rows * heads;
  p.logits = zeros<float>(heads), p.lse = zeros<float>(sums), p.d_lse = zeros<float>(sums);
  p.d_logits = zeros<float>(spans.size() * heads);
  for (SegattnRows* rows : {&p.out, &p.y, &p.d_y, &p.d_out}) *rows = rows_of(zeros<uint16_t>(n), width);
  time_of("sink_logits", n * 4., [&] { sink_logits_bf16<<<sink_blocks(p), 256>>>(p); });
  time_of("sink_logits_grad", n * 6., [&] { sink_logits_grad_bf16<<<sink_grad_blocks(p), 256>>>(p); });
  time_of("sink_logits_sums", sums * 4., [&] { sink_logits_sums_f32<<<sink_sums_blocks(p), 256>>>(p); });
  free_all();
}
