// Runs the kernels of csrc/cuda on the emulator beside those of csrc/cpu, on random batches of which most are broken in some
// way: nothing is read or written outside a tensor, and both write the same, to the bit. Built with sanitizers by
// tests/test_cuda_sanitized.py.
//
//   sanitized                   the names of the ops
//   sanitized OP CASES [SEED]   runs one
#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>

#include "../random_cases.h"
#include "cpu/block_map.h"
#include "cpu/dense.h"
#include "cuda/block_map.h"
#include "cuda/dense.h"
#include "cuda/intervals.h"
#include "cuda/merge.h"
#include "cuda/merge_backward.h"
#include "cuda/merge_tokens.h"
#include "cuda/plan.h"

namespace {

// --- what is compared ------------------------------------------------------------------------------------------------

[[noreturn]] void differ(const char* what, size_t at, int64_t found, int64_t expected) {
  std::fprintf(stderr, "%s: at %zu: %lld, on the CPU %lld\n", what, at, static_cast<long long>(found),
               static_cast<long long>(expected));
  std::abort();
}

template <class Value>
void same(const std::vector<Value>& found, const std::vector<Value>& expected, const char* what) {
  for (size_t i = 0; i < expected.size(); ++i) {
    if (found[i] != expected[i]) differ(what, i, static_cast<int64_t>(found[i]), static_cast<int64_t>(expected[i]));
  }
}

// Gaps between rows too: nobody has written there.
void same(const Rows& found, const Rows& expected, const char* what) {
  for (size_t i = 0; i < found.bytes; ++i) {
    if (found.memory[i] != expected.memory[i]) differ(what, i, found.memory[i], expected.memory[i]);
  }
}

// The status of the device, which holds an error already now and then.
struct Status {
  std::vector<int64_t> record = std::vector<int64_t>(8, 0);

  void expect(const Record& error, const char* what) const {
    same(record, {error.code, error.sample, error.kind, error.placeholders, error.rows, error.total_placeholders,
                  error.total_rows, error.extra}, what);
  }
};

// Memory of the size that a call asks for, filled with anything.
struct Workspace {
  explicit Workspace(int64_t bytes) : numbers(many<int64_t>((bytes + 7) / 8, INT64_MIN, INT64_MAX)) {}
  void* data() { return numbers.empty() ? nullptr : numbers.data(); }
  std::vector<int64_t> numbers;
};

template <class Value>
std::vector<Value> poison(int64_t count) {
  return std::vector<Value>(static_cast<size_t>(count), static_cast<Value>(0x5a5a5a5a5a5a5a5aLL));
}

// --- rows ------------------------------------------------------------------------------------------------------------

template <class Element>
void put(char* to, double value) {
  const Element element = narrow<Element>(static_cast<float>(value));
  std::memcpy(to, &element, sizeof element);
}

// Numbers that need all the bits of their type, so that one rounding more or less shows.
void fill(Rows& rows) {
  const int64_t size = size_of(rows.table.dtype);
  std::uniform_real_distribution<double> numbers(-4, 4);
  for (int64_t at = 0; at + size <= static_cast<int64_t>(rows.bytes); at += size) {
    char* to = rows.memory.get() + at;
    const double value = numbers(generator);
    switch (rows.table.dtype) {
      case DType::kF32: put<float>(to, value); break;
      case DType::kBF16: put<bf16>(to, value); break;
      case DType::kF16: put<f16>(to, value); break;
      case DType::kF64: std::memcpy(to, &value, sizeof value); break;
    }
  }
}

Rows copy_of(const Rows& rows) {
  Rows copy;
  copy.bytes = rows.bytes;
  copy.table = rows.table;
  copy.memory.reset(new char[rows.bytes]);
  std::memcpy(copy.memory.get(), rows.memory.get(), rows.bytes);
  copy.table.data = copy.memory.get() + (rows.table.data - rows.memory.get());
  return copy;
}

int64_t any_dim() {
  if (chance(10)) return any(0, 1);
  return chance(50) ? 8 * any(1, 90) : any(1, 700);
}

// All of one type half of the time: rows are then copied.
DType dtype_like(DType common, bool alike) { return alike ? common : any_dtype(); }

struct RandomRows {
  // now and then more than a block looks at in one round
  int64_t groups = any(0, 3), width = chance(5) ? any(100, 400) : (chance(2) ? any(2100, 4000) : any(0, 9));
  int64_t rows = groups * width;
  int64_t tokens = any(0, 20), features = 0, dim = rows > 200 ? any(1, 40) : any_dim();
  bool add = chance(45), from_weight = chance(40), scaled = from_weight && chance(50);
  DType common = any_dtype();
  bool alike = chance(50), doubles = chance(20);
  std::vector<int64_t> ids = many<int64_t>(tokens, -1, 12);
  std::vector<int32_t> source, text_index;
  std::vector<Rows> tables;
  std::vector<int64_t> starts;

  RandomRows() {
    const int64_t count = chance(10) ? any(45, 100) : any(0, 3);
    for (int64_t i = 0; i < count; ++i) {
      tables.push_back(rows_of(any(0, 3), any(0, 6), dim, source_dtype(), chance(50)));
      fill(tables.back());
      starts.push_back(features);
      features += tables.back().table.rows + any(0, 1);
    }
    const bool broken = chance(30);
    source = many<int32_t>(rows, broken ? INT32_MIN : -tokens - 2, broken ? INT32_MAX : features + 1);
    text_index = many<int32_t>(rows, broken ? INT32_MIN : -1, broken ? INT32_MAX : tokens);
    if (chance(60)) ascend();
  }

  // Sums are in fp64 where any source is: all of them here, because the CPU asks only the sources of a row.
  DType source_dtype() const {
    if (alike || !add) return dtype_like(common, alike);
    return doubles ? DType::kF64 : static_cast<DType>(any(0, 2));
  }

  const int32_t* text_of_rows() const { return add && !text_index.empty() && tokens % 4 != 0 ? text_index.data() : nullptr; }

 private:
  // As a plan writes it: every token and every feature row once, in order; a token may stand for several rows.
  void ascend() {
    int32_t token = 0, feature = 0;
    for (size_t i = 0; i < source.size(); ++i) {
      const bool image = chance(60) && feature < features;
      source[i] = image ? feature++ : (token < tokens ? -1 - token : kPad);
      text_index[i] = token < tokens ? token : -1;
      if (!(image && chance(70))) ++token;
    }
  }
};

void run_rows() {
  RandomRows random;
  Rows expected = rows_of(random.groups, random.width, random.dim, random.common, chance(50));
  expected.table.step = size_of(random.common);
  std::memset(expected.memory.get(), 0x5a, expected.bytes);
  Rows found = copy_of(expected);
  const int64_t vocabulary = any(0, 12);
  Rows text = rows_of(1, random.from_weight ? vocabulary : random.tokens, random.dim, random.source_dtype(), chance(50));
  fill(text);
  Merge merge;
  for (size_t i = 0; i < random.tables.size(); ++i) merge.features.append(random.tables[i].table, random.starts[i], random.dim);
  merge.dim = random.dim;
  merge.source_index = random.source.data();
  merge.text_index = random.text_of_rows();
  merge.add = random.add;
  merge.text = text.table;
  if (random.from_weight) merge.tokens = integers(random.ids);
  merge.token_count = random.tokens;
  merge.scaled = random.scaled;
  merge.scale = 1.7;
  merge.only_features = !random.from_weight && chance(20);
  Status status, checked;
  merge.out = found.table;
  cuda::merge_rows(merge, chance(30) ? nullptr : status.record.data(), nullptr);
  cuda::check_tokens(merge, checked.record.data(), nullptr);
  merge.out = expected.table;
  merge_rows(merge);
  same(found, expected, "rows");
  const bool empty = merge.out.rows == 0 || merge.dim == 0;
  const Record error = empty ? Record{} : check_tokens(merge);
  if (status.record[0] != kFine || !empty) checked.expect(error, "the check of token ids");
  if (status.record[0] != kFine) status.expect(error, "the status of the rows");
}

void run_rows_backward() {
  RandomRows random;
  Rows grad = rows_of(random.groups, random.width, random.dim, random.common, chance(50));
  fill(grad);
  MergeBackward backward;
  backward.grad = grad.table;
  backward.dim = random.dim;
  backward.source_index = random.source.data();
  backward.text_index = random.text_of_rows();
  backward.add = random.add;
  backward.tokens = random.from_weight ? integers(random.ids) : Integers{};
  backward.token_count = random.tokens;
  backward.scaled = random.scaled;
  backward.scale = 1.7;
  backward.wants_text = !random.from_weight && chance(80);
  backward.wants_weight = random.from_weight;

  std::vector<Rows> expected, found;
  auto wanted = [&](int64_t rows) {
    expected.push_back(rows_of(1, rows, random.dim, dtype_like(random.common, random.alike), true));
    std::memset(expected.back().memory.get(), 0x5a, expected.back().bytes);
    found.push_back(copy_of(expected.back()));
    return Gradient{expected.back().table.data, rows, expected.back().table.dtype};
  };
  if (backward.wants_text) backward.text = wanted(random.tokens);
  if (backward.wants_weight) backward.weight = wanted(any(0, 12));
  for (size_t i = 0; i < random.tables.size(); ++i) {
    const int64_t own = random.tables[i].table.rows;
    if (chance(80) && own > 0) backward.features.push_back({wanted(own + any(0, 2)), random.starts[i], own});
  }
  merge_rows_backward(backward);

  size_t next = 0;
  auto on_device = [&](Gradient& gradient) { gradient.data = found[next++].table.data; };
  if (backward.wants_text) on_device(backward.text);
  if (backward.wants_weight) on_device(backward.weight);
  for (FeatureGradient& feature : backward.features) on_device(feature.out);
  cuda::merge_rows_backward(backward, nullptr);
  if (backward.wants_weight) {
    auto ids = poison<int32_t>(random.rows);
    cuda::weight_ids(backward, ids.data(), nullptr);
    std::vector<int64_t> order(ids.size());
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return ids[static_cast<size_t>(a)] < ids[static_cast<size_t>(b)]; });
    std::stable_sort(ids.begin(), ids.end());
    cuda::weight_gradient(backward, ids.data(), order.data(), false, nullptr);
  }
  for (size_t i = 0; i < found.size(); ++i) same(found[i], expected[i], "a gradient");
}

// --- masks -----------------------------------------------------------------------------------------------------------

// Ids as a plan writes them: documents and images in runs, some rows of padding.
std::vector<int32_t> runs(int64_t groups, int64_t width, int64_t longest, int padding) {
  std::vector<int32_t> ids(static_cast<size_t>(groups * width));
  for (int64_t g = 0; g < groups; ++g) {
    int32_t id = 0;
    for (int64_t at = 0; at < width; ++id) {
      const int64_t end = std::min(width, at + any(1, longest));
      const bool absent = chance(padding);
      for (; at < end; ++at) ids[static_cast<size_t>(g * width + at)] = absent ? -1 : id;
    }
  }
  return ids;
}

struct RandomIds {
  int64_t groups = any(0, 4), width = chance(4) ? any(4000, 9000) : (chance(10) ? any(100, 1100) : any(0, 12));
  std::vector<int32_t> documents, images;

  RandomIds() {
    if (width > 2000 && groups > 2) groups = 2;
    const int64_t longest = chance(50) ? 5 : 2000;
    documents = chance(40) ? many<int32_t>(groups * width, -1, 3) : runs(groups, width, longest, 10);
    images = chance(40) ? many<int32_t>(groups * width, -1, 2) : runs(groups, width, longest / 2, 50);
    if (chance(30)) punch(documents);
  }

 private:
  // Padding inside documents.
  static void punch(std::vector<int32_t>& ids) {
    for (int32_t& id : ids) {
      if (chance(3)) id = -1;
    }
  }
};

void run_intervals() {
  RandomIds ids;
  RandomMask random(ids.documents, ids.images, ids.groups, ids.width);
  const int64_t count = ids.groups * ids.width;
  const bool pair = chance(70);
  std::vector<int32_t> found[4], expected[4];
  for (int i = 0; i < 4; ++i) found[i] = expected[i] = poison<int32_t>(count);
  auto out = [&](std::vector<int32_t>* parts) {
    return MaskOut{parts[0].data(), parts[1].data(), pair ? parts[2].data() : nullptr, pair ? parts[3].data() : nullptr};
  };
  Workspace workspace(cuda::intervals_workspace(random.rows));
  Status status;
  cuda::intervals(random.rows, out(found), workspace.data(), status.record.data(), nullptr);
  MaskRows on_host = random.rows;
  if (on_host.one_prefix) {
    on_host.prefix = static_cast<int32_t>(std::clamp<int64_t>(on_host.prefix_lengths[0], 0, kNoLimit));
    on_host.prefix_lengths = nullptr;
  }
  const MaskResult result = intervals(on_host, out(expected));
  status.expect(result.error, "the status of the intervals");
  if (result.error.code != kFine) return;
  for (int i = 0; i < 4; ++i) same(found[i], expected[i], "intervals");
}

// Intervals of any numbers whatever, or as masks have them.
struct RandomIntervals {
  int64_t samples = any(0, 3), rows = chance(10) ? any(100, 300) : any(0, 20);
  int64_t keys = chance(10) ? any(300, 1100) : any(0, 40);
  std::vector<int32_t> bounds[4];
  MaskIntervals mask;

  RandomIntervals() {
    const int64_t count = samples * rows;
    for (auto& bound : bounds) bound = many<int32_t>(count, chance(5) ? INT32_MIN : -2, chance(5) ? INT32_MAX : keys + 2);
    if (chance(50)) {
      for (size_t i = 0; i < bounds[0].size(); ++i) {
        bounds[0][i] = static_cast<int32_t>(any(0, 3));
        bounds[1][i] = static_cast<int32_t>(i % static_cast<size_t>(rows)) + 1;
      }
    }
    mask.samples = samples;
    mask.rows = rows;
    mask.keys = keys;
    mask.lo = bounds[0].data();
    mask.hi = bounds[1].data();
    if (!chance(60)) return;
    mask.lo2 = bounds[2].data();
    mask.hi2 = bounds[3].data();
  }
};

void run_elements(const RandomIntervals& random) {
  const int64_t size = int64_t{1} << any(0, 3);
  const DenseElement element = {size, static_cast<uint64_t>(any(0, INT64_MAX)), static_cast<uint64_t>(any(0, INT64_MAX))};
  DenseElement repeated = element;
  for (int64_t bytes = size; bytes < 8; bytes *= 2) {
    const uint64_t low = (uint64_t{1} << (8 * bytes)) - 1;
    repeated.seen = (repeated.seen & low) | (repeated.seen & low) << (8 * bytes);
    repeated.unseen = (repeated.unseen & low) | (repeated.unseen & low) << (8 * bytes);
  }
  auto found = poison<char>(random.samples * random.rows * random.keys * size), expected = found;
  cuda::dense(random.mask, repeated, found.data(), nullptr);
  dense(random.mask, repeated, expected.data());
  same(found, expected, "a dense mask");
}

void run_bits(const RandomIntervals& random) {
  auto found = poison<uint8_t>(random.samples * ((random.rows * random.keys + 7) / 8)), expected = found;
  cuda::bits(random.mask, found.data(), nullptr);
  bits(random.mask, expected.data());
  same(found, expected, "a mask of bits");
}

void run_dense() {
  RandomIntervals random;
  run_elements(random);
  run_bits(random);
}

void run_block_map() {
  RandomIntervals random;
  const Blocks blocks = {chance(10) ? INT32_MAX : any(1, 40), chance(10) ? INT32_MAX : any(1, 40)};
  const int64_t lines = block_count(random.rows, blocks.q_size), columns = block_count(random.keys, blocks.kv_size);
  std::vector<int32_t> found[8], expected[8];
  for (int i = 0; i < 8; i += 2) {
    const int64_t outer = random.samples * (i < 4 ? lines : columns);
    found[i] = expected[i] = poison<int32_t>(outer);
    found[i + 1] = expected[i + 1] = poison<int32_t>(outer * (i < 4 ? columns : lines));
  }
  auto out = [](std::vector<int32_t>* lists) {
    auto pair = [&](int i) { return BlockLists{lists[i].data(), lists[i + 1].data()}; };
    return BlockMapOut{pair(0), pair(2), pair(4), pair(6)};
  };
  Workspace workspace(cuda::block_map_workspace(random.mask, blocks));
  cuda::block_map(random.mask, blocks, out(found), workspace.data(), nullptr);
  block_map(random.mask, blocks, out(expected));
  for (int i = 0; i < 8; ++i) same(found[i], expected[i], "a block map");
}

// --- plans -----------------------------------------------------------------------------------------------------------

// The facts of a plan, each in memory of its own.
struct FactMemory {
  std::vector<int32_t> source, text_index, document_ids, image_ids, cu_seqlens;
  std::vector<int64_t> position_ids, labels;
  std::vector<int8_t> kind_ids;
  std::vector<uint8_t> attention_mask;

  FactMemory(int64_t rows, int64_t sequences)
      : source(poison<int32_t>(rows)), text_index(source), document_ids(source), image_ids(source),
        cu_seqlens(poison<int32_t>(sequences + 1)), position_ids(poison<int64_t>(rows)), labels(position_ids),
        kind_ids(poison<int8_t>(rows)), attention_mask(poison<uint8_t>(rows)) {}

  // Those that `wanted` has a bit for.
  Facts facts(int64_t sequences, int64_t wanted) {
    Facts out;
    auto choose = [&](int bit, auto& memory) { return wanted >> bit & 1 ? memory.data() : nullptr; };
    out.text_index = choose(0, text_index);
    out.position_ids = choose(1, position_ids);
    out.document_ids = choose(2, document_ids);
    out.image_ids = choose(3, image_ids);
    out.kind_ids = choose(4, kind_ids);
    out.attention_mask = choose(5, attention_mask);
    out.labels = choose(6, labels);
    out.cu_seqlens = choose(7, cu_seqlens);
    out.sequences = sequences;
    return out;
  }
};

void same(const FactMemory& found, const FactMemory& expected) {
  same(found.source, expected.source, "source_index");
  same(found.text_index, expected.text_index, "text_index");
  same(found.position_ids, expected.position_ids, "position_ids");
  same(found.document_ids, expected.document_ids, "document_ids");
  same(found.image_ids, expected.image_ids, "image_ids");
  same(found.kind_ids, expected.kind_ids, "kind_ids");
  same(found.attention_mask, expected.attention_mask, "attention_mask");
  same(found.labels, expected.labels, "labels");
  same(found.cu_seqlens, expected.cu_seqlens, "cu_seqlens");
}

// For a case that fails: VLM_FUSE_SHOW_CASES=1.
bool showing() { return std::getenv("VLM_FUSE_SHOW_CASES") != nullptr; }

template <class Values>
void show(const char* name, const Values& values, int64_t count) {
  std::fprintf(stderr, "%s:", name);
  for (int64_t i = 0; i < count; ++i) std::fprintf(stderr, " %lld", static_cast<long long>(values[i]));
  std::fprintf(stderr, "\n");
}

void show(const Batch& batch) {
  const int64_t count = batch.samples * batch.length;
  std::fprintf(stderr, "%lld samples of %lld, scheme %d, layout %d, left %d, unused %d\n", static_cast<long long>(batch.samples),
               static_cast<long long>(batch.length), static_cast<int>(batch.scheme), static_cast<int>(batch.layout), batch.left, batch.unused);
  show("tokens", batch.tokens, count);
  if (batch.attention_mask) show("attention_mask", batch.attention_mask, count);
  if (batch.document_ids) show("document_ids", batch.document_ids, count);
  for (const Kind& kind : batch.kinds) {
    const int64_t numbers[] = {kind.token, kind.first_row, kind.rows, kind.images, kind.rows_each};
    show("kind: token, first_row, rows, images, rows_each", numbers, 5);
    if (kind.sizes != nullptr) show("  sizes", kind.sizes, kind.images);
    if (kind.counts != nullptr) show("  counts", kind.counts, batch.samples);
  }
}

// Whether it has an answer: no caller hands in other batches, and kernels need only survive them.
bool answerable(const Batch& batch) {
  if (batch.scheme == Scheme::kImagesFirst && batch.document_ids) return false;
  for (const Kind& kind : batch.kinds) {
    int64_t rows = 0;
    for (int64_t i = 0; i < kind.images; ++i) rows += kind.size(i);
    if (kind.sizes_known() && rows != kind.rows) return false;
    for (int64_t b = 0; kind.counts != nullptr && b < batch.samples; ++b) {
      if (kind.counts[b] < 0) return false;
    }
  }
  return true;
}

void run_plan() {
  RandomBatch random;
  const Batch& batch = random.batch;
  if (showing()) show(batch);
  std::vector<int64_t> placeholders(batch.kinds.size());
  const Counts counts = count(batch, placeholders.data());
  std::vector<int64_t> expected_totals = {counts.widest, counts.rows, counts.documents};
  expected_totals.insert(expected_totals.end(), placeholders.begin(), placeholders.end());
  auto totals = poison<int64_t>(static_cast<int64_t>(expected_totals.size()));
  Workspace for_counts(8 * cuda::plan_scratch(batch, false));
  cuda::count(batch, totals.data(), for_counts.numbers.data(), nullptr);
  if (!batch.document_ids) totals[2] = counts.documents;  // nobody asks
  const bool compared = answerable(batch);
  if (compared) same(totals, expected_totals, "counts");

  const int64_t width = random.width(counts), groups = batch.layout == Layout::kPacked ? 1 : batch.samples;
  const int64_t sequences = batch.document_ids ? std::max<int64_t>(0, counts.documents + any(-2, 2)) : batch.samples;
  const int64_t wanted = chance(50) ? 255 : any(0, 255);
  const bool check = chance(80);
  FactMemory found(groups * width, sequences), expected(groups * width, sequences);
  const Record error = plan(batch, width, true, expected.source.data());
  facts(batch, width, expected.facts(sequences, wanted));
  Status status;
  cuda::PlanOutputs out;
  out.width = width;
  out.source_index = found.source.data();
  out.facts = found.facts(sequences, wanted);
  out.fresh = chance(50);
  if (out.fresh) status.record = poison<int64_t>(8);
  if (check) out.status = status.record.data();
  Workspace scratch(8 * cuda::plan_scratch(batch, check));
  cuda::plan(batch, out, scratch.numbers.data(), nullptr);
  if (!compared) return;
  if (check) status.expect(error, "the status of the plan");
  if (error.code != kFine) return;
  same(found, expected);
}

// --- the usual batch in one launch -----------------------------------------------------------------------------------

// What one launch serves, see cuda/merge_tokens.h.
struct UsualBatch {
  static constexpr int64_t kPlaceholder = 9;
  std::vector<int32_t> short_tokens, short_labels;
  std::vector<int64_t> long_tokens, long_labels;
  std::vector<uint8_t> attention;
  Batch batch;

  UsualBatch() {
    const bool many_samples = chance(5), long_samples = chance(10);
    batch.samples = many_samples ? any(20, 1024) : any(1, 5);
    batch.length = many_samples ? any(1, 3) : (long_samples ? any(300, 1500) : any(1, 40));
    const int64_t count = batch.samples * batch.length;
    long_tokens = many<int64_t>(count, chance(20) ? -1 : 0, 8);
    const int64_t each = chance(50) ? any(1, 6) : 0;
    const int64_t placeholders = each > 0 ? put_images(each) : put_anywhere();
    short_tokens.assign(long_tokens.begin(), long_tokens.end());
    batch.tokens = chance(50) ? integers(short_tokens) : integers(long_tokens);
    attention = many<uint8_t>(count, 0, 3);
    if (chance(50)) batch.attention_mask = integers(attention);
    short_labels = many<int32_t>(count, -100, 9);
    long_labels.assign(short_labels.begin(), short_labels.end());
    batch.labels = chance(50) ? integers(short_labels) : integers(long_labels);
    batch.layout = chance(50) ? Layout::kKeep : Layout::kPacked;
    batch.left = chance(50);
    batch.unused = each == 0 && chance(30);
    Kind kind{};
    kind.token = kPlaceholder;
    kind.rows = chance(80) ? placeholders : any(0, placeholders + 5);
    if (each > 0) kind.rows = kind.rows / each * each;
    kind.images = each > 0 ? kind.rows / each : -1;
    kind.rows_each = each > 0 ? each : -1;
    batch.kinds.push_back(kind);
  }

 private:
  int64_t put_anywhere() {
    int64_t placeholders = 0;
    for (int64_t& token : long_tokens) {
      if (!chance(40)) continue;
      token = kPlaceholder;
      ++placeholders;
    }
    return placeholders;
  }

  // Whole images, of which one now and then crosses into the next sample.
  int64_t put_images(int64_t each) {
    int64_t placeholders = 0;
    const auto count = static_cast<int64_t>(long_tokens.size());
    for (int64_t at = any(0, 3); at + each <= count; at += each + any(0, 5)) {
      if (at / batch.length != (at + each - 1) / batch.length && !chance(3)) continue;
      for (int64_t i = 0; i < each; ++i) long_tokens[static_cast<size_t>(at + i)] = kPlaceholder;
      placeholders += each;
    }
    return placeholders;
  }
};

void run_merge_tokens() {
  UsualBatch random;
  const Batch& batch = random.batch;
  if (showing()) show(batch);
  int64_t placeholders = 0;
  const Counts counts = count(batch, &placeholders);
  const bool packed = batch.layout == Layout::kPacked;
  const int64_t tokens = batch.samples * batch.length, groups = packed ? 1 : batch.samples;
  const int64_t width = packed ? std::max<int64_t>(0, counts.rows + (chance(20) ? any(-2, 20) : 0)) : batch.length;
  const int64_t rows = groups * width;
  FactMemory found(rows, batch.samples), expected(rows, batch.samples);
  std::vector<int32_t> bounds[4];
  for (auto& bound : bounds) bound = poison<int32_t>(rows);

  const int64_t dim = rows > 200 ? any(1, 16) : any_dim(), vocabulary = any(5, 12);
  const DType common = any_dtype();
  const bool alike = chance(50), from_weight = chance(50), add = chance(30);
  Rows text = rows_of(1, from_weight ? vocabulary : tokens, dim, dtype_like(common, alike), chance(50));
  Rows features = rows_of(1, batch.kinds[0].rows, dim, dtype_like(common, alike), chance(50));
  Rows out = rows_of(groups, width, dim, common, true);
  for (Rows* table : {&text, &features, &out}) fill(*table);
  Rows on_host = copy_of(out);
  Merge merge;
  merge.out = out.table;
  merge.dim = dim;
  merge.add = add;
  merge.text = text.table;
  if (from_weight) merge.tokens = batch.tokens;
  merge.token_count = tokens;
  merge.scaled = from_weight && chance(50);
  merge.scale = 1.7;
  merge.features.append(features.table, 0, dim);

  cuda::TokenFacts facts_out;
  facts_out.source_index = found.source.data();
  if (add) facts_out.text_index = found.text_index.data();
  facts_out.position_ids = found.position_ids.data();
  facts_out.document_ids = found.document_ids.data();
  facts_out.attention_mask = found.attention_mask.data();
  if (chance(70)) facts_out.labels = found.labels.data();
  facts_out.cu_seqlens = found.cu_seqlens.data();
  const bool masked = packed || !batch.attention_mask;
  if (masked) {
    facts_out.window = static_cast<int32_t>(chance(50) ? any(1, 30) : 0);
    facts_out.kv_lo = bounds[0].data();
    facts_out.kv_hi = bounds[1].data();
  }
  Status status;
  Workspace workspace(cuda::merge_tokens_workspace(batch));
  cuda::merge_tokens(batch, merge, width, facts_out, workspace.data(), chance(80) ? status.record.data() : nullptr, nullptr);

  Record error = plan(batch, width, true, expected.source.data());
  const int64_t wanted = (add ? 1 : 0) | 2 | 4 | 32 | (facts_out.labels != nullptr ? 64 : 0) | 128;
  facts(batch, width, expected.facts(batch.samples, wanted));
  merge.out = on_host.table;
  merge.source_index = expected.source.data();
  if (add) merge.text_index = expected.text_index.data();
  if (error.code == kFine) error = check_tokens(merge);
  if (status.record[0] != kFine) status.expect(error, "the status of the usual batch");
  if (error.code != kFine) return;
  same(found, expected);
  merge_rows(merge);
  same(out, on_host, "the rows of the usual batch");
  if (!masked) return;
  MaskRows mask;
  mask.rows = groups;
  mask.width = width;
  mask.document_ids = expected.document_ids.data();
  mask.attend.window = facts_out.window;
  intervals(mask, {bounds[2].data(), bounds[3].data(), nullptr, nullptr});
  same(bounds[0], bounds[2], "kv_lo");
  same(bounds[1], bounds[3], "kv_hi");
}

struct Op {
  const char* name;
  void (*run)();
};

// By the names of the sources in csrc/cuda.
constexpr Op kOps[] = {
    {"merge", run_rows},          {"merge_backward", run_rows_backward}, {"merge_tokens", run_merge_tokens},
    {"plan", run_plan},           {"intervals", run_intervals},          {"dense", run_dense},
    {"block_map", run_block_map},
};

}  // namespace

int main(int count, char** arguments) {
  if (count < 3) {
    for (const Op& op : kOps) std::printf("%s\n", op.name);
    return 0;
  }
  const std::string name = arguments[1];
  const int64_t cases = std::atoll(arguments[2]);
  for (const Op& op : kOps) {
    if (name != op.name) continue;
    for (int64_t i = 0; i < cases; ++i) {
      generator.seed(static_cast<unsigned>(1000003 * (count > 3 ? std::atoll(arguments[3]) : 0) + i));
      if (showing()) std::fprintf(stderr, "case %lld\n", static_cast<long long>(i));
      op.run();
    }
    std::printf("%lld cases of %s\n", static_cast<long long>(cases), op.name);
    return 0;
  }
  std::fprintf(stderr, "no op %s\n", arguments[1]);
  return 2;
}
