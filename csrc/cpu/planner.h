// SPDX-License-Identifier: Apache-2.0
#ifndef PEFTKERN_CPU_PLANNER_H_
#define PEFTKERN_CPU_PLANNER_H_

#include <vector>

#include "plan.h"

namespace peftkern {

// Makes the plan of one call. Owns the arrays that the plan points to.
class Planner {
 public:
  explicit Planner(const peftkern_attention& a);

  // Rows do not depend on each other, so the number of threads may decide how they are cut.
  const Plan& forward(const peftkern_attention& a);
  // Sums over rows follow the cut: a function of sizes and ids only.
  const Plan& backward(const peftkern_attention& a);

 private:
  int64_t blocks(const Sequence& s) const;
  double total_work() const;
  void add_units(int32_t sequence, int64_t splits);
  const Plan& decode();
  const Plan& finish();

  Plan plan{};
  std::vector<Sequence> sequences;
  std::vector<Unit> units;
  std::vector<Group> groups;
};

}  // namespace peftkern
#endif  // PEFTKERN_CPU_PLANNER_H_
