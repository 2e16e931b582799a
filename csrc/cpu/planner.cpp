// SPDX-License-Identifier: Apache-2.0
// How a call is cut into tasks.
#include "planner.h"

#include <algorithm>
#include <numeric>

namespace peftkern {
namespace {

constexpr int64_t kDecodeRows = 32;  // positions x heads of a group up to which a call is a decode

constexpr int64_t kMaxPartials = int64_t(256) << 20;  // bytes of partial sums of one sequence

std::vector<int32_t> indices(size_t count) {
  std::vector<int32_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  return order;
}

// The approximate time that a sequence takes, for one kv head.
double work(const Sequence& s) { return double(s.q_len) * (double(s.kv_len) / 2 + double(s.prefix_len) + 1); }

}  // namespace

int64_t read_index(const void* data, int64_t dtype, int64_t i) {
  return dtype == PEFTKERN_INT32 ? static_cast<const int32_t*>(data)[i] : static_cast<const int64_t*>(data)[i];
}

Planner::Planner(const peftkern_attention& a) {
  const bool packed = a.cu_seqlens != nullptr;
  const int64_t count = packed ? a.num_sequences : a.batch;
  for (int64_t i = 0; i < count; i++) {
    Sequence s{packed ? 0 : i, 0, a.q_len, a.kv_len, 0, a.prefix_len};
    if (packed) {
      s.start = read_index(a.cu_seqlens, a.cu_seqlens_dtype, i);
      s.q_len = s.kv_len = read_index(a.cu_seqlens, a.cu_seqlens_dtype, i + 1) - s.start;
    }
    if (a.prefix_ids) s.prefix = read_index(a.prefix_ids, a.prefix_ids_dtype, i);
    if (s.prefix < 0) s.prefix_len = 0;
    if (a.prefix_lens && s.prefix >= 0) s.prefix_len = read_index(a.prefix_lens, a.prefix_lens_dtype, s.prefix);
    if (s.prefix_len == 0) s.prefix = -1;
    sequences.push_back(s);
  }
  plan.group_size = a.num_heads / a.num_kv_heads;
  plan.heads_per_block = std::min<int64_t>(plan.group_size, kBlockM);
  plan.positions_per_block = kBlockM / plan.heads_per_block;
  for (const Sequence& s : sequences) {
    plan.max_kv_len = std::max(plan.max_kv_len, s.kv_len);
    plan.max_prefix_len = std::max(plan.max_prefix_len, s.prefix_len);
  }
}

int64_t Planner::blocks(const Sequence& s) const {
  return (s.q_len + plan.positions_per_block - 1) / plan.positions_per_block;
}

void Planner::add_units(int32_t sequence, int64_t splits) {
  splits = std::max<int64_t>(1, std::min(splits, blocks(sequences[sequence])));
  for (int64_t split = 0; split < splits; split++)
    units.push_back({sequence, int32_t(split), int32_t(splits), int32_t(plan.num_partials + split)});
  if (splits > 1) plan.num_partials += int32_t(splits);
}

double Planner::total_work() const {
  double total = 1;
  for (const Sequence& s : sequences) total += work(s);
  return total;
}

const Plan& Planner::forward(const peftkern_attention& a) {
  // The rows of several samples are ordered by position only if no window distinguishes them.
  const bool ordered = a.q_len == 1 || !a.window || !a.prefix_in_window;
  if (a.q_len * plan.group_size <= kDecodeRows && ordered && !a.cu_seqlens && !a.gate && a.dropout_p == 0.0)
    return decode();
  std::vector<int32_t> order = indices(sequences.size());
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t x, int32_t y) { return work(sequences[x]) > work(sequences[y]); });
  const double share = total_work() * double(a.num_kv_heads) / (4.0 * double(std::max<int64_t>(1, a.num_threads)));
  for (int32_t i : order) add_units(i, a.num_threads <= 1 ? 1 : int64_t(work(sequences[i]) / share) + 1);
  return finish();
}

// One unit per sequence, one group per prefix.
const Plan& Planner::decode() {
  plan.decode = true;
  std::vector<int32_t> order = indices(sequences.size());
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t x, int32_t y) { return sequences[x].prefix < sequences[y].prefix; });
  for (int32_t i : order) {
    if (groups.empty() || groups.back().prefix != sequences[i].prefix)
      groups.push_back({int32_t(units.size()), 0, sequences[i].prefix});
    groups.back().count++;
    add_units(i, 1);
  }
  return finish();
}

const Plan& Planner::backward(const peftkern_attention& a) {
  constexpr double kTasks = 24;
  std::vector<int32_t> order = indices(sequences.size());
  std::stable_sort(order.begin(), order.end(), [&](int32_t x, int32_t y) {
    const Sequence &s = sequences[x], &t = sequences[y];
    return s.prefix != t.prefix ? s.prefix < t.prefix : work(s) > work(t);
  });
  const double share = total_work() * double(a.num_kv_heads) / kTasks;
  double filled = 0;
  for (int32_t i : order) {
    const int64_t bytes =  // dk and dv of a split
        4 * (sequences[i].kv_len + 1) * (a.head_dim + a.value_dim + 2) * a.num_kv_heads;
    const int64_t splits = std::min<int64_t>({int64_t(work(sequences[i]) / share) + 1, 8, kMaxPartials / bytes});
    const int32_t first = int32_t(units.size());
    add_units(i, splits > 1 && blocks(sequences[i]) >= 2 * splits ? splits : 1);
    for (int32_t unit = first; unit < int32_t(units.size()); unit++) {
      const double size = work(sequences[i]) / units[unit].splits;
      if (groups.empty() || groups.back().prefix != sequences[i].prefix || filled + size > 1.25 * share) {
        groups.push_back({unit, 0, sequences[i].prefix});
        filled = 0;
      }
      groups.back().count++;
      filled += size;
    }
  }
  return finish();
}

const Plan& Planner::finish() {
  plan.num_sequences = int32_t(sequences.size());
  plan.num_units = int32_t(units.size());
  plan.num_groups = int32_t(groups.size());
  plan.sequences = sequences.data();
  plan.units = units.data();
  plan.groups = groups.data();
  return plan;
}

}  // namespace peftkern
