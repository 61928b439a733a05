// One thread's way along the sparse part of one row, in the order of the columns.
//
// The entries of 32 rows are too far apart to be loaded together, and a thread that waited for its own
// would stop its warp. So they come ahead of their use, eight at a time, into shared memory.
#pragma once

#include "bulk_copy.cuh"

namespace squeezellm_hf::cuda {

// A copy of 16 bytes to shared memory in the background.
__device__ __forceinline__ void copy_chunk(uint32_t target, const void* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}

__device__ __forceinline__ void wait_for_chunks() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Copied ahead are 16-bit columns and values only.
inline bool can_copy_entries(const LutWeight& weight) {
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  return weight.values_dtype != DType::kFloat32 && !weight.wide_columns && aligned(weight.col_indices) &&
         aligned(weight.values);
}

constexpr int kChunkEntries = 8;
constexpr int kNoColumn = INT32_MAX;

// Two chunks of columns and two of values for each of kThreads threads.
template <int kThreads>
struct EntryBuffer {
  uint4 columns[2][kThreads];
  uint4 values[2][kThreads];
};

template <int kThreads>
struct SparseCursor {
  const LutWeight& weight;
  EntryBuffer<kThreads>& buffer;
  int thread;
  int entry = 0;      // the next one
  int end = 0;        // of the row
  int copied = 0;     // the end of the entries that are in the buffer
  int requested = 0;  // the end of those that are on their way
  int column = kNoColumn;
  uint32_t value_bits = 0;

  // The row's entries from the column `first` on.
  __device__ __forceinline__ void begin(int row, int first) {
    const int2 entries = sparse_row(weight, row);
    entry = entries.x;
    end = entries.y;
    // Ascending columns are a promise that is not checked: whatever they are, this ends.
    for (int past = end; first > 0 && entry < past;) {
      const int middle = entry + (past - entry) / 2;
      if (sparse_column(weight, middle) < first) {
        entry = middle + 1;
      } else {
        past = middle;
      }
    }
    requested = copied = entry & -kChunkEntries;
    load_entry();
  }

  // Waits for what has been requested; done long after the request, it costs nothing.
  __device__ __forceinline__ void receive_entries() {
    wait_for_chunks();
    copied = requested;
  }

  // Now and then, after receive_entries. Chunks that the tensors hold in full only: the last few entries of
  // all are loaded one by one.
  __device__ __forceinline__ void request_entries() {
    const int chunk = entry & -kChunkEntries;
    const int last = static_cast<int>(weight.nnz) & -kChunkEntries;
    requested = max(requested, chunk);
    while (requested < min(min(chunk + 2 * kChunkEntries, end), last)) {
      const int slot = requested / kChunkEntries % 2;
      copy_chunk(shared_address(&buffer.columns[slot][thread]),
                 static_cast<const uint16_t*>(weight.col_indices) + requested);
      copy_chunk(shared_address(&buffer.values[slot][thread]), static_cast<const uint16_t*>(weight.values) + requested);
      requested += kChunkEntries;
    }
  }

  __device__ __forceinline__ float value() const { return float_of_bits(value_bits, weight.values_dtype); }

  __device__ __forceinline__ void advance() {
    ++entry;
    load_entry();
  }

 private:
  // The next entry's, zero unless it is there. A predicate in its own right: the compiler would make a branch.
  __device__ __forceinline__ uint32_t buffered(const uint4 (&chunks)[2][kThreads], bool there) const {
    const auto* chunk = reinterpret_cast<const uint16_t*>(&chunks[entry / kChunkEntries % 2][thread]);
    uint16_t value;
    asm volatile(
        "{.reg .pred there;\n"
        "setp.ne.u32 there, %2, 0;\n"
        "mov.u16 %0, 0;\n"
        "@there ld.shared.u16 %0, [%1];}"
        : "=h"(value)
        : "r"(shared_address(chunk + entry % kChunkEntries)), "r"(static_cast<uint32_t>(there))
        : "memory");
    return value;
  }

  __device__ __forceinline__ void load_entry() {
    const bool present = entry < end;
    const bool here = entry < copied;  // else the buffer holds another chunk, or this one is on its way
    int next = min(static_cast<int>(buffered(buffer.columns, here)), weight.in_features - 1);
    value_bits = buffered(buffer.values, here);
    if (present && !here) {
      next = sparse_column(weight, entry);
      value_bits = load_bits(weight.values, weight.values_dtype, entry);
    }
    column = present ? next : kNoColumn;
  }
};

}  // namespace squeezellm_hf::cuda
