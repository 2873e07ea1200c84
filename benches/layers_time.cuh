// Speed of the layers' kernels at the sizes of a 7B Llama, as a share of a copy's in the same run. Part of layers.cu.
#pragma once

static double copy_speed;  // bytes read plus written, per second

static double seconds_of(const std::function<void()>& run) {
  cudaEvent_t begin, end;
  cudaEventCreate(&begin), cudaEventCreate(&end);
  for (int i = 0; i < 3; i++) run();
  const int count = 20;
  cudaEventRecord(begin);
  for (int i = 0; i < count; i++) run();
  cudaEventRecord(end);
  must(cudaEventSynchronize(end), "timing");
  float milliseconds;
  cudaEventElapsedTime(&milliseconds, begin, end);
  return milliseconds / 1e3 / count;
}

static void time_of(const char* name, double bytes, const std::function<void()>& run) {
  const double seconds = seconds_of(run);
  printf("%-44s %9.1f us", name, seconds * 1e6);
  if (bytes > 0) printf(" %7.0f GB/s  %3.0f%% of a copy", bytes / seconds / 1e9, 100 * bytes / seconds / copy_speed);
  printf("\n");
  fflush(stdout);
}

// Zeros: time does not depend on values here, and a NaN would not be slower either.
template <class T>
static T* zeros(size_t count) {
  T* p = device<T>(count);
  must(cudaMemset(p, 0, count * sizeof(T)), "cudaMemset");
  return p;
}

static void time_norm(int rows, int width) {
  const size_t n = (size_t)rows * width;
  SegattnNormParams p = norm_params(rows, width);
  p.x = rows_of(zeros<uint16_t>(n), width), p.x_sum = rows_of(zeros<uint16_t>(n), width),
  p.y = rows_of(zeros<uint16_t>(n), width);
  p.d_y = rows_of(zeros<uint16_t>(n), width), p.d_x = rows_of(zeros<uint16_t>(n), width);
  p.weight = zeros<float>(width), p.rstd = zeros<float>(rows), p.d_weight = zeros<float>(width);
  const int threads = row_threads_of(width);
  time_of("rms_norm", n * 4., [&] { rms_norm_bf16<<<rows, threads, sizeof(RowShared)>>>(p); });
  SegattnNormParams fused = p;
  fused.residual = p.d_y;
  time_of("rms_norm with residual sum", n * 8., [&] { rms_norm_bf16<<<rows, threads, sizeof(RowShared)>>>(fused); });
  time_of("rms_norm_grad +=", n * 8., [&] { rms_norm_grad_bf16<<<rows, threads, sizeof(RowShared)>>>(p); });
  time_of("rms_norm_weight_grad", n * 4.,
          [&] { rms_norm_weight_grad_bf16<<<up(width, 16), 256, sizeof(ColumnShared)>>>(p); });
  p.rows = 1;
  time_of("rms_norm, one row", 0, [&] { rms_norm_bf16<<<1, threads, sizeof(RowShared)>>>(p); });
  free_all();
}

static void time_norm_heads(int rows, int heads, int dim) {
  const size_t n = (size_t)rows * heads * dim;
  SegattnNormParams p = norm_params(rows, dim);
  p.x = rows_of(zeros<uint16_t>(n), heads * dim), p.d_y = rows_of(zeros<uint16_t>(n), heads * dim);
  p.rstd = zeros<float>((size_t)rows * heads), p.d_weight = zeros<float>(dim);
  p.groups = heads, p.sums = zeros<float>(sums_len(rows, dim));
  const std::string of = ", heads " + std::to_string(heads);
  time_of(("rms_norm_group_sums" + of).c_str(), n * 4. + rows * dim * 4., [&] { group_sums(p); });
  time_of(("rms_norm_chain" + of).c_str(), 0, [&] { chain(p); });
  time_of(("rms_norm_weight_grad" + of).c_str(), n * 4., [&] { group_sums(p), chain(p); });
  free_all();
}

// The norms of q's and k's heads: with the split, and their gradients.
static void time_qk_norms(int rows, int q_heads, int kv_heads, int dim) {
  const int q_width = q_heads * dim, kv_width = kv_heads * dim, width = q_width + 2 * kv_width;
  const auto tensor = [&](int width) { return rows_of(zeros<uint16_t>((size_t)rows * width), width); };
  SegattnQkvParams p = qkv_params(rows, q_heads, kv_heads, dim);
  p.qkv = tensor(width), p.q = tensor(q_width), p.k = tensor(kv_width), p.v = tensor(kv_width);
  p.norms.q_weight = zeros<float>(dim), p.norms.k_weight = zeros<float>(dim), p.norms.eps = 1e-6f;
  p.norms.q_rstd = zeros<float>((size_t)rows * q_heads), p.norms.k_rstd = zeros<float>((size_t)rows * kv_heads);
  const int blocks = up((int64_t)rows * width / 16, 256);
  const int norm_blocks = up(head_lanes(rows, q_heads + 2 * kv_heads, dim), 256);
  time_of("split_qkv without raw k", 4. * rows * width, [&] { split_qkv_bf16<<<blocks, 256>>>(p); });
  time_of("split_qkv_norm without raw k", 4. * rows * width, [&] { split_qkv_norm_bf16<<<norm_blocks, 256>>>(p); });
  SegattnHeadNormsParams grad = {};
  grad.d_y = p.qkv, grad.x = tensor(width), grad.d_x = tensor(width), grad.norms = p.norms;
  grad.rows = rows, grad.q_heads = q_heads, grad.kv_heads = kv_heads, grad.head_dim = dim;
  time_of("head_norms_grad", 6. * rows * width - 2. * rows * kv_width,
          [&] { head_norms_grad_bf16<<<norm_blocks, 256>>>(grad); });
  SegattnNormParams q = norm_params(rows, dim);
  q.x = grad.x, q.d_y = grad.d_y, q.rstd = p.norms.q_rstd, q.groups = q_heads;
  q.d_weight = zeros<float>(dim), q.sums = zeros<float>(sums_len(rows, dim));
  SegattnNormParams k = q;
  k.x.data = (uint16_t*)q.x.data + q_width, k.d_y.data = (uint16_t*)q.d_y.data + q_width;
  k.rstd = p.norms.k_rstd, k.groups = kv_heads;
  k.d_weight = zeros<float>(dim), k.sums = zeros<float>(sums_len(rows, dim));
  time_of("weight gradients of q's and k's norms", 4. * rows * (q_width + kv_width),
          [&] { group_sums(q, &k), chain(q, &k); });
  free_all();
}

static void time_rope(int rows, int q_heads, int kv_heads, int dim) {
  SegattnQkvParams p = qkv_params(rows, q_heads, kv_heads, dim);
  const int q_width = q_heads * dim, kv_width = kv_heads * dim, width = q_width + 2 * kv_width;
  const auto tensor = [&](int width) { return rows_of(zeros<uint16_t>((size_t)rows * width), width); };
  p.qkv = tensor(width), p.q = tensor(q_width), p.k = tensor(kv_width), p.raw_k = tensor(kv_width),
  p.v = tensor(kv_width);
  const int blocks = up((int64_t)rows * width / 16, 256);
  time_of("split_qkv", 2. * rows * (2 * width + kv_width), [&] { split_qkv_bf16<<<blocks, 256>>>(p); });
  time_of("join_qkv", 4. * rows * width, [&] { join_qkv_bf16<<<blocks, 256>>>(p); });
  SegattnRopeParams one = {};
  one.src = one.dst = p.q;
  one.cos = p.cos, one.sin = p.sin, one.angles = p.angles, one.rows = rows, one.heads = q_heads, one.head_dim = dim;
  time_of("rope", 4. * rows * q_width, [&] { rope_bf16<<<up((int64_t)rows * q_width / 16, 256), 256>>>(one); });
  free_all();
}

static void time_swiglu(int rows, int inner) {
  const size_t n = (size_t)rows * inner;
  SegattnSwigluParams p = {};
  p.gate_up = rows_of(zeros<uint16_t>(2 * n), 2 * inner), p.y = rows_of(zeros<uint16_t>(n), inner),
  p.d_y = rows_of(zeros<uint16_t>(n), inner);
  p.d_gate_up = rows_of(zeros<uint16_t>(2 * n), 2 * inner), p.rows = rows, p.inner = inner;
  const int blocks = up(n / 8, 256);
  time_of("swiglu", n * 6., [&] { swiglu_bf16<<<blocks, 256>>>(p); });
  time_of("swiglu_grad with y", n * 12., [&] { swiglu_grad_bf16<<<blocks, 256>>>(p); });
  p.y.data = nullptr;
  time_of("swiglu_grad", n * 10., [&] { swiglu_grad_bf16<<<blocks, 256>>>(p); });
  free_all();
}

static void time_embedding(int rows, int width, int vocab) {
  // As in text, some tokens are frequent: rank r about 1 / r of the time.
  vector<uint32_t> tokens(rows);
  for (int r = 0; r < rows; r++) tokens[r] = (uint32_t)std::pow(vocab, (r * 7919 % rows + 0.5) / rows) - 1;
  vector<int32_t> order, starts;
  sort_tokens(tokens, order, starts);
  SegattnEmbedParams p = {};
  p.table = rows_of(zeros<uint16_t>((size_t)vocab * width), width), p.tokens = upload(tokens);
  p.y = rows_of(zeros<uint16_t>((size_t)rows * width), width),
  p.d_table = rows_of(zeros<float>((size_t)vocab * width), width);
  p.order = upload(order), p.run_start = upload(starts), p.rows = rows, p.runs = (int)starts.size() - 1,
  p.width = width;
  time_of("embed", 4. * rows * width, [&] { embed_bf16<<<up((int64_t)rows * width / 8, 256), 256>>>(p); });
  time_of("embed_grad", 2. * rows * width + 8. * p.runs * width,
          [&] { embed_grad_bf16<<<up((int64_t)p.runs * up(width, 256), 4), 128>>>(p); });
  free_all();
}

static void time_loss(int rows, int vocab) {
  const size_t n = (size_t)rows * vocab;
  SegattnLossParams p = {};
  p.logits = rows_of(zeros<float>(n), vocab), p.targets = zeros<uint32_t>(rows), p.log_probability = zeros<float>(rows);
  p.rows = rows, p.vocab = vocab, p.scales = zeros<float>(rows);
  const int threads = row_threads_of(vocab);
  time_of("cross_entropy", n * 4., [&] { cross_entropy_bf16<<<rows, threads, sizeof(RowSoftmaxShared)>>>(p); });
  p.d_logits = rows_of(zeros<uint16_t>(n), vocab);
  time_of("cross_entropy with gradient", n * 10.,
          [&] { cross_entropy_bf16<<<rows, threads, sizeof(RowSoftmaxShared)>>>(p); });
  free_all();
}

static void time_adamw(int64_t len) {
  vector<SegattnAdamwTensor> table(16);
  const int64_t chunks = up(len, AdamwConfig::kChunk);
  for (size_t t = 0; t < table.size(); t++) {
    SegattnAdamwTensor& e = table[t];
    e.values = zeros<float>(len), e.grads = zeros<float>(len), e.m = zeros<float>(len), e.v = zeros<float>(len),
    e.weights = zeros<uint16_t>(len);
    e.len = len, e.first_chunk = t * chunks, e.step = 1e-3f, e.keep = 1, e.floor = -1, e.changes = 1;
  }
  SegattnAdamwParams p = {};
  p.tensors = upload(table), p.chunks = chunks * 16, p.chunk_squares = zeros<double>(p.chunks),
  p.result = zeros<SegattnAdamwResult>(1);
  p.clip_norm = 1, p.count = 16, p.beta1 = 0.9f, p.beta2 = 0.95f, p.root = 1, p.eps = 1e-8f;
  const double n = (double)len * 16;
  time_of("adamw_norm", n * 4, [&] { adamw_norm_f32<<<p.chunks, 256, sizeof(AdamwShared)>>>(p); });
  time_of("adamw_scale", 0, [&] { adamw_scale_f32<<<1, 1024, sizeof(AdamwShared)>>>(p); });
  time_of("adamw_update", n * 30, [&] { adamw_update_f32<<<p.chunks, 256>>>(p); });
  free_all();
}

static void time_retrieval(int tokens) {
  using C = MeanScores<128>;
  for (const int group : {1, 4}) {
    const SegattnRetrievalParams p = retrieval_of(tokens, 128, group, 64, 64).p;
    const SegattnRetrievalParams* call = upload(vector<SegattnRetrievalParams>{p});
    const auto append = [&] { retrieve(pool_append_bf16, call, up((int64_t)tokens * 128 / 8, 256), 256); };
    if (group == 1) time_of("pool_append", 8. * tokens * 128, append);
    else append();
    retrieve(pool_probes_bf16, call, up(group * p.windows * 128 / 8, 256), 256);
    time_of(group == 1 ? "pool_scores, 15 probes" : "pool_scores, 60 probes", 2. * tokens * 128,
            [&] { retrieve(pool_scores_bf16_d128, call, up(p.blocks, 16), C::kThreads, sizeof(ScoreShared<C>)); });
    if (group == 1)
      time_of("pool_select, 64 of all blocks", 0,
              [&] { retrieve(pool_select_f32, call, 1, 1024, sizeof(PoolSelectShared)); });
    free_all();
  }
}

static void time_sampling(int rows, int vocab) {
  const struct {
    const char* name;
    SegattnSampler sampler;
  } cases[] = {{"sample, greedy", sampler_of(0, 0, 1)},
               {"sample, temperature", sampler_of(1, 0, 1)},
               {"sample, top-k 40", sampler_of(1, 40, 1)},
               {"sample, top-k 40 and top-p 0.9", sampler_of(1, 40, 0.9f)}};
  SegattnSampleParams p = {};
  p.seen_pitch = up(vocab, 32);
  p.logits = rows_of(upload(values((size_t)rows * vocab, 3)), vocab), p.seen = zeros<uint32_t>(rows * p.seen_pitch);
  p.tokens = zeros<uint32_t>(rows), p.log_probability = zeros<float>(rows), p.rows = rows, p.vocab = vocab;
  for (const auto& c : cases) {
    p.sampler = upload(vector<SegattnSampler>(rows, c.sampler));
    const std::string name = std::string(c.name) + ", rows " + std::to_string(rows);
    time_of(name.c_str(), 0, [&] { sample_f32<<<rows, row_threads_of(vocab), sizeof(SampleShared)>>>(p); });
  }
  free_all();
}

static void time_sinks(const vector<int>& spans, int heads, int dim);
static void time_divergence(int rows, int vocab, float temperature);

static void time_all() {
  const size_t bytes = (size_t)1 << 30;
  char *from = zeros<char>(bytes), *to = zeros<char>(bytes);
  copy_speed = 2. * bytes / seconds_of([&] { cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice); });
  printf("copy %.0f GB/s, read plus written\n", copy_speed / 1e9);
  free_all();
  time_norm(16384, 4096);
  time_norm(16384, 2048);
  time_norm_heads(8192, 16, 128);
  time_norm_heads(8192, 8, 128);
  time_qk_norms(8192, 16, 8, 128);
  time_qk_norms(8, 16, 8, 128);
  time_qk_norms(1, 16, 8, 128);
  time_rope(16384, 32, 8, 128);
  time_swiglu(8192, 11008);
  time_sinks({4096, 4096}, 16, 128);
  time_sinks(vector<int>(8, 1), 16, 128);
  time_embedding(16384, 4096, 32000);
  time_loss(1024, 128256);
  time_loss(128, 32000);
  time_divergence(1024, 128256, 1);
  time_divergence(1024, 128256, 2);
  time_adamw(1 << 24);
  time_retrieval(1 << 20);
  time_sampling(1, 128256);
  time_sampling(64, 128256);
}
