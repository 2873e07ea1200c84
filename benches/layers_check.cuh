// Each kernel of the layers against its formula in f64. Part of layers.cu.
#pragma once

static Numbers widened(const vector<uint16_t>& x) {
  Numbers y(x.size());
  std::transform(x.begin(), x.end(), y.begin(), [](uint16_t v) { return (double)of_bf16(v); });
  return y;
}

static SegattnNormParams norm_params(int rows, int width) {
  SegattnNormParams p = {};
  p.rows = rows;
  p.width = width;
  p.eps = 1e-5f;
  p.groups = 1;
  p.add = 1;
  return p;
}
static int row_threads_of(int width) { return std::min(1024, std::max(1, up(width, 512)) * 32); }

static void check_norm(int rows, int width) {
  const size_t n = (size_t)rows * width;
  const auto x = bf16_values(n, 1), residual = bf16_values(n, 2), d_y = bf16_values(n, 3), d_x = bf16_values(n, 4);
  const auto weight = values(width, 5), d_weight = values(width, 6);
  SegattnNormParams p = norm_params(rows, width);
  auto *g_x = upload(x), *g_residual = upload(residual), *g_sum = device<uint16_t>(n), *g_y = device<uint16_t>(n);
  auto *g_d_y = upload(d_y), *g_d_x = device<uint16_t>(n);
  p.x = rows_of(g_x, width), p.residual = rows_of(g_residual, width), p.x_sum = rows_of(g_sum, width);
  p.y = rows_of(g_y, width), p.d_y = rows_of(g_d_y, width), p.d_x = rows_of(g_d_x, width);
  float* g_d_weight = device<float>(width);
  p.weight = upload(weight), p.rstd = device<float>(rows), p.d_weight = g_d_weight;
  repeat("norm",
         [&] {
           put(g_d_x, d_x), put(g_d_weight, d_weight);
           rms_norm_bf16<<<rows, row_threads_of(width), sizeof(RowShared)>>>(p);
           SegattnNormParams grad = p;
           grad.x = p.x_sum;
           rms_norm_grad_bf16<<<rows, row_threads_of(width), sizeof(RowShared)>>>(grad);
           rms_norm_weight_grad_bf16<<<up(width, 16), 256, sizeof(ColumnShared)>>>(grad);
         },
         {{g_y, n * 2}, {g_d_x, n * 2}, {g_d_weight, (size_t)width * 4}});
  const Numbers sums = widened(download(g_sum, n)), a = widened(x), b = widened(residual), dy = widened(d_y),
                before = widened(d_x);
  Numbers sum(n), y(n), grad(n), grad_weight(d_weight.begin(), d_weight.end());
  for (int r = 0; r < rows; r++) {
    const size_t at = (size_t)r * width;
    double squares = 0, along = 0;
    for (int i = 0; i < width; i++) {
      sum[at + i] = a[at + i] + b[at + i];
      squares += sums[at + i] * sums[at + i];
      along += dy[at + i] * weight[i] * sums[at + i];
    }
    const double rstd = 1 / std::sqrt(squares / width + p.eps), pull = along / width * rstd * rstd * rstd;
    for (int i = 0; i < width; i++) {
      y[at + i] = sums[at + i] * rstd * weight[i];
      grad[at + i] = before[at + i] + dy[at + i] * weight[i] * rstd - sums[at + i] * pull;
      grad_weight[i] += dy[at + i] * sums[at + i] * rstd;
    }
  }
  check_bf16("norm: residual sum", download(g_sum, n), sum);
  check_bf16("rms_norm", download(g_y, n), y);
  check_bf16("rms_norm_grad", download(g_d_x, n), grad);
  check_f32("rms_norm_weight_grad", download(g_d_weight, width), grad_weight, 2e-5);
  free_all();
}

// The gradient of a weight that the heads of a row share: the sums of heads, then the chain over rows. Of one norm, or
// of two of as many rows and columns.
static void group_sums(const SegattnNormParams& p, const SegattnNormParams* second = nullptr) {
  const int vectors = up(p.rows, 4) * 4 * p.width / kVector, blocks = up(vectors, GroupConfig::kThreads);
  const SegattnNormsParams both = {{p, second ? *second : p}, blocks};
  rms_norm_group_sums_bf16<<<second ? 2 * blocks : blocks, GroupConfig::kThreads>>>(both);
}
static void chain(const SegattnNormParams& p, const SegattnNormParams* second = nullptr) {
  const int shared = sizeof(ChainShared), blocks = up(p.width, 32);
  must(cudaFuncSetAttribute(rms_norm_chain_f32, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "shared memory");
  const SegattnNormsParams both = {{p, second ? *second : p}, blocks};
  rms_norm_chain_f32<<<second ? 2 * blocks : blocks, ChainConfig::kThreads, shared>>>(both);
}
static size_t sums_len(int rows, int width) { return (size_t)up(rows, 4) * 4 * up(width, 32) * 32; }

static void check_norm_heads(int rows, int heads, int dim) {
  const size_t n = (size_t)rows * heads * dim;
  const auto x = bf16_values(n, 1), d_y = bf16_values(n, 2);
  const auto rstd = values((size_t)rows * heads, 3), d_weight = values(dim, 4);
  SegattnNormParams p = norm_params(rows, dim);
  p.x = rows_of(upload(x), heads * dim), p.d_y = rows_of(upload(d_y), heads * dim), p.rstd = upload(rstd);
  p.groups = heads, p.d_weight = device<float>(dim), p.sums = device<float>(sums_len(rows, dim));
  repeat("rms_norm_weight_grad of heads", [&] { put(p.d_weight, d_weight), group_sums(p), chain(p); },
         {{p.d_weight, (size_t)dim * 4}});
  Numbers exact(d_weight.begin(), d_weight.end());
  vector<float> ordered = d_weight;
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < dim; i++) {
      volatile float sum = 0;
      for (int h = 0; h < heads; h++) {
        const size_t norm = (size_t)r * heads + h;
        volatile float scaled = of_bf16(x[norm * dim + i]) * rstd[norm], term = of_bf16(d_y[norm * dim + i]) * scaled;
        sum = sum + term;
        exact[i] += (double)of_bf16(d_y[norm * dim + i]) * of_bf16(x[norm * dim + i]) * rstd[norm];
      }
      ordered[i] += sum;
    }
  const vector<float> got = download(p.d_weight, dim);
  int wrong = 0;
  for (int i = 0; i < dim; i++) wrong += got[i] != ordered[i];
  check_f32("rms_norm_weight_grad of heads", got, exact, 2e-5);
  report("rms_norm_weight_grad of heads", wrong == 0, "elements with other bits than the order's", wrong, 0);
  free_all();
}

static SegattnQkvParams qkv_params(int rows, int q_heads, int kv_heads, int dim) {
  SegattnQkvParams p = {};
  vector<int32_t> angles(rows), places(rows);
  for (int r = 0; r < rows; r++) angles[r] = r * 7 % 512, places[r] = rows - 1 - r;
  vector<float> cos(512 * dim / 2), sin(cos.size());
  for (size_t i = 0; i < cos.size(); i++) {
    const double angle = i / (dim / 2) * std::pow(10000., -2. * (i % (dim / 2)) / dim);
    cos[i] = (float)std::cos(angle), sin[i] = (float)std::sin(angle);
  }
  p.cos = upload(cos), p.sin = upload(sin), p.angles = upload(angles), p.cache_rows = upload(places);
  p.rows = rows, p.q_heads = q_heads, p.kv_heads = kv_heads, p.head_dim = dim;
  return p;
}

// Threads of the kernels of heads' norms.
static int64_t head_lanes(int rows, int heads, int dim) {
  int lanes = 1;
  while (lanes * kVector < dim) lanes *= 2;
  return (int64_t)rows * heads * lanes;
}

// Norms of q's and k's heads with the split, and their gradient, must have the bits of a block a norm.
static void check_qk_norms(int rows, int q_heads, int kv_heads, int dim) {
  SegattnQkvParams p = qkv_params(rows, q_heads, kv_heads, dim);
  const int q_width = q_heads * dim, kv_width = kv_heads * dim, width = q_width + 2 * kv_width;
  const size_t n = (size_t)rows * width;
  const auto qkv = bf16_values(n, 1), d_y = bf16_values(n, 2);
  uint16_t *g_qkv = upload(qkv), *g_normed = upload(qkv), *g_d_y = upload(d_y);
  uint16_t *g_d_x[2] = {upload(d_y), upload(d_y)}, *g_q[2], *g_k[2];
  must(cudaMemset(g_d_x[1], 0, n * 2), "cudaMemset");
  must(cudaMemcpy2D(g_d_x[1] + q_width + kv_width, width * 2, g_d_y + q_width + kv_width, width * 2, kv_width * 2, rows,
                    cudaMemcpyDeviceToDevice),
       "cudaMemcpy2D");
  for (int i = 0; i < 2; i++) g_q[i] = device<uint16_t>((size_t)rows * q_width);
  for (int i = 0; i < 2; i++) g_k[i] = device<uint16_t>((size_t)rows * kv_width);
  p.qkv = rows_of(g_qkv, width), p.q = rows_of(g_q[0], q_width), p.k = rows_of(g_k[0], kv_width);
  p.v = rows_of(device<uint16_t>((size_t)rows * kv_width), kv_width);
  p.norms.q_weight = upload(values(dim, 3)), p.norms.k_weight = upload(values(dim, 4)), p.norms.eps = 1e-5f;
  p.norms.q_rstd = device<float>((size_t)rows * q_heads), p.norms.k_rstd = device<float>((size_t)rows * kv_heads);
  SegattnHeadNormsParams grad = {};
  grad.d_y = rows_of(g_d_y, width), grad.x = p.qkv, grad.d_x = rows_of(g_d_x[0], width), grad.norms = p.norms;
  grad.rows = rows, grad.q_heads = q_heads, grad.kv_heads = kv_heads, grad.head_dim = dim;
  const int blocks = up(head_lanes(rows, q_heads + 2 * kv_heads, dim), 256);
  repeat("split_qkv_norm",
         [&] { split_qkv_norm_bf16<<<blocks, 256>>>(p), head_norms_grad_bf16<<<blocks, 256>>>(grad); },
         {{g_q[0], (size_t)rows * q_width * 2}, {g_k[0], (size_t)rows * kv_width * 2}, {g_d_x[0], n * 2}});
  for (int part = 0; part < 2; part++) {
    const int heads = part ? kv_heads : q_heads, column = part ? q_width : 0;
    SegattnNormParams norm = norm_params(rows * heads, dim);
    norm.groups = heads, norm.weight = part ? p.norms.k_weight : p.norms.q_weight;
    norm.rstd = device<float>((size_t)rows * heads);
    norm.x = rows_of(g_qkv + column, width), norm.y = rows_of(g_normed + column, width);
    norm.d_y = rows_of(g_d_y + column, width), norm.d_x = rows_of(g_d_x[1] + column, width);
    rms_norm_bf16<<<rows * heads, 32, sizeof(RowShared)>>>(norm);
    rms_norm_grad_bf16<<<rows * heads, 32, sizeof(RowShared)>>>(norm);
  }
  SegattnQkvParams plain = p;
  plain.qkv = rows_of(g_normed, width), plain.q = rows_of(g_q[1], q_width), plain.k = rows_of(g_k[1], kv_width);
  split_qkv_bf16<<<up((int64_t)rows * width / 16, 256), 256>>>(plain);
  const bool q = download(g_q[0], (size_t)rows * q_width) == download(g_q[1], (size_t)rows * q_width);
  const bool k = download(g_k[0], (size_t)rows * kv_width) == download(g_k[1], (size_t)rows * kv_width);
  const bool d_x = download(g_d_x[0], n) == download(g_d_x[1], n);
  report("split_qkv_norm: bits of q and k", q && k, "differ", !q + !k, 0);
  report("head_norms_grad: bits", d_x, "differ", !d_x, 0);
  free_all();
}

// split, then join of what it wrote, must give the rows back; and split against the formula.
static void check_rope(int rows, int q_heads, int kv_heads, int dim) {
  SegattnQkvParams p = qkv_params(rows, q_heads, kv_heads, dim);
  const int q_width = q_heads * dim, kv_width = kv_heads * dim, width = q_width + 2 * kv_width;
  const auto qkv = bf16_values((size_t)rows * width, 1);
  auto *g_qkv = upload(qkv), *g_q = device<uint16_t>((size_t)rows * q_width),
       *g_k = device<uint16_t>((size_t)rows * kv_width);
  auto *g_raw = device<uint16_t>((size_t)rows * kv_width), *g_v = device<uint16_t>((size_t)rows * kv_width);
  p.qkv = rows_of(g_qkv, width), p.q = rows_of(g_q, q_width), p.k = rows_of(g_k, kv_width);
  p.raw_k = rows_of(g_raw, kv_width), p.v = rows_of(g_v, kv_width);
  const int blocks = up((int64_t)rows * width / 16, 256);
  repeat("split_qkv", [&] { split_qkv_bf16<<<blocks, 256>>>(p); },
         {{g_q, (size_t)rows * q_width * 2}, {g_k, (size_t)rows * kv_width * 2}});
  const auto cos = download(p.cos, 512 * dim / 2), sin = download(p.sin, 512 * dim / 2);
  Numbers q((size_t)rows * q_width), k((size_t)rows * kv_width);
  int copied = 0;
  const auto raw = download(g_raw, k.size()), v = download(g_v, k.size());
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < q_width + kv_width; i++) {
      const bool is_q = i < q_width, low = i % dim < dim / 2;
      const size_t angle = (size_t)(r * 7 % 512) * (dim / 2) + i % (dim / 2), at = (size_t)r * width + i;
      const double x = of_bf16(qkv[at]), other = of_bf16(qkv[low ? at + dim / 2 : at - dim / 2]);
      const double turned = x * cos[angle] + (low ? -other : other) * sin[angle];
      if (is_q) q[(size_t)r * q_width + i] = turned;
      else {
        const size_t to = (size_t)(rows - 1 - r) * kv_width + i - q_width;
        k[to] = turned;
        copied += raw[to] != qkv[at] || v[to] != qkv[at + kv_width];
      }
    }
  check_bf16("split_qkv: q", download(g_q, q.size()), q);
  check_bf16("split_qkv: k", download(g_k, k.size()), k);
  report("split_qkv: raw k and v", copied == 0, "wrong", copied, 0);
  SegattnRopeParams back = {};
  back.src = back.dst = p.q;
  back.cos = p.cos, back.sin = p.sin, back.angles = p.angles, back.rows = rows, back.heads = q_heads,
  back.head_dim = dim, back.inverse = 1;
  rope_bf16<<<up((int64_t)rows * q_width / 16, 256), 256>>>(back);
  Numbers raw_q(q.size()), got = widened(download(g_q, q.size()));
  for (size_t i = 0; i < raw_q.size(); i++) raw_q[i] = of_bf16(qkv[i / q_width * width + i % q_width]);
  report("rope turned back", error(got, raw_q) < 4e-3, "error", error(got, raw_q), 4e-3);
  SegattnQkvParams join = p;
  join.k = p.raw_k;
  auto* g_joined = device<uint16_t>(qkv.size());
  join.qkv = rows_of(g_joined, width);
  join_qkv_bf16<<<blocks, 256>>>(join);
  const auto joined = download(g_joined, qkv.size());
  int wrong = 0;
  for (int r = 0; r < rows; r++)
    wrong += memcmp(&joined[(size_t)r * width + q_width + kv_width], &v[(size_t)r * kv_width], kv_width * 2) != 0;
  report("join_qkv: v", wrong == 0, "wrong rows", wrong, 0);
  free_all();
}

static void check_swiglu(int rows, int inner) {
  const auto gate_up = bf16_values((size_t)rows * 2 * inner, 1), d_y = bf16_values((size_t)rows * inner, 2);
  SegattnSwigluParams p = {};
  auto *g_y = device<uint16_t>(d_y.size()), *g_d = device<uint16_t>(gate_up.size());
  p.gate_up = rows_of(upload(gate_up), 2 * inner), p.y = rows_of(g_y, inner), p.d_y = rows_of(upload(d_y), inner);
  p.d_gate_up = rows_of(g_d, 2 * inner), p.rows = rows, p.inner = inner;
  const int blocks = up((int64_t)rows * inner / 8, 256);
  repeat("swiglu", [&] { swiglu_bf16<<<blocks, 256>>>(p), swiglu_grad_bf16<<<blocks, 256>>>(p); },
         {{g_y, d_y.size() * 2}, {g_d, gate_up.size() * 2}});
  Numbers y(d_y.size()), d(gate_up.size());
  for (size_t i = 0; i < y.size(); i++) {
    const size_t at = i / inner * 2 * inner + i % inner;
    const double gate = of_bf16(gate_up[at]), up = of_bf16(gate_up[at + inner]), s = 1 / (1 + std::exp(-gate)),
                 g = of_bf16(d_y[i]);
    y[i] = gate * s * up;
    d[at] = g * up * s * (1 + gate * (1 - s));
    d[at + inner] = g * gate * s;
  }
  check_bf16("swiglu", download(g_y, y.size()), y);
  check_bf16("swiglu_grad", download(g_d, d.size()), d);
  free_all();
}

// Rows sorted by token, and where each token's begin.
static void sort_tokens(const vector<uint32_t>& tokens, vector<int32_t>& order, vector<int32_t>& starts) {
  order.resize(tokens.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return tokens[a] < tokens[b]; });
  for (size_t i = 0; i < order.size(); i++)
    if (i == 0 || tokens[order[i]] != tokens[order[i - 1]]) starts.push_back((int)i);
  starts.push_back((int)order.size());
}

static void check_embedding(int rows, int width, int vocab) {
  const auto table = bf16_values((size_t)vocab * width, 1), d_y = bf16_values((size_t)rows * width, 2);
  auto sums = values((size_t)vocab * width, 3);
  vector<uint32_t> tokens(rows);
  for (int r = 0; r < rows; r++) tokens[r] = (uint32_t)r * r % vocab;
  vector<int32_t> order, starts;
  sort_tokens(tokens, order, starts);
  SegattnEmbedParams p = {};
  auto* g_y = device<uint16_t>(d_y.size());
  auto* g_sums = device<float>(sums.size());
  p.table = rows_of(upload(table), width), p.tokens = upload(tokens), p.y = rows_of(g_y, width),
  p.d_table = rows_of(g_sums, width);
  p.order = upload(order), p.run_start = upload(starts), p.rows = rows, p.runs = (int)starts.size() - 1,
  p.width = width;
  SegattnEmbedParams grad = p;
  grad.y = rows_of(upload(d_y), width);
  repeat("embedding",
         [&] {
           put(g_sums, sums);
           embed_bf16<<<up((int64_t)rows * width / 8, 256), 256>>>(p);
           embed_grad_bf16<<<up((int64_t)p.runs * up(width, 256), 4), 128>>>(grad);
         },
         {{g_y, d_y.size() * 2}, {g_sums, sums.size() * 4}});
  const auto y = download(g_y, d_y.size());
  int wrong = 0;
  for (int r = 0; r < rows; r++) {
    wrong += memcmp(&y[(size_t)r * width], &table[(size_t)tokens[r] * width], width * 2) != 0;
    for (int i = 0; i < width; i++) sums[(size_t)tokens[r] * width + i] += of_bf16(d_y[(size_t)r * width + i]);
  }
  report("embed", wrong == 0, "wrong rows", wrong, 0);
  const auto got = download(g_sums, sums.size());
  report("embed_grad", memcmp(got.data(), sums.data(), sums.size() * 4) == 0, "bits of the host, difference",
         got != sums, 0);
  free_all();
}

static void check_loss(int rows, int vocab) {
  auto logits = values((size_t)rows * vocab, 1);
  for (float& x : logits) x = x * 4 + 30;
  vector<uint32_t> targets(rows);
  vector<float> scales(rows);
  for (int r = 0; r < rows; r++) targets[r] = (uint32_t)(r * 131 + 7) % vocab, scales[r] = r % 3 * 0.25f;
  SegattnLossParams p = {};
  auto* g_logits = device<float>(logits.size());
  auto* g_scores = device<float>(rows);
  p.logits = rows_of(g_logits, vocab), p.targets = upload(targets), p.log_probability = g_scores;
  p.d_logits = rows_of((uint16_t*)g_logits, 2 * vocab), p.rows = rows, p.vocab = vocab, p.scales = upload(scales);
  repeat("cross_entropy",
         [&] {
           put(g_logits, logits);
           cross_entropy_bf16<<<rows, row_threads_of(vocab), sizeof(RowSoftmaxShared)>>>(p);
         },
         {{g_logits, logits.size() * 4}, {g_scores, (size_t)rows * 4}});
  Numbers scores(rows), d(logits.size());
  vector<uint16_t> got(d.size());
  for (int r = 0; r < rows; r++) {
    const float* row = &logits[(size_t)r * vocab];
    const double max = *std::max_element(row, row + vocab);
    double sum = 0;
    for (int i = 0; i < vocab; i++) sum += std::exp(row[i] - max);
    scores[r] = row[targets[r]] - max - std::log(sum);
    for (int i = 0; i < vocab; i++)
      d[(size_t)r * vocab + i] = scales[r] * (std::exp(row[i] - max) / sum - (i == (int)targets[r]));
    const auto low = download((uint16_t*)(g_logits + (size_t)r * vocab), vocab);
    std::copy(low.begin(), low.end(), got.begin() + (size_t)r * vocab);
  }
  check_f32("cross_entropy: log-probability", download(g_scores, rows), scores, 1e-6);
  check_bf16("cross_entropy: d_logits", got, d);
  free_all();
}

static void check_adamw(const vector<int>& lens) {
  vector<SegattnAdamwTensor> table;
  vector<vector<float>> w, g, m, v;
  int64_t chunks = 0;
  for (size_t t = 0; t < lens.size(); t++) {
    w.push_back(values(lens[t], t * 4)), g.push_back(values(lens[t], t * 4 + 1)),
        m.push_back(values(lens[t], t * 4 + 2)), v.push_back(values(lens[t], t * 4 + 3));
    for (float& x : v[t]) x = std::fabs(x);
    SegattnAdamwTensor e = {};
    e.values = device<float>(lens[t]), e.grads = upload(g[t]), e.m = device<float>(lens[t]),
    e.v = device<float>(lens[t]), e.weights = device<uint16_t>(lens[t]);
    e.len = lens[t], e.first_chunk = chunks, e.step = 1e-3f, e.keep = 0.9999f, e.floor = -1, e.changes = 1;
    chunks += up(lens[t], AdamwConfig::kChunk);
    table.push_back(e);
  }
  SegattnAdamwParams p = {};
  p.tensors = upload(table), p.chunk_squares = device<double>(chunks), p.result = device<SegattnAdamwResult>(1);
  p.chunks = chunks, p.clip_norm = 1, p.count = (int)table.size();
  p.beta1 = 0.9f, p.beta2 = 0.95f, p.rest1 = 0.1f, p.rest2 = 0.05f, p.root = 3.f, p.eps = 1e-8f;
  vector<std::pair<void*, size_t>> out = {{p.result, sizeof(SegattnAdamwResult)}};
  for (auto& e : table) out.push_back({e.values, e.len * 4}), out.push_back({e.weights, e.len * 2});
  repeat(
      "adamw",
      [&] {
        for (size_t t = 0; t < lens.size(); t++)
          put(table[t].values, w[t]), put(table[t].m, m[t]), put(table[t].v, v[t]);
        adamw_norm_f32<<<chunks, 256, sizeof(AdamwShared)>>>(p);
        adamw_scale_f32<<<1, 1024, sizeof(AdamwShared)>>>(p);
        adamw_update_f32<<<chunks, 256>>>(p);
      },
      out);
  const SegattnAdamwResult result = download(p.result, 1)[0];
  double squares = 0;
  int wrong = 0;
  for (size_t t = 0; t < lens.size(); t++) {
    const auto got = download(table[t].values, lens[t]);
    const auto low = download((uint16_t*)table[t].weights, lens[t]);
    for (int i = 0; i < lens[t]; i++) {
      squares += (double)g[t][i] * g[t][i];
      volatile float gi = g[t][i] * result.clip, a = p.beta1 * m[t][i], b = p.rest1 * gi, mi = a + b;
      volatile float gg = gi * gi, c = p.beta2 * v[t][i], d = p.rest2 * gg, vi = c + d;
      volatile float root = std::sqrt((float)vi) * p.root, below = root + p.eps, ratio = mi / below,
                     step = table[t].step * ratio;
      volatile float kept = table[t].keep * w[t][i], next = kept - step;
      wrong += next != got[i] || to_bf16(next) != low[i];
    }
  }
  const double norm = std::sqrt(squares);
  report("adamw: norm", std::fabs(result.grad_norm / norm - 1) < 1e-12 && result.applied == 1, "error",
         result.grad_norm / norm - 1, 1e-12);
  report("adamw: update", wrong == 0, "elements with other bits than the CPU's", wrong, 0);
  free_all();
}

struct Retrieval {
  SegattnRetrievalParams p = {};
  vector<uint16_t> k, q;
  int tokens, dim;
};

// One head that reads the past, its pool in two chunks.
static Retrieval retrieval_of(int tokens, int dim, int group, int probe_rows, int selected) {
  Retrieval r;
  r.tokens = tokens, r.dim = dim;
  r.k = bf16_values((size_t)tokens * dim, 1), r.q = bf16_values((size_t)probe_rows * group * dim, 2);
  SegattnRetrievalParams& p = r.p;
  p.chunk_tokens = (tokens + 1) / 2;
  const size_t chunk = (size_t)p.chunk_tokens * dim;
  SegattnPoolChunk chunks[2];
  for (auto& c : chunks) c.k = device<uint16_t>(chunk), c.v = device<uint16_t>(chunk);
  p.chunks = upload(vector<SegattnPoolChunk>(chunks, chunks + 2));
  p.head = upload(vector<SegattnPoolHead>{{0, 0, tokens, 512}});
  p.k = p.v = rows_of(upload(r.k), dim);
  p.q = rows_of(upload(r.q), (int64_t)group * dim);
  p.heads = 1, p.head_dim = dim, p.group = group, p.window = 8, p.stride = 4, p.windows = (probe_rows - 8) / 4 + 1,
  p.query_capacity = probe_rows, p.block_len = 8, p.bits = 16;
  p.blocks = tokens / 8, p.max_selected = selected, p.score_pitch = p.blocks, p.rows = tokens;
  p.probes = device<uint16_t>((size_t)3 * group * p.windows * dim), p.scores = device<float>(p.blocks),
  p.selected = device<int32_t>(selected);
  p.selected_count = device<int32_t>(1), p.past_len = device<int32_t>(1);
  return r;
}

// Launches a kernel of retrieval for one call, which lies in the device's memory.
template <class Kernel>
static void retrieve(Kernel kernel, const SegattnRetrievalParams* call, int64_t blocks, int threads,
                     size_t shared_bytes = 0) {
  kernel<<<blocks, threads, shared_bytes>>>(SegattnRetrievalCalls{call, blocks});
}

static void check_retrieval(int tokens, int selected) {
  Retrieval r = retrieval_of(tokens, 128, 4, 64, selected);
  SegattnRetrievalParams& p = r.p;
  const SegattnRetrievalParams* call = upload(vector<SegattnRetrievalParams>{p});
  using C = MeanScores<128>;
  repeat("retrieval",
         [&] {
           retrieve(pool_append_bf16, call, up((int64_t)tokens * 128 / 8, 256), 256);
           retrieve(pool_probes_bf16, call, up(4 * p.windows * 128 / 8, 256), 256);
           retrieve(pool_scores_bf16_d128, call, up(p.blocks, 16), C::kThreads, sizeof(ScoreShared<C>));
           retrieve(pool_select_f32, call, 1, 1024, sizeof(PoolSelectShared));
         },
         {{p.scores, (size_t)p.blocks * 4}, {p.selected, (size_t)std::min(selected, p.blocks) * 4}});
  Numbers exact;
  const int count = 4 * p.windows;
  Numbers probes((size_t)count * 128);
  for (int i = 0; i < count; i++)
    for (int d = 0; d < 128; d++) {
      double sum = 0;
      for (int row = 0; row < 8; row++)
        sum += of_bf16(r.q[((size_t)(i % p.windows * 4 + row) * 4 + i / p.windows) * 128 + d]);
      probes[(size_t)i * 128 + d] = sum / 8;
    }
  for (int b = 0; b < p.blocks; b++) {
    double best = -INFINITY;
    for (int t = b * 8; t < b * 8 + 8; t++)
      for (int i = 0; i < count; i++) {
        double dot = 0;
        for (int d = 0; d < 128; d++) dot += probes[(size_t)i * 128 + d] * of_bf16(r.k[(size_t)t * 128 + d]);
        best = std::max(best, dot);
      }
    exact.push_back(best);
  }
  const auto scores = download(p.scores, p.blocks);
  check_f32("pool_scores", scores, exact, 1e-6);
  vector<int32_t> order(p.blocks);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return scores[a] > scores[b]; });
  order.resize(std::min(selected, p.blocks));
  std::sort(order.begin(), order.end());
  const auto got = download(p.selected, order.size());
  report("pool_select", got == order && download(p.selected_count, 1)[0] == (int)order.size(), "wrong selection",
         got != order, 0);
  free_all();
}

static SegattnSampler sampler_of(float temperature, uint32_t top_k, float top_p) {
  SegattnSampler s = {};
  s.seed = 1, s.stream = 2, s.position = 3, s.temperature = temperature, s.top_p = top_p, s.penalty = 1,
  s.top_k = top_k;
  return s;
}

// Greedy against the host's argmax; the drawn token must be among the k highest; log-probabilities those of the loss.
static void check_sampling(int vocab) {
  const vector<SegattnSampler> samplers = {sampler_of(0, 0, 1), sampler_of(1, 20, 0.9f), sampler_of(0.8f, 0, 0.5f)};
  const int rows = (int)samplers.size();
  const auto logits = values((size_t)rows * vocab, 9);
  SegattnSampleParams p = {};
  p.seen_pitch = up(vocab, 32);
  auto* g_samplers = device<SegattnSampler>(rows);
  p.logits = rows_of(upload(logits), vocab), p.sampler = g_samplers,
  p.seen = upload(vector<uint32_t>(rows * p.seen_pitch, 0));
  p.tokens = device<uint32_t>(rows), p.log_probability = device<float>(rows), p.rows = rows, p.vocab = vocab;
  repeat("sample",
         [&] {
           put(g_samplers, samplers);
           sample_f32<<<rows, row_threads_of(vocab), sizeof(SampleShared)>>>(p);
         },
         {{p.tokens, (size_t)rows * 4}, {p.log_probability, (size_t)rows * 4}});
  const auto tokens = download(p.tokens, rows);
  const float* second = &logits[vocab];
  const auto rank = std::count_if(second, second + vocab, [&](float x) { return x > second[tokens[1]]; });
  const auto highest = std::max_element(logits.begin(), logits.begin() + vocab) - logits.begin();
  report("sample: greedy", (int64_t)tokens[0] == highest, "token", tokens[0], (double)highest);
  report("sample: top-k", rank < 20, "rank", (double)rank, 19);
  SegattnLossParams loss = {};
  loss.logits = p.logits, loss.targets = p.tokens, loss.log_probability = device<float>(rows), loss.rows = rows,
  loss.vocab = vocab;
  cross_entropy_bf16<<<rows, row_threads_of(vocab), sizeof(RowSoftmaxShared)>>>(loss);
  const auto a = download(p.log_probability, rows), b = download(loss.log_probability, rows);
  report("sample: log-probability", a == b, "other bits than the loss", a != b, 0);
  free_all();
}

static void check_sinks(const vector<int>& spans, int heads, int dim);
static void check_divergence(int rows, int vocab, float temperature);

static void check_few() {
  repetitions = 1;
  check_norm(67, 264);
  check_norm_heads(67, 5, 40);
  check_qk_norms(33, 3, 1, 96);
  check_rope(33, 4, 2, 96);
  check_swiglu(21, 344);
  check_sinks({3, 1, 40}, 3, 96);
  check_embedding(90, 264, 20);
  check_loss(3, 5003);
  check_divergence(3, 5003, 2);
  check_adamw({1, 100, 17001});
  check_retrieval(400, 20);
  check_sampling(2003);
}

static void check_all() {
  check_norm(37, 264);
  check_norm(100, 4096);
  check_norm(3, 16384);
  check_norm_heads(300, 3, 104);
  check_norm_heads(2050, 16, 128);
  check_qk_norms(2050, 16, 8, 128);
  check_qk_norms(100, 2, 1, 256);
  check_rope(33, 4, 2, 96);
  check_rope(64, 8, 2, 128);
  check_swiglu(21, 344);
  check_swiglu(16, 11008);
  check_sinks({3, 1, 40}, 3, 96);
  check_sinks({4096, 4096}, 16, 128);
  check_embedding(900, 264, 50);
  check_embedding(500, 4096, 700);
  check_loss(5, 259);
  check_loss(3, 50257);
  check_loss(2, 128256);
  check_divergence(5, 259, 1);
  check_divergence(2, 128256, 1);
  check_divergence(2, 128256, 2);
  check_adamw({1, 100, 16384, 40001, 7});
  check_retrieval(3000, 64);
  check_retrieval(100, 64);
  check_sampling(259);
  check_sampling(128256);
}
