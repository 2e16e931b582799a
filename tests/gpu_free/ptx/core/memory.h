// SPDX-License-Identifier: Apache-2.0
// Shared and global memory with their checks.
#pragma once
#include <algorithm>

#include "machine.h"

namespace ptx {

inline std::string hex(u64 x) {
  char text[24];
  snprintf(text, sizeof text, "0x%llx", (unsigned long long)x);
  return text;
}

// ---- shared memory

inline void SharedMemory::reset(size_t size, int agents) {
  size_ = size;
  agents_ = agents;
  bytes_.assign(size, 0xff);  // NaN
  state_.assign(size, kUnwritten);
  writer_.assign(size, 0);
  written_.assign(size, 0);
  read_.assign(agents, std::vector<u32>(size, 0));
  stored_by_.assign(size, 0);
}

inline std::string SharedMemory::name(int agent) const {
  const int warps = (agents_ - 1) / 2;
  if (agent < warps)
    return "warp " + std::to_string(agent);
  return agent < 2 * warps ? "wgmma of warp " + std::to_string(agent - warps) : "a bulk copy";
}

inline void SharedMemory::check_range(u32 address, u32 size, const char* what) const {
  if (u64(address) + size > size_)
    throw Violation{std::string("shared memory ") + what + " out of bounds: " + std::to_string(size) + " bytes at " +
                    hex(address) + " of " + hex(size_)};
  if (address % size && (size & (size - 1)) == 0)
    throw Violation{std::string("misaligned shared memory ") + what + " of " + std::to_string(size) + " bytes at " +
                    hex(address)};
}

// Storing the value that another warp stores is no race: Triton's conversions between layouts do it.
inline void SharedMemory::check_writer(u32 address, u32 size, const Accessor& by, const char* what,
                                       const u8* same) const {
  for (u32 i = 0; i < size; i++) {
    const u32 a = address + i;
    if (written_[a] > (*by.seen)[writer_[a]] && writer_[a] != by.agent && !(same && same[i] == bytes_[a]))
      throw Violation{"race in shared memory at " + hex(a) + ": " + what + " after a write by " + name(writer_[a]) +
                      " without a barrier in between"};
  }
}

inline void SharedMemory::check_readers(u32 address, u32 size, const Accessor& by) const {
  for (int agent = 0; agent < agents_; agent++) {
    const u32 seen = (*by.seen)[agent];
    const u32* steps = &read_[agent][address];
    bool unseen = false;
    for (u32 i = 0; i < size; i++)
      unseen |= steps[i] > seen;
    if (unseen && agent != by.agent)
      throw Violation{"race in shared memory at " + hex(address) + ": write after a read by " + name(agent) +
                      " without a barrier in between"};
  }
}

inline void SharedMemory::read(void* into, u32 address, u32 size, const Accessor& by) {
  check_range(address, size, "read");
  bytes_read += size;
  for (u32 i = 0; i < size; i++)
    if (state_[address + i] != kWritten)
      throw Violation{state_[address + i] == kInFlight
                          ? "read of shared memory at " + hex(address + i) + " that an asynchronous copy, not waited for, fills"
                          : "read of uninitialised shared memory at " + hex(address + i)};
  check_writer(address, size, by, "read", nullptr);
  std::fill_n(&read_[by.agent][address], size, by.step);
  memcpy(into, &bytes_[address], size);
}

inline void SharedMemory::write(const void* from, u32 address, u32 size, const Accessor& by) {
  check_range(address, size, "write");
  bytes_written += size;
  const u8* values = static_cast<const u8*>(from);
  for (u32 i = 0; i < size; i++) {
    const u32 a = address + i;
    if (state_[a] == kInFlight)
      throw Violation{"write to shared memory at " + hex(a) + " that an asynchronous copy, not waited for, fills"};
    conflicts += stored_by_[a] == store_ && bytes_[a] != values[i];
    stored_by_[a] = store_;
  }
  check_writer(address, size, by, "write", values);
  check_readers(address, size, by);
  memcpy(&bytes_[address], from, size);
  std::fill_n(&state_[address], size, u8(kWritten));
  std::fill_n(&writer_[address], size, u8(by.agent));
  std::fill_n(&written_[address], size, by.step);
}

inline void SharedMemory::launch(u32 address, u32 size, const Accessor& by) {
  check_range(address, size, "asynchronous write");
  for (u32 a = address; a < address + size; a++)
    if (state_[a] == kInFlight)
      throw Violation{"two asynchronous copies in flight to shared memory at " + hex(a)};
  check_writer(address, size, by, "asynchronous write", nullptr);
  check_readers(address, size, by);
  std::fill_n(&bytes_[address], size, u8(0xff));
  std::fill_n(&state_[address], size, u8(kInFlight));
  std::fill_n(&writer_[address], size, u8(by.agent));
  std::fill_n(&written_[address], size, by.step);
}

inline void SharedMemory::land(const void* from, u32 address, u32 size, const Accessor& by) {
  bytes_written += size;
  memcpy(&bytes_[address], from, size);
  std::fill_n(&state_[address], size, u8(kWritten));
  std::fill_n(&writer_[address], size, u8(by.agent));
  std::fill_n(&written_[address], size, by.step);
}

inline void SharedMemory::require_fenced(u32 address, u32 size, const Clock& fenced, int warps) const {
  for (u32 a = address; a < address + size; a++)
    if (writer_[a] < warps && written_[a] > fenced[writer_[a]])
      throw Violation{"no fence.proxy.async between the write by " + name(writer_[a]) + " to shared memory at " + hex(a) +
                      " and its use by an asynchronous unit"};
}

// ---- global memory

inline Buffer& GlobalMemory::find(u64 address, u32 size, const char* what) {
  auto holds = [&](const Buffer& b) {
    if (address < b.begin || address + size > b.end)
      return false;
    if (b.allowed)
      for (u32 i = 0; i < size; i++)
        if (!b.allowed[address - b.begin + i])
          return false;
    return true;
  };
  if (last_buffer_ < buffers.size() && holds(buffers[last_buffer_]))
    return buffers[last_buffer_];
  for (size_t i = 0; i < buffers.size(); i++)
    if (holds(buffers[i]))
      return buffers[last_buffer_ = i];
  std::string where = "no buffer nearby";
  u64 best = 1 << 20;
  for (const auto& b : buffers) {
    const u64 distance = address < b.begin ? b.begin - address : address < b.end ? 0 : address - b.end + 1;
    if (distance < best) {
      best = distance;
      where = std::to_string(s64(address - b.begin)) + " bytes from the start of " + b.name + " (" +
              std::to_string(b.end - b.begin) + " bytes)";
      if (!distance)
        where += ", in a gap between its rows or across its end";
    }
  }
  throw Violation{std::string("global ") + what + " out of bounds at " + hex(address) + ": " + where};
}

inline GlobalMemory::Page& GlobalMemory::page(u64 address) {
  const u64 key = address >> 8;
  if (!last_page_ || key != last_key_) {
    last_page_ = &pages_[key];
    last_key_ = key;
  }
  return *last_page_;
}

inline void check_aligned(u64 address, u32 size, const char* what) {
  if (address % size)
    throw Violation{std::string("misaligned global ") + what + " of " + std::to_string(size) + " bytes at " +
                    hex(address)};
}

inline void GlobalMemory::load(void* into, u64 address, u32 size, u32 block) {
  Buffer& buffer = find(address, size, "load");
  auto& others = loaded_by_instruction_;
  if (std::find(others.begin(), others.end(), address) == others.end()) {
    others.push_back(address);
    buffer.loaded += size;
  }
  if (!buffer.read_only)
    for (u64 a = address; a < address + size; a++) {
      Page& p = page(a);
      const u32 writer = p.writer[a & 255];
      u32& reader = p.reader[a & 255];
      if (writer && writer != block + 1)
        throw Violation{"race in global memory at " + hex(a) + " in " + buffer.name + ": load after a store by block " +
                        std::to_string(writer - 1)};
      reader = !reader || reader == block + 1 ? block + 1 : kSeveral;
    }
  memcpy(into, reinterpret_cast<const void*>(address), size);
}

inline void GlobalMemory::store(const void* from, u64 address, u32 size, u32 block) {
  Buffer& buffer = find(address, size, "store");
  buffer.stored += size;
  if (buffer.read_only)
    throw Violation{"store to read-only " + buffer.name + " at " + hex(address)};
  for (u64 a = address; a < address + size; a++) {
    Page& p = page(a);
    u32& writer = p.writer[a & 255];
    const u32 reader = p.reader[a & 255];
    if (writer && writer != block + 1)
      throw Violation{"race in global memory at " + hex(a) + " in " + buffer.name + ": stores by blocks " +
                      std::to_string(writer - 1) + " and " + std::to_string(block)};
    if (reader && reader != block + 1)
      throw Violation{"race in global memory at " + hex(a) + " in " + buffer.name + ": store after a load by another block"};
    writer = block + 1;
  }
  memcpy(reinterpret_cast<void*>(address), from, size);
}

inline u8* GlobalMemory::atomic(u64 address, u32 size) {
  check_aligned(address, size, "atomic operation");
  Buffer& buffer = find(address, size, "atomic operation");
  if (buffer.read_only)
    throw Violation{"atomic operation on read-only " + buffer.name + " at " + hex(address)};
  buffer.loaded += size;
  buffer.stored += size;
  return reinterpret_cast<u8*>(address);
}

}  // namespace ptx
