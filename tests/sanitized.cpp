// Runs every kernel of csrc/cpu on random batches, most of them broken in some way: whatever the numbers say, nothing
// is read or written outside a tensor. Built with sanitizers by tests/test_headers.py.
#include <algorithm>
#include <limits>

#include "cpu/best_fit.h"
#include "cpu/block_map.h"
#include "cpu/dense.h"
#include "cpu/positions.h"
#include "cpu/segments.h"
#include "cpu/threads.h"
#include "random_cases.h"

namespace {

void run_rows(const std::vector<int32_t>& source, const std::vector<int32_t>& text_index, int64_t groups, int64_t width,
              const std::vector<int64_t>& ids) {
  const int64_t dim = chance(10) ? any(0, 1) : any(1, 700), count = static_cast<int64_t>(ids.size());
  const int64_t rows = groups * width, vocabulary = any(0, 12);
  const bool add = chance(30), from_weight = chance(40);
  Rows out = rows_of(groups, width, dim, any_dtype(), chance(50));
  out.table.step = size_of(out.table.dtype);
  Rows text = from_weight ? rows_of(1, vocabulary, dim, any_dtype(), chance(50)) : rows_of(1, count, dim, any_dtype(), chance(50));
  std::vector<Rows> features;
  std::vector<int64_t> starts;
  Merge merge;
  for (int64_t first = 0, i = 0; i < 3; ++i) {
    features.push_back(rows_of(any(0, 3), any(0, 6), dim, any_dtype(), chance(50)));
    starts.push_back(first);
    merge.features.append(features.back().table, first, dim);
    first += features.back().table.rows + any(0, 1);
  }
  merge.out = out.table;
  merge.dim = dim;
  merge.source_index = source.data();
  merge.text_index = add && chance(70) ? text_index.data() : nullptr;
  merge.add = add;
  merge.text = text.table;
  if (from_weight) merge.tokens = integers(ids);
  merge.token_count = count;
  merge.scaled = from_weight && chance(50);
  merge.scale = 1.7;
  check_tokens(merge);
  merge_rows(merge);
  merge.only_features = true;
  if (!from_weight) merge_rows(merge);

  MergeBackward backward;
  backward.grad = out.table;
  backward.dim = dim;
  backward.source_index = source.data();
  backward.text_index = merge.text_index;
  backward.add = add;
  std::vector<Rows> gradients;
  auto wanted = [&](int64_t count_of_rows) {
    gradients.push_back(rows_of(1, count_of_rows, dim, any_dtype(), true));
    return Gradient{gradients.back().table.data, count_of_rows, gradients.back().table.dtype};
  };
  backward.wants_text = !from_weight && chance(80);
  if (backward.wants_text) backward.text = wanted(count);
  backward.wants_weight = from_weight;
  if (from_weight) backward.weight = wanted(vocabulary);
  backward.tokens = merge.tokens;
  backward.token_count = count;
  backward.scaled = merge.scaled;
  backward.scale = 1.7;
  for (size_t i = 0; i < features.size(); ++i) {
    const int64_t own = features[i].table.rows;
    if (chance(80) && own > 0) backward.features.push_back({wanted(own + any(0, 2)), starts[i], own});
  }
  must(static_cast<int64_t>(source.size()) == rows, "source_index of another size than the rows");
  merge_rows_backward(backward);
}

void run_mask(const std::vector<int32_t>& documents, const std::vector<int32_t>& images, int64_t groups, int64_t width) {
  RandomMask random(documents, images, groups, width);
  const MaskRows& rows = random.rows;
  std::vector<int32_t> out[4];
  for (auto& part : out) part.assign(documents.size(), -7);
  const bool pair = chance(70);
  intervals(rows, {out[0].data(), out[1].data(), pair ? out[2].data() : nullptr, pair ? out[3].data() : nullptr});
  for (size_t i = 0; i < documents.size(); ++i) {
    must(0 <= out[0][i] && out[0][i] <= out[1][i] && out[1][i] <= width, "an interval outside the row");
    if (pair) must(0 <= out[2][i] && out[2][i] <= out[3][i] && out[3][i] <= width, "a second interval outside the row");
  }
}

// Renderings of any numbers whatever, in tensors that end where their last element does.
void run_renderings(const std::vector<int32_t>& lo, const std::vector<int32_t>& hi, int64_t samples, int64_t rows) {
  const int64_t count = samples * rows, keys = chance(5) ? any(1000, 1100) : any(0, 30);
  const auto lo2 = many<int32_t>(count, -2, keys + 2), hi2 = many<int32_t>(count, chance(10) ? INT32_MIN : -2, chance(10) ? INT32_MAX : keys + 2);
  MaskIntervals mask;
  mask.samples = samples;
  mask.rows = rows;
  mask.keys = keys;
  mask.lo = lo.data();
  mask.hi = hi.data();
  if (chance(60)) {
    mask.lo2 = lo2.data();
    mask.hi2 = hi2.data();
  }
  const int64_t size = int64_t{1} << any(0, 3);
  std::vector<char> elements(static_cast<size_t>(count * keys * size));
  elements.shrink_to_fit();
  dense(mask, {size, 0x0101010101010101u, 0}, elements.data());
  std::vector<uint8_t> packed(static_cast<size_t>(samples * ((rows * keys + 7) / 8)));
  packed.shrink_to_fit();
  bits(mask, packed.data());
  const Blocks blocks = {chance(10) ? INT32_MAX : any(1, 9), chance(10) ? INT32_MAX : any(1, 9)};
  const int64_t lines = block_count(rows, blocks.q_size), columns = block_count(keys, blocks.kv_size);
  std::vector<int32_t> lists[8];
  for (size_t i = 0; i < 8; i += 2) {
    const int64_t outer = samples * (i < 4 ? lines : columns);
    lists[i].assign(static_cast<size_t>(outer), -7);
    lists[i + 1].assign(static_cast<size_t>(outer * (i < 4 ? columns : lines)), -7);
  }
  auto pair = [&](int i) { return BlockLists{lists[i].data(), lists[i + 1].data()}; };
  block_map(mask, blocks, {pair(0), pair(2), pair(4), pair(6)});
  for (const auto& list : lists) {
    for (const int32_t number : list) must(0 <= number, "a block that nobody wrote");
  }
  int64_t covered = 0;
  for (const Segment& segment : segments(mask)) covered += segment.row_end - segment.row_begin;
  must(covered == count, "rows in no segment, or in two");
}

void run_best_fit() {
  BestFit asked;
  asked.samples = any(0, chance(3) ? 3000 : 30);
  asked.budgets = static_cast<int>(any(1, kMostBudgets));
  const int64_t most = chance(10) ? std::numeric_limits<int64_t>::max() : any(0, 40);
  std::vector<int64_t> needs = many<int64_t>(asked.samples * asked.budgets, chance(5) ? -1 : 0, chance(50) ? most : any(0, most));
  std::fill_n(asked.capacity, asked.budgets, most);
  std::vector<int64_t> order(static_cast<size_t>(asked.samples)), rows(order);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  std::shuffle(order.begin(), order.end(), generator);
  if (!order.empty() && chance(10)) order[0] = any(-2, asked.samples + 1);
  asked.needs = needs.data();
  asked.order = order.data();
  if (!best_fit(asked, rows.data())) return;
  for (const int64_t row : rows) must(0 <= row && row < asked.samples, "a sample in no row");
}

void run_positions() {
  MropeTask task;
  task.samples = any(0, 4);
  task.length = chance(5) ? any(40000, 40100) : any(0, 40);
  const int64_t count = task.samples * task.length;
  const std::vector<int8_t> types = many<int8_t>(count, chance(10) ? -1 : 0, chance(10) ? 3 : 2);
  const std::vector<int64_t> mask = many<int64_t>(count, 0, 2);
  const std::vector<int32_t> ids = many<int32_t>(count, -2, chance(50) ? 1 : INT32_MAX);
  task.types = integers(types);
  if (chance(50)) task.attention_mask = integers(mask);
  if (chance(50)) task.document_ids = integers(ids);
  const int64_t high = chance(20) ? std::numeric_limits<int64_t>::max() : 6;
  const std::vector<int64_t> images = many<int64_t>(any(0, 5) * 3, chance(10) ? -high : 1, high), videos = many<int64_t>(any(0, 5) * 3, 1, high);
  task.grids[0] = images.data();
  task.grids[1] = videos.data();
  task.counts[0] = static_cast<int64_t>(images.size()) / 3;
  task.counts[1] = static_cast<int64_t>(videos.size()) / 3;
  task.merge = any(1, 2);
  task.split = chance(50);
  task.intervals.each = chance(10) ? INT32_MAX : any(0, 3);
  const std::vector<int64_t> whole = many<int64_t>(task.counts[1], 0, chance(20) ? std::numeric_limits<int64_t>::max() : 3);
  const std::vector<int16_t> bits = many<int16_t>(task.counts[1] * 4, INT16_MIN, INT16_MAX);
  task.intervals.type = static_cast<Intervals::Type>(any(0, 4));
  if (chance(60)) task.intervals.data = task.intervals.type == Intervals::Type::kWhole ? static_cast<const void*>(whole.data()) : bits.data();
  std::vector<int64_t> positions(static_cast<size_t>(task.rows() * count), std::numeric_limits<int64_t>::min());
  std::vector<int64_t> deltas(static_cast<size_t>(task.samples));
  mrope_position_ids(task, positions.data(), deltas.data());
  for (const int64_t position : positions) must(position != std::numeric_limits<int64_t>::min(), "a position that nobody wrote");
}

void run_batch() {
  run_best_fit();
  run_positions();
  RandomBatch random;
  const Batch& batch = random.batch;
  const int64_t samples = batch.samples, count = samples * batch.length;
  std::vector<int64_t> placeholders(batch.kinds.size());
  const Counts counts = vlm_fuse::count(batch, placeholders.data());
  const int64_t width = random.width(counts);
  const int64_t groups = batch.layout == Layout::kPacked ? 1 : samples, rows = groups * width;
  const size_t size = static_cast<size_t>(rows);

  std::vector<int32_t> source(size, INT32_MAX), text_index(size), document_ids(size), image_ids(size);
  plan(batch, width, chance(80), source.data());
  std::vector<int64_t> position_ids(size), new_labels(size);
  std::vector<int8_t> kind_ids(size);
  std::vector<uint8_t> attention_mask(size);
  const int64_t sequences = batch.document_ids ? any(0, counts.documents + 2) : samples;
  std::vector<int32_t> bounds(static_cast<size_t>(sequences) + 1, -7);
  Facts facts;
  facts.text_index = text_index.data();
  facts.position_ids = position_ids.data();
  facts.document_ids = document_ids.data();
  facts.image_ids = image_ids.data();
  facts.kind_ids = kind_ids.data();
  facts.attention_mask = attention_mask.data();
  facts.labels = new_labels.data();
  facts.cu_seqlens = bounds.data();
  facts.sequences = sequences;
  vlm_fuse::facts(batch, width, facts);
  for (size_t i = 0; i < size; ++i) {
    must(source[i] != INT32_MAX || !batch.kinds.empty(), "a row that nobody wrote");
    must(text_index[i] >= -1 && text_index[i] < count, "a token that is not there");
    must((document_ids[i] >= 0) == (attention_mask[i] == 1), "documents and padding disagree");
  }
  for (size_t i = 0; i + 1 < bounds.size(); ++i) must(0 <= bounds[i] && bounds[i] <= bounds[i + 1], "sequences that shrink");

  run_rows(source, text_index, groups, width, many<int64_t>(count, -1, 12));
  if (chance(30)) run_rows(many<int32_t>(rows, INT32_MIN, INT32_MAX), many<int32_t>(rows, INT32_MIN, INT32_MAX), groups, width, many<int64_t>(count, -1, 12));
  run_renderings(many<int32_t>(rows, -2, 30), many<int32_t>(rows, -2, chance(10) ? INT32_MAX : 32), groups, width);
  run_mask(chance(50) ? document_ids : many<int32_t>(rows, -1, 3), chance(50) ? image_ids : many<int32_t>(rows, -1, 2), groups, width);
}

// Two parts, so that the seams between threads are walked too.
int32_t two_parts(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  const int64_t middle = begin + (end - begin) / 2;
  body(middle, end, context);
  body(begin, middle, context);
  return 0;
}

}  // namespace

int main(int, char** arguments) {
  use_parallel_for(two_parts);
  const int64_t batches = std::atoll(arguments[1]);
  for (int64_t i = 0; i < batches; ++i) run_batch();
  std::printf("%lld batches\n", static_cast<long long>(batches));
}
