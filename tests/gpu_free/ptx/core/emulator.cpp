// SPDX-License-Identifier: Apache-2.0
// Runs a launch: blocks one after the other, warps in random order from barrier to barrier, lanes in lockstep. The C
// functions at the end are what machine.py calls.
#include "bulk.h"
#include "integers.h"
#include "transfers.h"
#include "warp_ops.h"
#include "wgmma.h"

namespace ptx {

static Machine machine;
static std::map<std::string, s32> opcode_numbers;
static std::vector<Handler> handlers;
static std::vector<bool> are_wgmma, are_copies;

static void define_all() {
  auto define = [](const Definition& definition) {
    const std::string names = definition.names;
    for (size_t from = 0; from < names.size();) {
      size_t to = std::min(names.find(' ', from), names.size());
      opcode_numbers[names.substr(from, to - from)] = s32(handlers.size());
      from = to + 1;
    }
    handlers.push_back(definition.handler);
    are_wgmma.push_back(names.starts_with("wgmma.mma_async"));
    are_copies.push_back(names.starts_with("mov."));
  };
  for (const auto& d : kIntegers) define(d);
  for (const auto& d : kFloats) define(d);
  for (const auto& d : kTransfers) define(d);
  for (const auto& d : kWarpOperations) define(d);
  for (const auto& d : kWgmma) define(d);
  for (const auto& d : kBulk) define(d);
}

// Registers that a block finds set; the order is that of machine.py.
enum Special { kTid, kLane, kWarp, kNtid, kCtaX, kCtaY, kCtaZ, kGridX, kGridY, kGridZ, kSpecials };

static void start_warp(Warp& w, int index, const u64* initial, size_t registers, const s32* special) {
  w = Warp{};
  w.index = index;
  w.registers.resize(registers * kLanes);
  for (size_t r = 0; r < registers; r++)
    std::fill_n(w.reg(s32(r)), kLanes, initial[r]);
  const u64 values[kSpecials] = {
      0, 0, u64(index), machine.warps.size() * kLanes, machine.block[0], machine.block[1], machine.block[2],
      machine.grid[0], machine.grid[1], machine.grid[2]};
  for (int i = 0; i < kSpecials; i++)
    if (special[i] >= 0)
      for (int lane = 0; lane < kLanes; lane++)
        w.reg(special[i])[lane] = i == kTid ? index * kLanes + lane : i == kLane ? lane : values[i];
  w.seen.assign(machine.agents(), 0);
  w.fenced = w.seen;
  w.seen[index] = 1;
  if (machine.has_wgmma)
    w.written_at.assign(registers, 0), w.accumulating.assign(registers, 0), w.multiplying.assign(registers, 0);
}

static void arrive_at_barrier(Warp& w, const Instruction& in, Mask mask) {
  if (mask != w.live)
    throw Violation{"divergent barrier: lanes " + hex(mask) + " of " + hex(w.live) + " arrive"};
  w.barrier = in.n_src > 0 ? u32(w.reg(in.src[0])[0]) : 0;
  w.barrier_threads = in.n_src > 1 ? u32(w.reg(in.src[1])[0]) : u32(machine.warps.size()) * kLanes;
  w.barrier_line = in.line;
  w.state = kAtBarrier;
}

static Mask guarded(Warp& w, const Instruction& in, Mask mask) {
  if (in.guard < 0)
    return mask;
  const u64* p = w.reg(in.guard);
  Mask active = 0;
  for (int lane = 0; lane < kLanes; lane++)
    active |= Mask(p[lane] & 1) << lane;
  return mask & (in.guard_negated ? ~active : active);
}

// Diverged lanes: those with the smallest pc run first, until they reach the pc of others. Returns at a barrier, at the
// end, or where the warp polls in vain.
static const Instruction* current = nullptr;

static void run_warp(Warp& w) {
  w.yields = false;
  while (w.state == kRunning && !w.yields) {
    s32 pc = INT32_MAX, next_group = INT32_MAX;
    for (int lane = 0; lane < kLanes; lane++)
      if (w.live >> lane & 1)
        pc = std::min(pc, w.pc[lane]);
    Mask mask = 0;
    for (int lane = 0; lane < kLanes; lane++)
      if (w.live >> lane & 1) {
        if (w.pc[lane] == pc)
          mask |= Mask{1} << lane;
        else
          next_group = std::min(next_group, w.pc[lane]);
      }
    auto set_pc = [&](s32 to) { for_lanes(mask, [&](int lane) { w.pc[lane] = to; }); };
    while (true) {
      if (pc >= s32(machine.program.size()))
        throw Violation{"control runs off the end of the program"};
      const Instruction& in = machine.program[pc];
      current = &in;
      const Mask active = guarded(w, in, mask);
      machine.counters.instructions++;
      if (in.control == kPlain) {
        if (active) {
          if (machine.has_wgmma && !in.is_wgmma)
            track_registers(w, in);
          in.run(machine, w, in, active);
        }
        pc++;
        if (pc == next_group || w.yields) {
          set_pc(pc);
          break;
        }
        continue;
      }
      if (in.control == kBranch) {
        for_lanes(mask, [&](int lane) { w.pc[lane] = active >> lane & 1 ? in.target : pc + 1; });
        if (active == mask && next_group == INT32_MAX) {  // all together: stay in this loop
          pc = in.target;
          continue;
        }
        break;
      }
      set_pc(pc + 1);
      if (in.control == kExit) {
        w.live &= ~active;
        if (!w.live)
          w.state = kExited;
      } else if (active) {
        arrive_at_barrier(w, in, active);
      }
      break;
    }
  }
}

// Lets the warps of one full barrier go on. They know of each other's past from now on.
static bool release_barrier() {
  for (Warp& first : machine.warps) {
    if (first.state != kAtBarrier)
      continue;
    std::vector<Warp*> arrived;
    for (Warp& w : machine.warps)
      if (w.state == kAtBarrier && w.barrier == first.barrier) {
        if (w.barrier_line != first.barrier_line)
          throw Violation{"divergent barrier " + std::to_string(w.barrier) + ": warp " + std::to_string(first.index) +
                          " waits at line " + std::to_string(first.barrier_line) + ", warp " + std::to_string(w.index) +
                          " at line " + std::to_string(w.barrier_line)};
        arrived.push_back(&w);
      }
    if (arrived.size() * kLanes < first.barrier_threads)
      continue;
    Clock seen = arrived[0]->seen, fenced = arrived[0]->fenced;
    for (Warp* w : arrived) {
      join(seen, w->seen);
      join(fenced, w->fenced);
    }
    for (Warp* w : arrived) {
      w->seen = seen;
      w->fenced = fenced;
      release(*w);
      w->state = kRunning;
    }
    return true;
  }
  return false;
}

static void run_block() {
  int idle = 0;  // turns in a row in which the warp polled in vain
  const u32 patience = 1u << machine.random() % 7;  // in how many turns, on average, a bulk copy lands
  while (true) {
    std::vector<Warp*> ready;
    bool waiting = false;
    for (Warp& w : machine.warps) {
      if (w.state == kRunning)
        ready.push_back(&w);
      waiting |= w.state == kAtBarrier;
    }
    if (machine.random() % patience == 0 || idle > 4 * int(ready.size()))
      if (complete_bulk_copy(machine))
        idle = 0;
    if (ready.empty()) {
      if (!waiting) {
        if (!machine.bulk_copies.empty())
          throw Violation{"the block ends while a bulk copy is in flight"};
        return;
      }
      if (!release_barrier())
        throw Violation{"divergent barrier: some warps wait at a barrier that the others never reach"};
      continue;
    }
    Warp& w = *ready[machine.random() % ready.size()];
    machine.running = w.index;
    const u64 before = machine.counters.instructions;
    run_warp(w);
    idle = w.yields && machine.counters.instructions - before < 64 ? idle + 1 : 0;
    if (idle > 1000 && machine.bulk_copies.empty())
      throw Violation{"deadlock: every warp polls an mbarrier that nobody completes"};
  }
}

}  // namespace ptx

// ---- the interface

using namespace ptx;
static std::string message;

extern "C" {

int32_t ptx_opcode(const char* name) {
  if (handlers.empty())
    define_all();
  const auto found = opcode_numbers.find(name);
  return found == opcode_numbers.end() ? -1 : found->second;
}

void ptx_clear_buffers() { machine.global.buffers.clear(); }

void ptx_add_buffer(uint64_t address, uint64_t size, const uint8_t* allowed, int32_t read_only, const char* name) {
  machine.global.buffers.push_back({address, address + size, allowed, bool(read_only), name});
}

// Rows of 19 numbers: base, rank, element size, swizzle, five sizes, strides and box sizes. A map's handle is its row.
void ptx_set_tensor_maps(const int64_t* rows, int32_t count) {
  machine.tensor_maps.clear();
  for (const int64_t* row = rows; row < rows + 19 * count; row += 19) {
    TensorMap map{u64(row[0]), row[1], row[2], row[3], {}, {}, {}};
    std::copy(row + 4, row + 9, map.size);
    std::copy(row + 9, row + 14, map.stride);
    std::copy(row + 14, row + 19, map.box);
    machine.tensor_maps.push_back(map);
  }
}

void ptx_buffer_traffic(int32_t index, uint64_t* loaded_stored) {
  loaded_stored[0] = machine.global.buffers[index].loaded;
  loaded_stored[1] = machine.global.buffers[index].stored;
}

// A row of `table`: opcode (-1 branch, -2 exit, -3 barrier), guard, negated, first and number of destinations, of sources,
// target, line, two offsets. Returns null or what went wrong; `counters` are filled in either case.
const char* ptx_run(const int64_t* table, int64_t rows, const int32_t* operands, int64_t n_operands,
                    const uint64_t* initial, int64_t registers, const int32_t* special, const int64_t* grid,
                    int64_t warps, int64_t shared_size, int64_t seed, int32_t has_wgmma, uint64_t* counters) {
  machine.operands.assign(operands, operands + n_operands);
  machine.program.assign(rows, Instruction{});
  for (int64_t i = 0; i < rows; i++) {
    const int64_t* row = table + 11 * i;
    Instruction& in = machine.program[i];
    in.control = row[0] >= 0 ? kPlain : row[0] == -1 ? kBranch : row[0] == -2 ? kExit : kBarrier;
    if (in.control == kPlain)
      in.run = handlers[row[0]], in.is_wgmma = are_wgmma[row[0]], in.is_copy = are_copies[row[0]];
    in.guard = s32(row[1]);
    in.guard_negated = row[2];
    in.dst = &machine.operands[row[3]], in.n_dst = s32(row[4]);
    in.src = &machine.operands[row[5]], in.n_src = s32(row[6]);
    in.target = s32(row[7]);
    in.line = s32(row[8]);
    in.offset[0] = row[9], in.offset[1] = row[10];
  }
  machine.counters = Counters{};
  machine.random.seed(u32(seed));
  machine.has_wgmma = has_wgmma;
  machine.global.begin_launch();
  machine.shared.bytes_read = machine.shared.bytes_written = machine.shared.conflicts = 0;
  machine.warps.assign(warps, Warp{});
  for (int i = 0; i < 3; i++)
    machine.grid[i] = u32(grid[i]);
  message.clear();
  try {
    for (u32 z = 0; z < machine.grid[2]; z++)
      for (u32 y = 0; y < machine.grid[1]; y++)
        for (u32 x = 0; x < machine.grid[0]; x++) {
          machine.block[0] = x, machine.block[1] = y, machine.block[2] = z;
          machine.block_index = (z * machine.grid[1] + y) * machine.grid[0] + x;
          machine.shared.reset(shared_size, machine.agents());
          machine.mbarriers.clear();
          machine.bulk_copies.clear();
          machine.bulk_step = 1;
          for (int i = 0; i < warps; i++)
            start_warp(machine.warps[i], i, initial, registers, special);
          current = nullptr;
          run_block();
        }
  } catch (const Violation& violation) {
    message = violation.message;
  }
  const u64 values[] = {machine.counters.instructions, machine.counters.mma, machine.counters.async_copies,
                        machine.shared.bytes_read, machine.shared.bytes_written, machine.shared.conflicts};
  std::copy(std::begin(values), std::end(values), counters);
  if (message.empty())
    return nullptr;
  message += " [block " + std::to_string(machine.block[0]) + "," + std::to_string(machine.block[1]) + "," +
             std::to_string(machine.block[2]) + " warp " + std::to_string(machine.running) + " line " +
             std::to_string(current ? current->line : 0) + "]";
  return message.c_str();
}
}
