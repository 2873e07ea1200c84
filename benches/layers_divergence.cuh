// The kernel of the divergence from a teacher: checked and timed. Part of layers.cu.
#pragma once

static SegattnDivergenceParams divergence_params(int rows, int vocab, float temperature) {
  SegattnDivergenceParams p = {};
  p.rows = rows, p.vocab = vocab, p.temperature = temperature, p.inverse = 1 / temperature;
  return p;
}

// ln of a row's probabilities at a temperature.
static Numbers log_softmax(const float* row, int vocab, double temperature) {
  const double max = *std::max_element(row, row + vocab) / temperature;
  double sum = 0;
  for (int i = 0; i < vocab; i++) sum += std::exp(row[i] / temperature - max);
  Numbers logs(vocab);
  for (int i = 0; i < vocab; i++) logs[i] = row[i] / temperature - max - std::log(sum);
  return logs;
}

static void check_divergence(int rows, int vocab, float temperature) {
  auto logits = values((size_t)rows * vocab, 1), teacher = values((size_t)rows * vocab, 2);
  for (float& x : logits) x = x * 4 + 30;
  for (float& x : teacher) x = x * 3 - 20;
  vector<uint32_t> targets(rows);
  vector<float> scales(2 * rows);
  for (int r = 0; r < rows; r++)
    targets[r] = (uint32_t)(r * 131 + 7) % vocab, scales[2 * r] = r % 3 * 0.25f, scales[2 * r + 1] = 0.5f;
  SegattnDivergenceParams p = divergence_params(rows, vocab, temperature);
  auto* g_logits = device<float>(logits.size());
  auto* g_scores = device<float>(rows);
  auto* g_divergence = device<float>(rows);
  p.logits = rows_of(g_logits, vocab), p.teacher = rows_of(upload(teacher), vocab), p.targets = upload(targets);
  p.scales = upload(scales), p.log_probability = g_scores, p.divergence = g_divergence;
  p.d_logits = rows_of((uint16_t*)g_logits, 2 * vocab);
  repeat("divergence",
         [&] {
           put(g_logits, logits);
           divergence_bf16<<<rows, row_threads_of(vocab), sizeof(RowSoftmaxShared)>>>(p);
         },
         {{g_logits, logits.size() * 4}, {g_scores, (size_t)rows * 4}, {g_divergence, (size_t)rows * 4}});
  Numbers scores(rows), divergences(rows), d(logits.size());
  vector<uint16_t> got(d.size());
  for (int r = 0; r < rows; r++) {
    const float *row = &logits[(size_t)r * vocab], *known = &teacher[(size_t)r * vocab];
    const Numbers plain = log_softmax(row, vocab, 1), own = log_softmax(row, vocab, temperature);
    const Numbers of_teacher = log_softmax(known, vocab, temperature);
    scores[r] = plain[targets[r]];
    for (int i = 0; i < vocab; i++) {
      const double p_of = std::exp(own[i]), q = std::exp(of_teacher[i]);
      divergences[r] += q * (of_teacher[i] - own[i]);
      d[(size_t)r * vocab + i] =
          scales[2 * r] * (std::exp(plain[i]) - (i == (int)targets[r])) + scales[2 * r + 1] * temperature * (p_of - q);
    }
    const auto low = download((uint16_t*)(g_logits + (size_t)r * vocab), vocab);
    std::copy(low.begin(), low.end(), got.begin() + (size_t)r * vocab);
  }
  check_f32("divergence: log-probability", download(g_scores, rows), scores, 1e-6);
  check_f32("divergence", download(g_divergence, rows), divergences, 1e-5);
  check_bf16("divergence: d_logits", got, d);
  free_all();
}

static void time_divergence(int rows, int vocab, float temperature) {
  const size_t n = (size_t)rows * vocab;
  SegattnDivergenceParams p = divergence_params(rows, vocab, temperature);
  p.logits = rows_of(zeros<float>(n), vocab), p.teacher = rows_of(zeros<float>(n), vocab);
  p.targets = zeros<uint32_t>(rows), p.scales = zeros<float>(2 * rows);
  p.log_probability = zeros<float>(rows), p.divergence = zeros<float>(rows);
  p.d_logits = rows_of(zeros<uint16_t>(n), vocab);
  const int threads = row_threads_of(vocab);
  time_of(temperature == 1 ? "divergence" : "divergence at another temperature", n * (temperature == 1 ? 18. : 22.),
          [&] { divergence_bf16<<<rows, threads, sizeof(RowSoftmaxShared)>>>(p); });
  free_all();
}
